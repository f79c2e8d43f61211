"""The attention function that transformers' models call, and what one packed pass hands to it.

Registered as "fastprompt" in both of transformers' interfaces (with the first alone, padding would be ignored). A call
that carries no packed pass, such as the teacher's or generate's, goes to transformers' own `sdpa`.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastprompt.ops import prefix_attention

NAME = "fastprompt"


@dataclass(frozen=True)
class PackedPass:
    """One packed pass through a backbone, handed to every attention layer as the keyword `fastprompt_pass`.

    Attributes:
        cu_seqlens: (S+1,) int32 bounds of the segments among the rows after the front.
        is_causal: rows see no later rows of their segment.
        prefix: layer index -> key and value, each (1, Hkv, P, D). A layer that is not in it has none.
        front: number of prompt rows that stand once before all segments (causal models); their keys and values in a
            layer are that layer's prefix for every segment.
        prefix_in_window: the prefix slides out of a window.
    """

    cu_seqlens: Tensor
    is_causal: bool
    prefix: dict[int, tuple[Tensor, Tensor]]
    front: int
    prefix_in_window: bool

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        """query (R, H, D), key and value (R, Hkv, D), R = front + T -> (R, H, D)."""
        prefix = None, None
        if not self.front:
            empty = key.new_empty(1, key.shape[1], 0, key.shape[2])
            # The prompt is kept in float32 where the backbone runs in less.
            prefix = (x.to(key.dtype) for x in self.prefix.get(layer) or (empty, empty))
        return prefix_attention(
            *(query, key, value, *prefix, self.cu_seqlens),
            prompt_rows=self.front,
            is_causal=self.is_causal,
            prefix_in_window=self.prefix_in_window,
            **options,
        )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    fastprompt_pass: PackedPass | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (B, H, L, D), key and value (B, Hkv, S, D) -> (B, L, H, D), None."""
    if fastprompt_pass is None:
        return sdpa_attention_forward(
            *(module, query, key, value, attention_mask),
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            softcap=softcap,
            **kwargs,
        )
    output = fastprompt_pass.attend(
        module.layer_idx,
        *(x.squeeze(0).transpose(0, 1) for x in (query, key, value)),
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
        dropout_p=dropout,
    )
    return output.unsqueeze(0), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
