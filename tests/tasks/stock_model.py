"""tasks.base.Model over a plain transformers model: padded, one pass a batch, without a prompt."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastprompt.tasks.base import Item, Segments, Task

TAIL = 3  # rows of NaN behind the last input, which nothing may read


class StockModel:
    """What a task predicts with, of a model with or without a language-model head.

    Args:
        backbone: the model.
        tokenizer: for `vectors`.
    """

    def __init__(self, backbone: nn.Module, tokenizer: Callable | None = None) -> None:
        self.backbone, self.tokenizer = backbone, tokenizer
        self.batches: list[int] = []  # inputs of each pass

    def __call__(self, items: Sequence[Item]) -> Segments:
        self.batches.append(len(items))
        lengths = [len(item.ids) for item in items]
        ids = torch.zeros(len(items), max(lengths), dtype=torch.long)
        mask, kinds = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, item in enumerate(items):
            ids[row, : lengths[row]] = torch.tensor(item.ids)
            mask[row, : lengths[row]] = 1
            kinds[row, item.second :] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if getattr(self.backbone.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = kinds
        hidden = self.backbone.base_model(**inputs).last_hidden_state
        packed = [rows[:length] for rows, length in zip(hidden, lengths, strict=True)]
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        tail = hidden.new_full((TAIL, hidden.shape[-1]), torch.nan)
        return Segments(torch.cat([*packed, tail]), bounds, bounds.tolist())

    def generate(self, **inputs) -> Tensor:
        return self.backbone.generate(**inputs)

    def forward(self, **inputs):
        return self.backbone(**inputs)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts))["input_ids"]

    @torch.no_grad()
    def vectors(self, texts: Sequence[str], source: bool = False, batch_size: int = 32) -> Tensor:
        """(N, D) means of hidden states."""
        items = [Item(ids, len(ids)) for ids in self.tokenize(texts)]
        return self(items).pooled("mean").float()


def loss_without_values(task: Task, items: Sequence[Item], width: int) -> Tensor:
    """The loss of hidden states that have no values: whatever reads one of the device raises."""
    bounds = torch.tensor([0, *(len(item.ids) for item in items)]).cumsum(0).tolist()
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden = torch.empty(bounds[-1] + TAIL, width, requires_grad=True)
        loss = task.loss(Segments(hidden, torch.empty(len(bounds), dtype=torch.int32), bounds), items)
        loss.backward()
    return loss
