"""PromptConfig: what kind of prompt, how long, where, and how it begins."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class PromptConfig:
    """Describes a soft prompt. Checked when made; what depends on the backbone is checked by `PromptModel`.

    Attributes:
        kind: "prefix" (trained keys and values in every layer) or "prompt" (trained rows before the input embeddings).
        num_virtual_tokens: P, at least 1.
        layers: for a prefix, the layers that get one (all if None); negative numbers count from the end. Of an
            encoder-decoder they are the decoder's, in its self-attention, as in PEFT; numbers that go on after them are
            the encoder's layers, which get one only if they are named here.
        init: "random"; "vocabulary": the embeddings (for a prefix: the keys and values the backbone makes) of token ids
            drawn at random; "text": those of `init_ids`, repeated or cut to P.
        init_ids: token ids of a text, for init "text".
        init_scale: standard deviation of init "random". None is 0.1 for a prefix (a tenth of PEFT's, which trains much
            better at the learning rates prompts need) and that of the word embeddings for a prompt; with an encoder it
            is of the encoder's input, and None is 1.
        position_offset: "peft": the tokens' positions start at P, as in PEFT; "none" (prefix only): at 0.
        prefix_in_window: under sliding-window attention the prefix slides out of view of late rows, as in PEFT; by
            default every row sees it.
        encoder: None; for a prompt "mlp" or "lstm", as P-tuning, for a prefix "mlp", as PEFT's prefix_projection: what
            trains is a small network and its input, of which the prompt is made once a step (`fastprompt.nn.encoders`).
        encoder_hidden_size: of its hidden layers; None: as wide as its input, as in PEFT.
        dropout: probability with which elements of the prompt rows, or of the prefix's keys and values, are dropped in
            training mode; one draw a step, for all samples.
        adapter_size: features of bottleneck adapters (`fastprompt.nn.Adapter`) after attention and after the
            feed-forward part of every layer, which train with the prompt. PEFT refuses a checkpoint with adapters.
        pools_prompt: of kind "prompt": over an encoder, a classification head and the pooler read the prompt's first
            row, as in PEFT, and as a checkpoint that PEFT wrote is loaded; by default they read the text's.
    """

    kind: str = "prefix"
    num_virtual_tokens: int = 16
    layers: Sequence[int] | None = None
    init: str = "random"
    init_ids: Sequence[int] | None = None
    init_scale: float | None = None
    position_offset: str = "peft"
    prefix_in_window: bool = False
    encoder: str | None = None
    encoder_hidden_size: int | None = None
    dropout: float = 0.0
    adapter_size: int | None = None
    pools_prompt: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("kind", ("prefix", "prompt")),
            ("init", ("random", "vocabulary", "text")),
            ("encoder", (None, "mlp", "lstm")),
            ("position_offset", ("peft", "none")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name, optional in (("num_virtual_tokens", False), ("encoder_hidden_size", True), ("adapter_size", True)):
            value = getattr(self, name)
            if not (optional and value is None) and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.kind == "prompt" and self.layers is not None:
            raise ValueError(f"layers is for kind 'prefix': a prompt enters at the input, got {self.layers!r}")
        if self.kind == "prompt" and self.position_offset == "none":
            raise ValueError("position_offset 'none' is for kind 'prefix': prompt rows take the first P positions")
        if not isinstance(self.pools_prompt, bool) or (self.pools_prompt and self.kind == "prefix"):
            raise ValueError(f"pools_prompt must be a bool, and False for kind 'prefix', got {self.pools_prompt!r}")
        if (self.init == "text") != (self.init_ids is not None):
            raise ValueError(f"init 'text' and init_ids go together, got init={self.init!r}, init_ids={self.init_ids}")
        if self.init_ids is not None and len(self.init_ids) == 0:
            raise ValueError("init_ids must hold at least one token id, got none")
        if self.init_scale is not None and not self.init_scale >= 0:
            raise ValueError(f"init_scale must not be negative, got {self.init_scale}")
        if self.encoder == "lstm" and self.kind == "prefix":
            raise ValueError("encoder 'lstm' is for kind 'prompt': a prefix has 'mlp', got kind 'prefix'")
        if self.encoder is not None and self.init != "random":
            raise ValueError(f"init must be 'random' with an encoder, which has its own input, got {self.init!r}")
        if self.encoder is None and self.encoder_hidden_size is not None:
            raise ValueError(f"encoder_hidden_size is for an encoder, got {self.encoder_hidden_size} without one")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
