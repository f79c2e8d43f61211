"""PrefixAttention: the attention of a layer of one's own, with a trained prefix."""

import torch
from torch import Tensor, nn

from fastprompt.ops import prefix_attention


class PrefixAttention(nn.Module):
    """Softmax attention over given queries, keys and values and over a bank of trained keys and values.

    It stands where a model calls `scaled_dot_product_attention`; the projections before and after stay the model's own.
    See `fastprompt.ops.prefix_attention` for the formula and the options.

    Args:
        heads, kv_heads, head_dim: H, Hkv and D; H a multiple of Hkv.
        num_virtual_tokens: P, 0 or more.
        num_prefixes: N, prefixes in the bank.
        init_scale: standard deviation that the prefixes begin with.
        is_causal, scale, window, softcap, prefix_in_window: as in `fastprompt.ops.prefix_attention`.
        dropout_p: probability with which attention weights are dropped in training.

    Attributes:
        prefix_key, prefix_value: (N, Hkv, P, D) Parameters.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        num_virtual_tokens: int,
        *,
        num_prefixes: int = 1,
        init_scale: float = 0.1,
        is_causal: bool = False,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        prefix_in_window: bool = False,
        dropout_p: float = 0.0,
    ) -> None:
        super().__init__()
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
        if num_virtual_tokens < 0 or num_prefixes < 1:
            raise ValueError(
                "num_virtual_tokens must be 0 or more and num_prefixes 1 or more, "
                f"got {num_virtual_tokens} and {num_prefixes}"
            )
        shape = num_prefixes, kv_heads, num_virtual_tokens, head_dim
        self.prefix_key = nn.Parameter(torch.randn(shape) * init_scale)
        self.prefix_value = nn.Parameter(torch.randn(shape) * init_scale)
        self.heads, self.dropout_p = heads, dropout_p
        self.options = dict(
            is_causal=is_causal, scale=scale, window=window, softcap=softcap, prefix_in_window=prefix_in_window
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prefix_index: Tensor | None = None,
        relative_bias: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (T, H, D) with `cu_seqlens`, else (B, L, H, D).
            key, value: the same with Hkv heads.
            cu_seqlens: (B+1,) int32 bounds of packed segments.
            attention_mask: (B, L) for a padded batch, nonzero where a token is; elsewhere the output is zero.
            prefix_index: (B,) which prefix each segment or sample reads; the first if None.
            relative_bias: (H, R), frozen, of scores by distance. A padded batch's positions count its tokens alone.
            cu_seqlens_k: (B+1,) int32 bounds of the keys' segments in cross-attention, only with `cu_seqlens`.

        Returns:
            Like query.

        Raises:
            ValueError: a shape that does not fit.
        """
        packed = cu_seqlens is not None
        if query.ndim != (3 if packed else 4) or (packed and attention_mask is not None):
            raise ValueError(
                "query must be (T, H, D) with cu_seqlens or (B, L, H, D) without; attention_mask is for the second, "
                f"got {tuple(query.shape)}"
            )
        if query.shape[-2] != self.heads:
            raise ValueError(f"query must have {self.heads} heads, got {query.shape[-2]}")
        if cu_seqlens_k is not None and not packed:
            raise ValueError("cu_seqlens_k needs cu_seqlens: cross-attention takes packed rows, got cu_seqlens=None")
        rows, index = (query, key, value), None
        if not packed:
            batch, length = query.shape[:2]
            rows = tuple(x.flatten(0, 1) for x in rows)
            if attention_mask is None:
                cu_seqlens = (length * torch.arange(batch + 1, device=query.device)).to(torch.int32)
            else:
                if attention_mask.shape != (batch, length):
                    raise ValueError(
                        f"attention_mask must be {(batch, length)}, as the batch, got {tuple(attention_mask.shape)}"
                    )
                valid = attention_mask != 0
                cu_seqlens = nn.functional.pad(valid.sum(1).cumsum(0), (1, 0)).to(torch.int32)
                index = valid.flatten().nonzero().squeeze(1)
                rows = tuple(x[index] for x in rows)
        out = prefix_attention(
            *rows,
            *(x.to(query.dtype) for x in (self.prefix_key, self.prefix_value)),
            cu_seqlens,
            prefix_index=prefix_index,
            relative_bias=relative_bias,
            cu_seqlens_k=cu_seqlens_k,
            dropout_p=self.dropout_p if self.training else 0.0,
            **self.options,
        )
        if index is not None:
            out = out.new_zeros(query.shape).flatten(0, 1).index_copy(0, index, out)
        return out if packed else out.unflatten(0, query.shape[:2])

    def extra_repr(self) -> str:
        prefixes, kv_heads, tokens, head_dim = self.prefix_key.shape
        return f"{self.heads}, {kv_heads}, {head_dim}, {tokens}, num_prefixes={prefixes}"
