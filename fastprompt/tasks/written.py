"""Text that a language model writes: the loss of what it is to write after a prompt, and what it writes."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastprompt.models.packed.layout import NO_LABEL, tensor_on
from fastprompt.models.packed.logits import capped, scale_and_cap
from fastprompt.models.packed.weights import has_plain_weight
from fastprompt.ops import linear_cross_entropy

from .base import InputConfig, Item, Model, Segments, by_length


def is_writer(backbone: nn.Module) -> bool:
    """Whether it is a language model with its head, one that writes: causal, or an encoder-decoder."""
    return getattr(backbone, "can_generate", lambda: False)() and backbone.get_output_embeddings() is not None


class Writer:
    """A language model that writes, for the tasks that it answers so.

    The `target` of its items: of a causal model how many tokens there are to write, the last ones of the input; of an
    encoder-decoder the tokens themselves.

    Args:
        backbone: a causal language model or an encoder-decoder, with its head.
        tokenizer: transformers' tokenizer.

    Attributes:
        own_pass: its loss is that of the model's own forward: of encoder-decoders, and of a causal model whose head is
            no linear layer, or between whose head and loss something stands that is not known.
    """

    def __init__(self, backbone: nn.Module, tokenizer: Callable) -> None:
        self.backbone, self.tokenizer = backbone, tokenizer
        self.is_encoder_decoder = bool(backbone.config.is_encoder_decoder)
        head = backbone.get_output_embeddings()
        plain = type(head) is nn.Linear and head.bias is None and has_plain_weight(head)
        self._is_tied = plain and head.weight is backbone.get_input_embeddings().weight
        self._scale_and_cap = None if self.is_encoder_decoder or not plain else scale_and_cap(backbone)
        self.own_pass = self._scale_and_cap is None

    @property
    def device(self) -> torch.device:
        return self.backbone.get_input_embeddings().weight.device

    @property
    def ends(self) -> list[int]:
        """The tokens that end a text."""
        own = self.backbone.generation_config.eos_token_id
        own = own if isinstance(own, list | tuple) else [own]
        return list(dict.fromkeys(each for each in (self.tokenizer.eos_token_id, *own) if each is not None))

    def ids(self, text: str) -> list[int]:
        """Token ids of a text on its own, without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def target(self, text: str) -> list[int]:
        """The tokens of a text that an encoder-decoder is to write, and of its end."""
        return self.ended(self.tokenizer(text_target=text)["input_ids"])

    def ended(self, ids: Sequence[int]) -> list[int]:
        """Tokens of a text with one that ends it, which its tokenizer, or a chat's template, may have put there."""
        return list(ids) if set(ids) & set(self.ends) else [*ids, *self.ends[:1]]

    @staticmethod
    def count(item: Item) -> int:
        """How many tokens there are to write."""
        return item.target if isinstance(item.target, int) else len(item.target)

    def loss(self, segments: Segments, items: Sequence[Item]) -> Tensor:
        """The sum of the losses of all tokens that are to be written, with the hidden states of a causal model."""
        rows, targets = [], []
        for end, item in zip(segments.bounds[1:], items, strict=False):
            rows += range(end - item.target - 1, end - 1)  # each row predicts the next token
            targets += item.ids[len(item.ids) - item.target :]
        rows, targets = tensor_on(np.array([rows, targets], dtype=np.int64), segments.hidden.device)
        states, weight = segments.hidden.index_select(0, rows), self.backbone.get_output_embeddings().weight
        weight = weight if self._is_tied else weight.detach()
        scale, softcap = self._scale_and_cap
        states = (states if scale == 1 else states * scale).to(weight.dtype)
        if not (weight.requires_grad and torch.is_grad_enabled()):
            return linear_cross_entropy(states, weight, targets, softcap=softcap)
        logits = states @ weight.T  # a head that is the embeddings, and trains
        logits = capped(logits.to(torch.promote_types(logits.dtype, torch.float32)), softcap)
        return nn.functional.cross_entropy(logits, targets, reduction="sum")

    def loss_alone(self, model: Model, items: Sequence[Item]) -> Tensor:
        """The same by the model's own forward."""
        labels = [item.target if self.is_encoder_decoder else _last_labels(item.ids, item.target) for item in items]
        batch = self._padded([item.ids for item in items], "right")
        labels = tensor_on(_rows(labels, NO_LABEL, "right"), self.device)
        return model.forward(**batch, labels=labels).loss * sum(map(self.count, items))  # it gives the mean

    def _padded(self, rows: Sequence[Sequence[int]], side: str) -> dict[str, Tensor]:
        mask = _rows([[1] * len(row) for row in rows], 0, side)
        ids, mask = tensor_on(np.stack([_rows(rows, self._pad, side), mask]), self.device)
        return {"input_ids": ids, "attention_mask": mask}

    @property
    def _pad(self) -> int:
        return self.tokenizer.pad_token_id or 0

    def write(
        self,
        model: Model,
        items: Sequence[Item],
        max_new_tokens: int,
        batch_size: int,
        on_batch: Callable[[int], None] | None,
        ends: Sequence[int] = (),
        min_new_tokens: int | None = None,
    ) -> list[str]:
        """What the model writes after each item's tokens, the likeliest token each time, up to an end of text.

        Args:
            model: the adapted backbone.
            items: prompts.
            max_new_tokens, min_new_tokens: the most and the fewest tokens of a text.
            batch_size, on_batch: as `Task.predict` takes them.
            ends: tokens that end a text, beside the usual ones.
        """
        ends = list(dict.fromkeys([*self.ends, *ends]))
        options = {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}
        options |= {"do_sample": False, "num_beams": 1}
        return self.generated(model, items, ends, batch_size, on_batch, **options)

    @torch.no_grad()
    def generated(
        self,
        model: Model,
        items: Sequence[Item],
        ends: Sequence[int],
        batch_size: int,
        on_batch: Callable[[int], None] | None = None,
        **options,
    ) -> list[str]:
        """The texts that transformers' generate writes with those options, up to the first of the tokens `ends`."""
        options = {"pad_token_id": self._pad, "eos_token_id": list(ends) or None} | options
        texts = [""] * len(items)
        for chosen in by_length([len(item.ids) for item in items], batch_size):
            # An encoder-decoder's text begins with a token of its own; its encoder has positions from the left.
            batch = self._padded([items[n].ids for n in chosen], "right" if self.is_encoder_decoder else "left")
            before = 1 if self.is_encoder_decoder else batch["input_ids"].shape[1]
            found = model.generate(**batch, **options)
            for n, row in zip(chosen, getattr(found, "sequences", found)[:, before:].tolist(), strict=True):
                length = next((place for place, token in enumerate(row) if token in ends), len(row))
                texts[n] = self.tokenizer.decode(row[:length], skip_special_tokens=True)
            if on_batch is not None:
                on_batch(len(chosen))
        return texts


def _last_labels(ids: Sequence[int], count: int) -> list[int]:
    return [NO_LABEL] * (len(ids) - count) + list(ids[len(ids) - count :])


def _rows(rows: Sequence[Sequence[int]], filler: int, side: str) -> np.ndarray:
    """(B, L) of rows of unlike length."""
    made = np.full((len(rows), max(map(len, rows))), filler, dtype=np.int64)
    for n, row in enumerate(rows):
        made[n, : len(row)] = row
        if side == "left":
            made[n] = np.roll(made[n], made.shape[1] - len(row))
    return made


def check_room(writer: Writer, inputs: InputConfig, max_new_tokens: int) -> None:
    """Raise a ValueError unless there is room for a prompt before what a causal model writes."""
    if not writer.is_encoder_decoder and max_new_tokens >= inputs.max_length:
        raise ValueError(
            f"max_new_tokens must be below max_length, {inputs.max_length}, which is of prompt and answer together, "
            f"got {max_new_tokens}"
        )
