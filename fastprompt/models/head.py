"""The head of a causal language model in a packed pass: logits, and the loss, where they are wanted."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from fastprompt.ops import linear_cross_entropy
from fastprompt.ops._checks import check_targets

from .packing import Packing


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

    def rows(self, hidden: Tensor, packing: Packing, ends: Tensor, entry: Tensor) -> Tensor:
        """The rows (1, R', D) of hidden (1, R, D) that the head is given.

        Args:
            ends: (N,) last rows of the N fronts that stand before the text. A segment's first token is predicted by its
                front's last row, as in PEFT; where there is no front, by nothing.
            entry: (T,) which front the segment of each token reads.
        """
        tokens = len(packing.index)
        text = hidden[:, hidden.shape[1] - tokens :]
        if self.labels is None:
            return text
        labels = self.labels.flatten()[packing.index]
        wanted, first = labels != -100, packing.positions == 0
        if len(ends) == 0:
            wanted = wanted & ~first
        row = torch.arange(tokens, device=labels.device)
        predictor = torch.where(first, entry, len(ends) + row - 1)[wanted]  # among the ends and then the text
        self.targets = labels[wanted]
        if self.all_logits:
            self.predictor = predictor
            return torch.cat([hidden[:, ends], text], 1)
        predicting = hidden[:, torch.cat([ends, row + hidden.shape[1] - tokens])[predictor]]
        if self.from_states:
            self.states = predicting[0]
            return hidden[:, :0]
        return predicting

    def output(self, output, packing: Packing):
        """The model's own output class, with the loss, and logits (B, L, V) where they are wanted."""
        logits = output.logits[0]
        if self.labels is None:
            return type(output)(logits=packing.unpack(logits), hidden_states=output.hidden_states)
        loss = self._loss(logits[self.predictor] if self.all_logits else logits)
        logits = packing.unpack(logits[len(logits) - len(packing.index) :]) if self.all_logits else None
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
