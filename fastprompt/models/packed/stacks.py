"""The encoder and the decoder of an encoder-decoder, each run over packed rows."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.models.mt5.modeling_mt5 import MT5Attention
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from fastprompt.ops import prefix_attention

from ..families import Geometry
from .layers import is_stock


@dataclass(frozen=True)
class StackPass:
    """One packed pass through a stack, handed to every attention layer as the keyword `fastprompt_pass`.

    Attributes:
        cu_seqlens: (S+1,) int32 bounds of the segments.
        max_seqlen: rows that no segment exceeds.
        is_causal: rows see no later rows of their segment.
        prefix: layer index -> key and value, each (N, H, P, D). A layer that is not in it has none.
        prompt_index: (S,) which prefix each segment reads; None: the first.
        nothing: (1, H, 0, D), the prefix of an attention that has none.
        relative_bias: layer index -> (H, R), see `fastprompt.ops.prefix_attention`. A layer that is not in it has none.
        cu_seqlens_k: (S+1,) int32 bounds of the segments that cross-attention reads; None in an encoder.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    is_causal: bool
    prefix: dict[int, tuple[Tensor, Tensor]]
    prompt_index: Tensor | None
    nothing: Tensor
    relative_bias: dict[int, Tensor]
    cu_seqlens_k: Tensor | None = None
    adapters: None = None

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        """query (T, H, D), key and value (T or Tk, H, D) -> (T, H, D), as self-attention or cross-attention does."""
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast they may differ
        none = self.nothing.to(value.dtype), self.nothing.to(value.dtype)
        if self.cu_seqlens_k is not None and not module.is_causal:
            bounds = {"cu_seqlens_k": self.cu_seqlens_k}
            return prefix_attention(query, key, value, *none, self.cu_seqlens, **bounds, **options)
        prefix, layer = self.prefix.get(module.layer_idx), module.layer_idx
        return prefix_attention(
            *(query, key, value),
            *(none if prefix is None else (x.to(value.dtype) for x in prefix)),
            self.cu_seqlens,
            prefix_index=None if prefix is None else self.prompt_index,
            is_causal=self.is_causal,
            relative_bias=self.relative_bias.get(layer),
            max_seqlen=self.max_seqlen,
            **options,
        )

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        """transformers' attention interface, of a batch (1, H, T, D) that is packed; mask and biases are the pass's."""
        packed = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        return self.attend(module, *packed, scale=scaling, dropout_p=dropout).unsqueeze(0), None


