"""PromptInputs: what a packed forward takes of prompts."""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ..bottleneck import Adapters
from ..families import Geometry
from .layout import PromptRows


@dataclass(frozen=True, eq=False)
class PromptInputs:
    """The prompts that a batch reads: a `PromptModel` makes them; a packed forward, and `generate`, take them.

    Attributes:
        prefix: layer index -> key and value, each (N, Hkv, P, D): N prefixes. A layer that is not in it has none.
            An encoder-decoder's layers are the decoder's and, after them, the encoder's.
        prompt: (N, P, E), the rows of N prompts, to stand before the embeddings of texts; None: there are none.
        decoder_prompt: (N, P, E), of an encoder-decoder the rows before the embeddings that its decoder reads (`prompt`
            stands before the encoder's); None: there are none.
        index: (S,) integers on the host: which of the N each segment reads; None: all read the first.
        shared_ids: (L,) token ids of a text that all segments begin with, after the prompt (causal models only); None:
            there is none.
        position_offset: what is added to the tokens' positions.
        prefix_in_window: the prefix slides out of a window; see `fastprompt.ops.prefix_attention`.
        adapters: those of the backbone's layers that act, if any.
    """

    prefix: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    prompt: Tensor | None = None
    decoder_prompt: Tensor | None = None
    index: np.ndarray | None = None
    shared_ids: Tensor | None = None
    position_offset: int = 0
    prefix_in_window: bool = False
    adapters: Adapters | None = None

    @property
    def num_prompts(self) -> int:
        """N; 0 without prompts and prefixes."""
        if self.prompt is not None:
            return len(self.prompt)
        return len(next(iter(self.prefix.values()))[0]) if self.prefix else 0

    def rows(self, is_causal: bool) -> PromptRows:
        """The rows that they have in a packed pass."""
        shared = 0 if self.shared_ids is None else len(self.shared_ids)
        own = 0 if self.prompt is None else self.prompt.shape[1]
        # Prefixes hold different keys in every layer: each has rows of its own of the shared text.
        num_prompts = max(self.num_prompts, 1) if own + shared else 0
        return PromptRows(num_prompts, own + shared, is_causal, bool(self.prefix), self.position_offset + shared)

    def check(self, geometry: Geometry) -> None:
        """Raise a ValueError or IndexError for what does not fit a backbone."""
        if self.prefix:
            widest = geometry.kv_heads, geometry.head_dim
            for layer, (key, value) in self.prefix.items() if geometry.reads else [next(iter(self.prefix.items()))]:
                own = widest if geometry.reads is None or layer >= geometry.layers else geometry.reads[layer][1:]
                if key.shape == value.shape and key.ndim == 4 and (key.shape[1], key.shape[3]) in (widest, own):
                    continue
                raise ValueError(
                    f"prefix must have keys and values (N, {geometry.kv_heads}, P, {geometry.head_dim}), as the "
                    f"backbone's, got {tuple(key.shape)} and {tuple(value.shape)} in layer {layer}"
                )
            layers = geometry.layers + geometry.encoder_layers
            if not 0 <= min(self.prefix) <= max(self.prefix) < layers:
                raise ValueError(f"prefix must be of the backbone's {layers} layers, got {sorted(self.prefix)}")
        prompt, ids = self.prompt, self.shared_ids
        if prompt is not None and (prompt.ndim != 3 or prompt.shape[2] != geometry.hidden):
            raise ValueError(f"prompt must be (N, P, {geometry.hidden}), as the backbone's, got {tuple(prompt.shape)}")
        index, num_prompts = self.index, self.num_prompts
        if index is not None and index.size and not 0 <= index.min() <= index.max() < max(num_prompts, 1):
            raise IndexError(f"index must be in [0, {num_prompts}), got {index.min()} to {index.max()}")
        if ids is None:
            return
        if not geometry.is_causal:
            raise ValueError(
                "shared_prefix_ids is for causal models: where rows see later ones, each sentence has rows of its own"
            )
        if ids.ndim != 1 or len(ids) == 0:
            raise ValueError(f"shared_prefix_ids must be (S,) with S at least 1, got {tuple(ids.shape)}")
