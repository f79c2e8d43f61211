"""Question answering with a causal model: the answer is what it writes after the question."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastprompt.ops import linear_cross_entropy
from fastprompt.tasks.metrics import mlqa_scores, squad_scores
from fastprompt.tasks.squad import Question

from .tasks import Item, Task


class GeneratedAnswers(Task):
    """Trains on the words of the first answer, and predicts by writing greedily up to the end of the line.

    Args:
        tokenizer: transformers' tokenizer.
        output: the weight (V, D) of the model's own head, a constant.
        metrics: "xquad" or "mlqa": whose rules score.
        max_length: tokens of an input with its answer. A context that is too long is cut, around the answer in training.
        max_new_tokens: of an answer.
    """

    metric = "f1"
    TEMPLATE = "{}\nQuestion: {}\nAnswer:"

    def __init__(
        self, tokenizer: Callable, output: Tensor, metrics: str, max_length: int, max_new_tokens: int = 32
    ) -> None:
        super().__init__()
        self.tokenizer, self.metrics = tokenizer, metrics
        self.max_length, self.max_new_tokens = max_length, max_new_tokens
        self.output = output
