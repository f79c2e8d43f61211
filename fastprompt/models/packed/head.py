"""The head of a causal language model in a packed pass: logits, and the loss, where they are wanted."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from fastprompt.ops import linear_cross_entropy
from fastprompt.ops._checks import check_targets

from .layout import Packing


class CausalHead:
    """What one pass hands to the head, and the loss of it.

    Where only a loss is wanted and the head is a frozen linear layer, it is handed no rows: loss and gradient come from
    the hidden states, a piece of the vocabulary at a time.

    Args:
        model: a causal language model.
        labels: (B, L) next-token labels, -100 for none; or None. All are checked, those at padding too.
        all_logits: whether the logits of all text positions are wanted.
        label_smoothing, num_items_in_batch: as transformers' Trainer counts them.
    """

    def __init__(
        self,
        model: nn.Module,
        labels: Tensor | None,
        all_logits: bool,
        label_smoothing: float = 0.0,
        num_items_in_batch: Tensor | int | None = None,
    ) -> None:
        self.model, self.labels, self.all_logits = model, labels, all_logits or labels is None
        self.label_smoothing, self.items = label_smoothing, num_items_in_batch
        if labels is not None:
            check_targets(labels, model.config.get_text_config().vocab_size, -100, "labels")
        head = model.get_output_embeddings()
        plain = type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad
        self.from_states = not self.all_logits and plain and model.loss_function is ForCausalLMLoss

    def planned(
        self, packing: Packing, leading: tuple[int, int], prompt_index: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """For a plan: of the labels that something predicts, their places in the batch and their predictors' rows.

        A segment's first token is predicted by the last row of its leading prompt, as in PEFT; without one, by nothing.

        Args:
            leading: prompts, and rows of each, that stand before the text.
            prompt_index: (S,) which of them each segment reads; None: the first.
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
        return {"targets": packing.index[labelled], "predictors": predictors.astype(np.int64)} | ends

    def rows(self, hidden: Tensor, text: Tensor, plan: dict[str, Tensor]) -> Tensor:
        """The rows (1, R', D) that the head is given of hidden (1, R, D), whose text (T, D) is, by what was planned."""
        if self.labels is None:
            return text.unsqueeze(0)
        self.targets = self.labels.flatten().index_select(0, plan["targets"])
        self.predictors = plan["predictors"]
        if self.all_logits:
            ends = plan.get("ends")
            return (text if ends is None else torch.cat([hidden[0].index_select(0, ends), text])).unsqueeze(0)
        predicting = hidden[0].index_select(0, self.predictors)
        if self.from_states:
            self.states = predicting
            return hidden[:, :0]
        return predicting.unsqueeze(0)

    def output(self, output, tokens: int, padded: Callable[[Tensor], Tensor]):
        """The model's own output class, with the loss, and logits (B, L, V) where they are wanted.

        Args:
            tokens: T, of the text.
            padded: (T, V) -> (B, L, V).
        """
        logits = output.logits[0]
        if self.labels is None:
            return type(output)(logits=padded(logits), hidden_states=output.hidden_states)
        loss = self._loss(logits.index_select(0, self.predictors) if self.all_logits else logits)
        logits = padded(logits[len(logits) - tokens :]) if self.all_logits else None
        return type(output)(loss=loss, logits=logits, hidden_states=output.hidden_states)

    def _loss(self, logits: Tensor) -> Tensor:
        if self.from_states:
            weight = self.model.get_output_embeddings().weight
            softcap = getattr(self.model.config, "final_logit_softcapping", None)
            options = {"label_smoothing": self.label_smoothing, "softcap": softcap}
            total = linear_cross_entropy(self.states.to(weight.dtype), weight, self.targets, **options)
        elif self.label_smoothing:
            total = F.cross_entropy(logits.float(), self.targets, reduction="sum", label_smoothing=self.label_smoothing)
        else:
            return self.model.loss_function(
                logits=logits,
                labels=self.targets,
                shift_labels=self.targets,
                vocab_size=logits.shape[-1],
                num_items_in_batch=self.items,
            )
        items = len(self.targets) if self.items is None else self.items
        return total / (items.to(total.device) if isinstance(items, Tensor) else items)
