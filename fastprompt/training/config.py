"""TrainingConfig: all that decides the result of a training run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastprompt._settings import check_fields
from fastprompt.models import PromptConfig
from fastprompt.nn import AlignmentLoss

from .encoding import POOLINGS


@dataclass(frozen=True)
class TrainingConfig:
    """Checked when made; what depends on the backbone and the sentences is checked by `train`.

    Attributes:
        kind, num_virtual_tokens, layers, position_offset: as in `fastprompt.PromptConfig`.
        init_text: the prompt begins as what the backbone makes of this text, repeated or cut to its length: its keys
            and values in each layer, or its embeddings. None: at random. With few sentences a text does much better.
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
    position_offset: str = "peft"
    init_text: str | None = None
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
        check_fields(TrainingConfig, vars(self))
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

    def prompt(self, tokenizer: Callable | None = None) -> PromptConfig:
        """What the prompted backbone is made of; the text it begins with needs the tokenizer."""
        return prompt_config(self, self.kind, tokenizer)


def prompt_config(config, kind: str, tokenizer: Callable | None, **more) -> PromptConfig:
    """The prompt that a run's configuration describes."""
    if config.init_text is not None and tokenizer is not None:
        ids = tokenizer(config.init_text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"init_text must have at least one token, got none in {config.init_text!r}")
        more |= {"init": "text", "init_ids": list(ids)}
    return PromptConfig(
        kind, config.num_virtual_tokens, layers=config.layers, position_offset=config.position_offset, **more
    )
