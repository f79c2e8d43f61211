"""PromptConfig: what kind of prompt, how long, where, and how it begins."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class PromptConfig:
    """Describes a soft prompt. Checked when made; what depends on the backbone is checked by `PromptModel`.

    Attributes:
        kind: "prefix" (trained keys and values in every layer) or "prompt" (trained rows before the input embeddings).
        num_virtual_tokens: P, at least 1.
        layers: for a prefix, the layers that get one (all if None); negative numbers count from the end.
        init: "random"; "vocabulary": the embeddings (for a prefix: the keys and values the backbone makes) of token ids
            drawn at random; "text": those of `init_ids`, repeated or cut to P.
        init_ids: token ids of a text, for init "text".
        init_scale: standard deviation of init "random". None is 0.1 for a prefix (a tenth of PEFT's, which trains much
            better at the learning rates prompts need) and that of the word embeddings for a prompt.
        position_offset: "peft": the tokens' positions start at P, as in PEFT; "none" (prefix only): at 0.
        prefix_in_window: under sliding-window attention the prefix slides out of view of late rows, as in PEFT; by
            default every row sees it.
    """

    kind: str = "prefix"
    num_virtual_tokens: int = 16
    layers: Sequence[int] | None = None
    init: str = "random"
    init_ids: Sequence[int] | None = None
    init_scale: float | None = None
    position_offset: str = "peft"
    prefix_in_window: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("kind", ("prefix", "prompt")),
            ("init", ("random", "vocabulary", "text")),
            ("position_offset", ("peft", "none")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if not isinstance(self.num_virtual_tokens, int) or self.num_virtual_tokens < 1:
            raise ValueError(f"num_virtual_tokens must be a positive integer, got {self.num_virtual_tokens!r}")
        if self.kind == "prompt" and self.layers is not None:
            raise ValueError(f"layers is for kind 'prefix': a prompt enters at the input, got {self.layers!r}")
        if self.kind == "prompt" and self.position_offset == "none":
            raise ValueError("position_offset 'none' is for kind 'prefix': prompt rows take the first P positions")
        if (self.init == "text") != (self.init_ids is not None):
            raise ValueError(f"init 'text' and init_ids go together, got init={self.init!r}, init_ids={self.init_ids}")
        if self.init_ids is not None and len(self.init_ids) == 0:
            raise ValueError("init_ids must hold at least one token id, got none")
        if self.init_scale is not None and not self.init_scale >= 0:
            raise ValueError(f"init_scale must not be negative, got {self.init_scale}")
