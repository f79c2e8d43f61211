"""Question answering with a causal model: the answer is what it writes after the question."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastprompt.ops import linear_cross_entropy
from fastprompt.tasks.squad import Question

from .tasks import Item, Task


class GeneratedAnswers(Task):
    """Trains on the words of the first answer, and predicts by writing greedily up to the end of the line.

    Args:
        tokenizer: transformers' tokenizer.
        output: the weight (V, D) of the model's own head, a constant.
        metrics: "xquad" or "mlqa": whose rules score.
        max_length: tokens of an input with its answer. Of a context that is too long the end is cut.
        max_new_tokens: of an answer.
    """

    metric = "f1"

    def __init__(
        self, tokenizer: Callable, output: Tensor, metrics: str, max_length: int, max_new_tokens: int = 32
    ) -> None:
        super().__init__()
        self.tokenizer, self.metrics = tokenizer, metrics
        self.max_length, self.max_new_tokens = max_length, max_new_tokens
        self.register_buffer("output", output.detach(), persistent=False)

    def encode(self, examples: Sequence[Question]) -> list[Item]:
        items = []
        for question in examples:
            for answer in question.exact_answers[:1]:
                end = [*self._ids(f" {answer.text}\n", special=False)]
                ids = [*self._prompt(question, len(end)), *end]
                items.append(Item(ids, len(ids), len(end)))
        return items

    def _prompt(self, question: Question, room: int) -> list[int]:
        """Token ids of context and question that leave `room`: of a context that is too long, its beginning."""
        asked = self._ids(f"\nQuestion: {question.question}\nAnswer:", special=False)
        context = self._ids(question.context, special=True)
        return [*context[: max(1, self.max_length - room - len(asked))], *asked]

    def _ids(self, text: str, special: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def loss(self, hidden: Tensor, mask: Tensor, items: Sequence[Item]) -> Tensor:
        states, targets = [], []
        for row, item in zip(hidden, items, strict=True):
            length, answer = len(item.ids), item.target
            states.append(row[length - answer - 1 : length - 1])  # each row predicts the next token
            targets += item.ids[length - answer :]
        states = torch.cat(states).to(self.output.dtype)
        return linear_cross_entropy(states, self.output, torch.tensor(targets, device=hidden.device)) / len(targets)

    @torch.no_grad()
    def predict(self, model: Callable, examples: Sequence[Question], batch_size: int = 8) -> dict[str, str]: ...
