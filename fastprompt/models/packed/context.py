"""The loss of PEFT's context-aware prompt tuning (CPT), in which the prompt's own tokens are labels too.

Tokens have types: 4, 8, 12, ... are labels, of one example of the context each; those of the text come after.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .head import CausalHead, HeadRows
from .layout import NO_LABEL, Packing, Plan, tensor_on


@dataclass(frozen=True, eq=False)
class Context:
    """What the loss counts of a batch.

    Attributes:
        labels: (B, L), of the text; -100 where its tokens are no labels.
        of_prompt: (P-1,), what the prompt's rows but the last predict; -100 where the next token is no label.
        weights: (B, P+L), of what each token adds to the loss.
    """

    labels: Tensor
    of_prompt: Tensor
    weights: Tensor

    @classmethod
    def of(
        cls, labels: Tensor, types: Tensor | None, prompt_ids: list[int], prompt_types: list[int], decay: float
    ) -> "Context":
        """The loss of a text's labels (B, L) and types (B, L), by default all of one example, after a prompt's.

        Each example's labels weigh `decay` times what those of the next do.
        """
        if types is not None and types.shape != labels.shape:
            raise ValueError(f"input_type_mask must be {tuple(labels.shape)}, as labels, got {tuple(types.shape)}")
        ids_of_prompt, types_of_prompt = tensor_on([prompt_ids, prompt_types], labels.device)
        types = torch.full_like(labels, 4) if types is None else types.to(labels)
        types = torch.where(types > 0, types + max(prompt_types), types)
        types = torch.cat([types_of_prompt.expand(len(types), -1), types], 1)  # (B, P+L)
        is_label = (types > 0) & (types % 4 == 0)
        is_label[:, 0] = False  # nothing predicts it
        # How many later examples there are.
        sorted_types, order = torch.where(is_label, types, 0).sort(1, descending=True)
        later = F.pad(sorted_types[:, 1:] != sorted_types[:, :-1], (1, 0)).cumsum(1)
        weights = torch.empty_like(later).scatter(1, order, later)
        first = len(prompt_ids)
        return cls(
            labels.masked_fill(~is_label[:, first:], NO_LABEL),
            ids_of_prompt.masked_fill(~is_label[0, :first], NO_LABEL)[1:],
            decay**weights,
        )


@dataclass(frozen=True, eq=False)
class ContextRows(HeadRows):
    """With the weights (M,) of the targets."""

    weights: Tensor | None = None


class ContextHead(CausalHead):
    """A head that is handed the prompt's rows as well; of them and the text it takes the loss that `context` says.

    The rows of a prompt run once for a batch, and count in every sample of it.
    """

    def __init__(self, *given, context: Context, **more) -> None:
        super().__init__(*given, **more)
        if self.label_smoothing:
            raise ValueError(f"label_smoothing must not be given with CPT's loss, got {self.label_smoothing}")
        if self.fused:
            raise ValueError("fused_lm_head must not be given with CPT's loss: TRL's counts no labels of the prompt")
        self.context, self.from_states = context, False

    def planned(self, packing: Packing, *given) -> dict[str, np.ndarray]:
        """As `CausalHead.planned`."""
        if packing.came_packed:
            raise ValueError(
                "samples that share a row are not for CPT's loss, which counts the prompt's labels by rows"
            )
        return super().planned(packing, *given)

    def rows(self, hidden: Tensor, text: Tensor, plan: Plan) -> ContextRows:
        """As `CausalHead.rows`, behind those of the prompt that predict its own tokens."""
        of_prompt, rows = len(self.context.of_prompt), super().rows(hidden, text, plan)
        weights = self.context.weights[:, of_prompt + 1 :].flatten().index_select(0, plan.targets)
        given = torch.cat([hidden[:, :of_prompt], rows.given], 1)
        return ContextRows(given, rows.targets, rows.predictors, weights=weights)

    def output(self, output, rows: ContextRows, tokens: int, padded):
        """As `CausalHead.output`; the loss is the mean of all that is predicted."""
        targets, weights = self.context.of_prompt, self.context.weights
        count = len(targets)
        of_prompt = _losses(output.logits[0, :count], targets)
        made = super().output(replace(output, logits=output.logits[:, count:]), rows, tokens, padded)
        total = made.loss + (of_prompt * weights[:, 1 : count + 1].sum(0)).sum()
        made.loss = total / ((rows.targets != NO_LABEL).sum() + len(weights) * (targets != NO_LABEL).sum())
        return made

    def _loss(self, rows: ContextRows, logits: Tensor) -> Tensor:
        """Of the text, summed."""
        return (_losses(logits, rows.targets) * rows.weights).sum()


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=NO_LABEL)