class Stack:
    """The encoder or the decoder of a model: its layers, and what it must be handed to run packed.

    Args:
        module: it.
        is_decoder: it is the decoder.
    """

    def __init__(self, module: nn.Module, is_decoder: bool) -> None:
        self.module, self.is_decoder = module, is_decoder
        self.is_relative = hasattr(module, "block")  # T5 and its kin
        self.layers = module.block if self.is_relative else module.layers
        attends = [layer.layer[0].SelfAttention if self.is_relative else layer.self_attn for layer in self.layers]
        self.attends, first, config = attends, attends[0], module.config
        self.embedding, self.positions = module.embed_tokens, getattr(module, "embed_positions", None)
        self.is_learned = isinstance(self.positions, nn.Embedding)  # and not sinusoidal, a table that grows
        self.geometry = Geometry(
            layers=len(self.layers),
            kv_heads=first.n_heads if self.is_relative else first.num_heads,
            head_dim=first.key_value_proj_dim if self.is_relative else first.head_dim,
            hidden=config.d_model,
            width=config.d_model,
            first_position=0,
            positions=config.max_position_embeddings if self.is_learned else None,
            is_causal=is_decoder,
            attends=(),
            sublayers=None,
        )

    def make_pass(
        self, cu_seqlens: Tensor, longest: int, prefix: dict, index: Tensor | None, keys: Tensor | None
    ) -> StackPass:
        """The pass over those segments; `keys` bounds those that cross-attention reads."""
        shape, weight = (1, self.geometry.kv_heads, 0, self.geometry.head_dim), self.embedding.weight
        bias = self._relative_bias() if self.is_relative else {}
        nothing = weight.new_empty(shape)
        return StackPass(cu_seqlens, longest, self.is_decoder, prefix, index, nothing, bias, cu_seqlens_k=keys)

    def _relative_bias(self) -> dict[int, Tensor]:
        """Layer index -> (H, R). All distances beyond the table's are in the bucket of its end."""
        tables, half = {}, self.attends[0].relative_attention_max_distance
        for index, attend in enumerate(self.attends):
            if attend.has_relative_attention_bias:  # T5 has one in the first layer, for all; UMT5 has one in each
                device = attend.relative_attention_bias.weight.device
                bias = attend.compute_bias(1, 2 * half + 1, device=device, past_seen_tokens=half)[0, :, 0]
            tables[index] = bias
        return tables

    def position_rows(self, positions: Tensor, cu_seqlens: Tensor, ids: Tensor | None, longest: int) -> Tensor | None:
        """(1, R, D), what the stack's table of positions gives the rows; None: it has none.

        Args:
            positions: (R,), of the rows in their segments, and what came before.
            cu_seqlens: (S+1,) bounds of the segments.
            ids: (R,) of tokens; where a table is told them, padding among them is not counted. None: all rows count.
            longest: number of positions.
        """
        table = self.positions
        if table is None:
            return None
        if self.is_learned:
            return nn.Embedding.forward(table, positions + table.offset).unsqueeze(0)
        if longest + table.padding_idx + 1 > len(table.weights):
            table.make_weights(longest + table.padding_idx + 1 + table.offset, table.embedding_dim, table.padding_idx)
        if ids is not None:
            counted = ids.ne(table.padding_idx).long()
            lost = (1 - counted).cumsum(0)  # up to and with each row
            firsts = torch.repeat_interleave(cu_seqlens[:-1].long(), cu_seqlens.diff(), output_size=len(ids))
            before = lost.index_select(0, firsts) - (1 - counted).index_select(0, firsts)
            positions = (positions - (lost - before) + 1) * counted - 1
        return table.weights.index_select(0, positions + table.padding_idx + 1).detach().unsqueeze(0)

    def placed(self, rows: Tensor | None) -> AbstractContextManager:
        """For a while, those rows are what its table of positions gives."""
        return nullcontext() if rows is None else stand_in(self.positions, lambda *args, **kwargs: rows)


@contextmanager
def stand_in(module: nn.Module, forward: Callable) -> Iterator[None]:
    """For a while, a module has that forward."""
    # Not a hook: replicas of a model share the dictionaries that hooks are kept in, and run at the same time.
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


class _RelativeAttention(nn.Module):
    """In a packed pass no bias is formed between all rows: the operator reads the table of distances."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple:
        own = kwargs.get("fastprompt_pass")
        if not isinstance(own, StackPass):
            return super().forward(hidden_states, *args, **kwargs)
        rows, others = hidden_states.squeeze(0), kwargs.get(self._of_others)
        others = rows if others is None else others.squeeze(0)
        query, key, value = (
            project(x).unflatten(1, (self.n_heads, self.key_value_proj_dim))
            for project, x in ((self.q, rows), (self.k, others), (self.v, others))
        )
        dropout = self.dropout if self.training else 0.0
        output = own.attend(self, query, key, value, scale=self.scaling, dropout_p=dropout)
        return (self.o(output.flatten(1)).unsqueeze(0), *self._rest)


class FusedT5Attention(_RelativeAttention, T5Attention):
    _of_others, _rest = "key_value_states", (None, None)


class FusedMT5Attention(_RelativeAttention, MT5Attention):
    _of_others, _rest = "key_value_states", (None, None)


class FusedUMT5Attention(_RelativeAttention, UMT5Attention):
    _of_others, _rest = "encoder_hidden_states", (None,)


FUSED = {T5Attention: FusedT5Attention, MT5Attention: FusedMT5Attention, UMT5Attention: FusedUMT5Attention}


def fuse_stack(stack: Stack) -> None:
    """Give what attends in a stack its packed forward, and its number: M2M100's encoder gives it none."""
    for module in stack.module.modules():
        if type(module) in FUSED and is_stock(module):
            module.__class__ = FUSED[type(module)]
    for index, attend in enumerate(stack.attends):
        attend.layer_idx = index
