"""The head of a causal language model in a packed pass: logits, and the loss, where they are wanted."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from fastprompt.ops import linear_cross_entropy
from fastprompt.ops._checks import check_targets

from .layout import NO_LABEL, Packing, Plan
from .logits import scale_and_cap
from .weights import has_plain_weight


@dataclass(frozen=True, eq=False)
class HeadRows:
    """What a pass hands to the head, and what the loss needs of it beside the head's output.

    Attributes:
        given: (1, R', D), to the head.
        targets: (M,), the labels that something predicts; None without labels.
        predictors: (M,), the rows that predict them, among those given.
        states: (M, D), those rows, where the head is given none.
    """

    given: Tensor
    targets: Tensor | None = None
    predictors: Tensor | None = None
    states: Tensor | None = None


class CausalHead:
    """What one pass hands to the head, and the loss of it.

    Where only a loss is wanted and the head is a frozen linear layer, with nothing unknown behind it, it is handed no
    rows: loss and gradient come from the hidden states, a piece of the vocabulary at a time.

    Args:
        model: a causal language model.
        labels: (B, L) next-token labels, -100 for none; or None. All are checked, those at padding too.
        all_logits: whether the logits of all text positions are wanted.
        label_smoothing, num_items_in_batch: as transformers' Trainer counts them.
        fused_lm_head: the model's forward is what TRL's trainers made of it, and is asked for what they take of labels
            (log-probabilities, entropies), (B, L): at each label's own place, zero where nothing predicts one.
        is_filled_up: the batch was filled up to a shape, and what is planned has a shape of its own, too.
    """

    def __init__(
        self,
        model: nn.Module,
        labels: Tensor | None,
        all_logits: bool,
        label_smoothing: float = 0.0,
        num_items_in_batch: Tensor | int | None = None,
        fused_lm_head: bool = False,
        is_filled_up: bool = False,
    ) -> None:
        self.model, self.labels, self.all_logits = model, labels, all_logits or labels is None
        self.label_smoothing, self.items, self.is_filled_up = label_smoothing, num_items_in_batch, is_filled_up
        self.fused = fused_lm_head
        if fused_lm_head and labels is None:
            raise ValueError("labels must be given with fused_lm_head, got None")
        self.all_logits &= not fused_lm_head
        head = model.get_output_embeddings()
        plain = type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad
        plain = plain and not fused_lm_head and has_plain_weight(head) and model.loss_function is ForCausalLMLoss
        self.scale_and_cap = scale_and_cap(model) if plain and not self.all_logits else None
        self.from_states = self.scale_and_cap is not None

    def check(self) -> None:
        """Raise an IndexError for labels that are no words; on a GPU that is an assert of the device."""
        if self.labels is not None:
            check_targets(self.labels, self.model.config.get_text_config().vocab_size, NO_LABEL, "labels")

    def planned(
        self, packing: Packing, leading: tuple[int, int], prompt_index: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """For a `Plan`: of the labels that something predicts, their places in the batch and their predictors' rows.

        A segment's first token is predicted by the last row of its leading prompt, as in PEFT; without one, by nothing.

        Args:
            leading: prompts, and rows of each, that stand before the text.
            prompt_index: (S,) which of them each segment reads; None: the first.

        Raises:
            ValueError: more labels than a batch that was filled up has room for.
        """
        if self.labels is None:
            return {}
        (num_prompts, rows), labelled = leading, packing.labelled
        first = packing.positions[labelled] == 0
        if not rows:
            labelled, first = labelled[~first], False
        own = 0 if prompt_index is None else prompt_index[packing.segment[labelled]]
        if self.all_logits:  # the head is given the prompts' last rows, and then the text's
            predictors = np.where(first, own, (num_prompts if rows else 0) + labelled - 1)
            ends = {"ends": np.arange(1, num_prompts + 1) * rows - 1} if rows else {}
        else:
            predictors, ends = np.where(first, (own + 1) * rows - 1, num_prompts * rows + labelled - 1), {}
        targets = packing.index[labelled]
        if self.is_filled_up:  # with a label that `rows` puts behind all others; of any rows, but not all of the same
            more = packing.max_labels - len(targets)
            if more < 0:
                raise ValueError(f"labels must be at most {packing.max_labels}, as max_labels says, got {len(targets)}")
            targets = np.pad(targets, (0, more), constant_values=len(packing.index))
            predictors = np.concatenate([predictors, np.arange(more)])
        return {"targets": targets, "predictors": predictors.astype(np.int64)} | ends

    def asked(self, plan: Plan) -> dict[str, Tensor | bool]:
        """What TRL's forward of the model takes, for the rows that predict something."""
        targets = torch.from_numpy(plan.targets).to(self.labels.device)
        more = {} if self.items is None else {"num_items_in_batch": self.items}
        return {"fused_lm_head": True, "shift_labels": self.labels.flatten()[targets].unsqueeze(0)} | more

    def scored(self, output, plan: Plan):
        """TRL's output for the rows that predict something, each value at the place (B, L) of its label."""
        shape, targets = self.labels.shape, plan.targets

        def placed(value):
            if not isinstance(value, Tensor) or value.shape != (1, len(targets)):
                return value
            return value.new_zeros(shape.numel()).index_copy(0, targets, value[0]).view(shape)

        return type(output)(**{name: placed(value) for name, value in output.items()})

    def rows(self, hidden: Tensor, text: Tensor, plan: Plan) -> HeadRows:
        """What is handed over of hidden (1, R, D), whose text (T, D) is, by what was planned."""
        if self.labels is None:
            return HeadRows(text.unsqueeze(0))
        labels, predictors = self.labels.flatten(), plan.predictors
        if self.is_filled_up:
            labels = F.pad(labels, (0, 1), value=NO_LABEL)
        targets = labels.index_select(0, plan.targets)
        if self.all_logits:
            given = text if plan.ends is None else torch.cat([hidden[0].index_select(0, plan.ends), text])
            return HeadRows(given.unsqueeze(0), targets, predictors)
        predicting = hidden[0].index_select(0, predictors)
        if self.from_states:
            return HeadRows(hidden[:, :0], targets, states=predicting)
        return HeadRows(predicting.unsqueeze(0), targets)

    def output(self, output, rows: HeadRows, tokens: int, padded: Callable[[Tensor], Tensor]):
        """The model's own output class, with the loss, and logits (B, L, V) where they are wanted.

        Args:
            rows: what the head was given.
            tokens: T, of the text.
            padded: (T, V) -> (B, L, V).
        """
        logits = output.logits[0]
        if self.labels is None:
            return type(output)(logits=padded(logits), hidden_states=output.hidden_states)
        loss = self._loss(rows, logits.index_select(0, rows.predictors) if self.all_logits else logits)
        logits = padded(logits[len(logits) - tokens :]) if self.all_logits else None
        return type(output)(loss=loss, logits=logits, hidden_states=output.hidden_states)

    def _loss(self, rows: HeadRows, logits: Tensor) -> Tensor:
        targets = rows.targets
        if self.from_states:
            weight = self.model.get_output_embeddings().weight
            scale, softcap = self.scale_and_cap
            # Not cut_cross_entropy's kernel, which reads on the host which rows have a target.
            backend = "chunked" if self.is_filled_up else None
            options = {"label_smoothing": self.label_smoothing, "softcap": softcap, "backend": backend}
            states = rows.states if scale == 1 else rows.states * scale
            total = linear_cross_entropy(states.to(weight.dtype), weight, targets, **options)
        elif self.label_smoothing:
            total = F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=self.label_smoothing)
        else:
            return self.model.loss_function(
                logits=logits,
                labels=targets,
                shift_labels=targets,
                vocab_size=logits.shape[-1],
                num_items_in_batch=self.items,
            )
        items = self.items
        if items is None:
            items = (targets != NO_LABEL).sum() if self.is_filled_up else len(targets)
        return total / (items.to(total.device) if isinstance(items, Tensor) else items)
