"""The head of a sequence-to-sequence language model in a packed pass: logits, and the loss, where they are wanted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fastprompt.ops import linear_cross_entropy

from . import layout
from .layout import NO_LABEL, Packing
from .stacks import stand_in

_ZEROS = WeakIdKeyDictionary()  # of biases of logits, their version, and whether all are zero: read once for all steps


class Seq2SeqHead:
    """What one call hands to the head, and the loss of it.

    Where only a loss is wanted and the head is a frozen linear layer, it makes no logits: loss and gradient come from
    what it is handed, a piece of the vocabulary at a time.

    Args:
        model: the language model.
        labels: (B, L), -100 for none; or None.
        all_logits: whether the logits of all the decoder's rows are wanted.
        label_smoothing, num_items_in_batch: as transformers' Trainer counts them.
        packing: of the decoder's rows.
        values: (B, L), the labels on the host.
    """

    def __init__(
        self,
        model: nn.Module,
        labels: Tensor | None,
        all_logits: bool,
        label_smoothing: float,
        num_items_in_batch: Tensor | int | None,
        packing: Packing,
        values: np.ndarray | None,
    ) -> None:
        self.head, self.all_logits = model.get_output_embeddings(), all_logits
        self.label_smoothing, self.items = label_smoothing, num_items_in_batch
        self.rows = self.targets = self.states = None
        if labels is not None:
            labelled = np.flatnonzero(values.reshape(-1)[packing.index] != NO_LABEL)
            self.rows, places = layout.tensor_on(np.stack([labelled, packing.index[labelled]]), labels.device)
            self.targets = labels.flatten().index_select(0, places)
        plain = type(self.head) is nn.Linear and self.head.bias is None and not self.head.weight.requires_grad
        bias = getattr(model, "final_logits_bias", None)
        self.from_states = labels is not None and not all_logits and plain and (bias is None or _is_zero(bias))

    @contextmanager
    def reading(self, decoder: nn.Module, token_rows: Tensor | None = None) -> Iterator[None]:
        """For a while, the model hands to its head the rows that are wanted of what its decoder gives.

        Args:
            decoder: of the model.
            token_rows: (T,) the tokens' places among its rows; None: there are no others.
        """
        forward, rows = decoder.forward, None if self.all_logits else self.rows
        if token_rows is not None:
            rows = token_rows if rows is None else token_rows.index_select(0, rows)

        def picking(*args, **kwargs):
            output = forward(*args, **kwargs)
            if rows is not None:
                output.last_hidden_state = output.last_hidden_state.index_select(1, rows)
            return output

        def no_logits(states: Tensor) -> Tensor:
            self.states = states[0]  # as the head is given them: T5 scales them before
            return states.new_empty(1, 0, len(self.head.weight))

        with stand_in(decoder, picking), stand_in(self.head, no_logits) if self.from_states else nullcontext():
            yield

    def finish(self, output, padded: Callable[[Tensor], Tensor]) -> None:
        """Put the loss into the model's output, and logits where they are wanted, `padded` (T, V) -> (B, L, V)."""
        logits = output.logits[0]
        output.loss = None if self.targets is None else self._loss(logits)
        output.logits = padded(logits) if self.all_logits else None

    def _loss(self, logits: Tensor) -> Tensor:
        targets, options = self.targets, {"label_smoothing": self.label_smoothing}
        if self.from_states:
            weight = self.head.weight
            total = linear_cross_entropy(self.states.to(weight.dtype), weight, targets, **options)
        else:
            logits = logits.index_select(0, self.rows) if self.all_logits else logits
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            total = F.cross_entropy(logits, targets, reduction="sum", **options)
        items = len(targets) if self.items is None else self.items
        return total / (items.to(total.device) if isinstance(items, Tensor) else items)


def _is_zero(bias: Tensor) -> bool:
    """Whether a bias of logits, which a frozen model keeps, changes nothing."""
    version, is_zero = _ZEROS.get(bias, (None, None))
    if version != bias._version:  # it may have been loaded since
        is_zero = not layout.read({"final_logits_bias": bias})["final_logits_bias"].any()
        _ZEROS[bias] = bias._version, is_zero
    return is_zero
