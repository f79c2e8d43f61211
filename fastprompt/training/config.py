"""TrainingConfig: all that decides the result of a training run."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastprompt.models import PromptConfig
from fastprompt.nn import AlignmentLoss

from .encoding import POOLINGS


@dataclass(frozen=True)
class TrainingConfig:
    """Checked when made; what depends on the backbone and the sentences is checked by `train`.

    Attributes:
        kind, num_virtual_tokens, layers: as in `fastprompt.PromptConfig`.
        distance, temperature: of the alignment loss, as in `fastprompt.ops.alignment_loss`.
        pooling: a sentence's vector is the "mean" of its rows, its "first" row or its "last".
        prefix_text: put before each sentence, of either language.
        max_length: tokens of a sentence with the prefix text; what is longer is cut.
        epochs: passes over the pairs.
        batch_size: pairs of a step.
        max_tokens: instead of `batch_size`, the most rows of a step: tokens of its target sentences and the prompt's
            own rows. Each step then has as many pairs as that holds; see `TokenBudgetSampler`.
        cache_layers: where the first layers get no prefix, keep what they compute on disk and leave them out of every
            step. Results are those without, up to rounding.
        lr: learning rate of the prompt, and of the head where there are labels (AdamW).
        projection_lr: learning rate of the projection.
        seed: of the prompt's beginning and the order of the pairs.
    """

    kind: str = "prefix"
    num_virtual_tokens: int = 16
    layers: Sequence[int] | None = None
    distance: str = "infonce+cosine"
    temperature: float = 0.05
    pooling: str = "mean"
    prefix_text: str = ""
    max_length: int = 256
    epochs: int = 5
    batch_size: int = 16
    max_tokens: int | None = None
    cache_layers: bool = False
    lr: float = 1e-2
    projection_lr: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "lr", "projection_lr"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number, 0 or more, got {value!r}")
        self.prompt()
        AlignmentLoss(1, 1, distance=self.distance, temperature=self.temperature)
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {POOLINGS}, got {self.pooling!r}")
        for name in ("max_length", "epochs", "batch_size", "max_tokens"):
            value = getattr(self, name)
            if (name, value) != ("max_tokens", None) and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")

    def prompt(self) -> PromptConfig:
        """What the prompted backbone is made of."""
        return PromptConfig(self.kind, self.num_virtual_tokens, layers=self.layers)
