"""The attention function that transformers' models call, and what one packed pass hands to it.

Registered as "fastprompt" in both of transformers' interfaces (with the first alone, padding would be ignored). A call
that carries no pass, such as stock training's, goes to transformers' own `sdpa`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastprompt.ops import prefix_attention

from ..generation import GenerationPass

NAME = "fastprompt"


@dataclass(frozen=True)
class PackedPass:
    """One packed pass through a backbone, handed to every attention layer as the keyword `fastprompt_pass`.

    Attributes:
        cu_seqlens: (S+1,) int32 bounds of the segments among the rows after the front.
        is_causal: rows see no later rows of their segment.
        prefix: layer index -> key and value, each (N, Hkv, P, D). A layer that is not in it has none.
        prefix_index: (S,) which entry of prefix or front each segment reads; None: the first.
        nothing: (N, Hkv, 0, D), the prefix of a layer that has none.
        front: entries N and rows F of each that stand once before all segments (causal models). Rows of an entry attend
            to its prefix and to each other; in every layer their keys and values go on where the prefix ends.
        front_bounds, front_entries: (N+1,) int32 bounds of the entries among the front's rows, and (N,) their numbers;
            None: there is one at most, without a prefix.
        prefix_in_window: the prefix slides out of a window.
        adapters: those that act in this pass, if any.
    """

    cu_seqlens: Tensor
    is_causal: bool
    prefix: dict[int, tuple[Tensor, Tensor]]
    prefix_index: Tensor | None
    nothing: Tensor
    front: tuple[int, int]
    front_bounds: Tensor | None
    front_entries: Tensor | None
    prefix_in_window: bool
    adapters: nn.ModuleList | None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        """query (R, H, D), key and value (R, Hkv, D), R = N F + T -> (R, H, D)."""
        options |= {"is_causal": self.is_causal, "prefix_in_window": self.prefix_in_window}
        # Under autocast the rotary embedding leaves float32 beside values of less.
        query, key = query.to(value.dtype), key.to(value.dtype)
        entries, rows = self.front
        if rows and entries == 1 and layer not in self.prefix:
            return prefix_attention(query, key, value, None, None, self.cu_seqlens, prompt_rows=rows, **options)
        index = self.prefix_index if rows or layer in self.prefix else None
        # It is kept in float32 where the backbone runs in less.
        prefix = tuple(x.to(key.dtype) for x in self.prefix.get(layer, (self.nothing, self.nothing)))
        if not rows:
            return prefix_attention(query, key, value, *prefix, self.cu_seqlens, prefix_index=index, **options)
        front = slice(None, entries * rows), slice(entries * rows, None)
        own = prefix_attention(
            *(x[front[0]] for x in (query, key, value)),
            *(*prefix, self.front_bounds),
            prefix_index=self.front_entries,
            **options,
        )
        bank = (
            torch.cat([p, x[front[0]].unflatten(0, (entries, rows)).transpose(1, 2)], 2)
            for p, x in zip(prefix, (key, value), strict=True)
        )
        text = prefix_attention(
            *(x[front[1]] for x in (query, key, value)),
            *(*bank, self.cu_seqlens),
            prefix_index=index,
            **options,
        )
        return torch.cat([own, text])

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, None]:
        """As the function of this name, of a batch (1, ..., R, D) that is packed; its mask is not read."""
        output = self.attend(
            module.layer_idx,
            *(x.squeeze(0).transpose(0, 1) for x in (query, key, value)),
            scale=scaling,
            window=sliding_window,
            softcap=softcap,
            dropout_p=dropout,
        )
        return output.unsqueeze(0), None


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
    fastprompt_pass: PackedPass | GenerationPass | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (B, H, L, D), key and value (B, Hkv, S, D) -> (B, L, H, D), None."""
    options = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
    if fastprompt_pass is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options, **kwargs)
    return fastprompt_pass.attention(module, query, key, value, attention_mask, **options)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
