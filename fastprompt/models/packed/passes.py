"""What one pass through a backbone hands to every attention layer, as the keyword `fastprompt_pass`."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from fastprompt.ops import prefix_attention


def stock_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    softcap: float | None = None,
    **options,
) -> tuple[Tensor, None]:
    """transformers' own attention: sdpa, which has no cap of the scores, or eager, which has."""
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if attention_mask is None:  # left out where it is causal and nothing is padded
        rows, columns = query.shape[2], key.shape[2]
        attention_mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
    if attention_mask.dtype == torch.bool:
        least = max(torch.finfo(query.dtype).min, torch.finfo(torch.float32).min)  # where its softmax is
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, least)
    output, _ = eager_attention_forward(module, query, key, value, attention_mask, softcap=softcap, **options)
    return output, None


@dataclass(frozen=True)
class PackedPass:
    """One packed pass through a backbone, handed to every attention layer as the keyword `fastprompt_pass`.

    In causal models the rows of a prompt lead: they stand once before all segments. Those of one prompt attend to its
    prefix and to each other; in every layer their keys and values go on where the prefix ends.

    Attributes:
        cu_seqlens: (S+1,) int32 bounds of the segments among the rows after the leading prompts.
        is_causal: rows see no later rows of their segment.
        prefix: layer index -> key and value, each (N, Hkv, P, D). A layer that is not in it has none.
        prompt_index: (S,) which prompt, and prefix, each segment reads; None: the first.
        nothing: (N, Hkv, 0, D), the prefix of a layer that has none.
        num_prompts, leading_rows: N leading prompts, and F rows of each; 0 rows if none leads.
        leading_bounds, leading_index: (N+1,) int32 bounds of the prompts among the leading rows, and (N,) their
            numbers; None: one leads at most, and has no prefix.
        prefix_in_window: the prefix slides out of a window.
        adapters: those that act in this pass, if any.
        max_seqlen: rows that no segment exceeds, known on the host; None: they are not, as in a graph for many batches.
        numbers: of the layers to come, where their modules do not know them.
    """

    cu_seqlens: Tensor
    is_causal: bool
    prefix: dict[int, tuple[Tensor, Tensor]]
    prompt_index: Tensor | None
    nothing: Tensor
    num_prompts: int
    leading_rows: int
    leading_bounds: Tensor | None
    leading_index: Tensor | None
    prefix_in_window: bool
    adapters: nn.ModuleList | None
    max_seqlen: int | None = None
    numbers: Iterator[int] | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        """query (R, H, D), key and value (R, Hkv, D), R = N F + T -> (R, H, D)."""
        options |= {"is_causal": self.is_causal, "prefix_in_window": self.prefix_in_window}
        if not self.is_causal and options.get("window") is not None:
            options["window"] -= 1  # transformers: fewer than that many rows apart, to both sides
        # Under autocast the rotary embedding leaves float32 beside values of less.
        query, key = query.to(value.dtype), key.to(value.dtype)
        num_prompts, rows, known = self.num_prompts, self.leading_rows, {"max_seqlen": self.max_seqlen}
        if rows and num_prompts == 1 and layer not in self.prefix:
            tensors = query, key, value, None, None, self.cu_seqlens
            return prefix_attention(*tensors, prompt_rows=rows, **known, **options)
        index = self.prompt_index if rows or layer in self.prefix else None
        nothing = self.nothing
        if nothing.shape[1] != key.shape[1] or nothing.shape[3] != key.shape[2]:  # a layer that is narrower than others
            nothing = nothing.new_empty(len(nothing), key.shape[1], 0, key.shape[2])
        # It is kept in float32 where the backbone runs in less.
        prefix = tuple(x.to(key.dtype) for x in self.prefix.get(layer, (nothing, nothing)))
        if not rows:
            tensors = query, key, value, *prefix, self.cu_seqlens
            return prefix_attention(*tensors, prefix_index=index, **known, **options)
        leading, text = slice(None, num_prompts * rows), slice(num_prompts * rows, None)
        of_prompts = prefix_attention(
            *(x[leading] for x in (query, key, value)),
            *(*prefix, self.leading_bounds),
            prefix_index=self.leading_index,
            **options,
        )
        bank = (
            torch.cat([p, x[leading].unflatten(0, (num_prompts, rows)).transpose(1, 2)], 2)
            for p, x in zip(prefix, (key, value), strict=True)
        )
        of_text = prefix_attention(
            *(x[text] for x in (query, key, value)),
            *(*bank, self.cu_seqlens),
            prefix_index=index,
            **known,
            **options,
        )
        return torch.cat([of_prompts, of_text])

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
        **others,
    ) -> tuple[Tensor, None]:
        """transformers' attention interface, of a batch (1, ..., R, D) that is packed; its mask is not read."""
        output = self.attend(
            module.layer_idx if self.numbers is None else next(self.numbers),
            *(x.squeeze(0).transpose(0, 1) for x in (query, key, value)),
            scale=scaling,
            window=sliding_window,
            softcap=softcap,
            dropout_p=dropout,
        )
        return output.unsqueeze(0), None


@dataclass(frozen=True)
class KeysPass:
    """One call of the base model on rows without a text, of which the keys and values are wanted.

    Attributes:
        adapters: those that act, if any.
        found: keys and values, each (N, Hkv, P, D), layer by layer.
    """

    adapters: nn.ModuleList | None = None
    found: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options
    ) -> tuple[Tensor, None]:
        """transformers' attention interface."""
        self.found.append((key, value))
        return stock_attention(module, query, key, value, attention_mask, **options)


@dataclass(frozen=True)
class GenerationPass:
    """One call of the base model within generate, handed to every attention layer as the keyword `fastprompt_pass`.

    Attributes:
        prefix: layer index -> key and value, each (N, Hkv, P, D). A layer that is not in it has none.
        prompt_index: (B',) which prefix each sample reads; None: the first. The batch may be a multiple of it, as beams
            make it: neighbours are of one sample.
        positions: (B or 1, L) the rows' places in their texts.
        prefix_in_window: the prefix slides out of a window.
        adapters: those that act, if any.
    """

    prefix: dict[int, tuple[Tensor, Tensor]]
    prompt_index: Tensor | None
    positions: Tensor | None
    prefix_in_window: bool
    adapters: nn.ModuleList | None

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
        **others,
    ) -> tuple[Tensor, None]:
        """transformers' attention interface, over the prefix and the cached text."""
        options = {"dropout": dropout, "scaling": scaling, "softcap": softcap}
        prefix = self.prefix.get(module.layer_idx)
        if prefix is not None:
            (samples, _, rows, _), cached = query.shape, key.shape[2]
            index = self.prompt_index
            if index is None:
                index = torch.zeros(1, dtype=torch.long, device=query.device)
            index = index.repeat_interleave(samples // len(index))
            key, value = (
                torch.cat([own[index].to(text.dtype), text], 2) for own, text in zip(prefix, (key, value), strict=True)
            )
            if attention_mask is None:  # transformers leaves it out where it is causal and nothing is padded
                attention_mask = torch.ones(1, 1, rows, cached, dtype=torch.bool, device=query.device)
                # A single row sees all; several begin the text, and a static cache has room behind them.
                attention_mask = attention_mask.tril(0 if rows > 1 else cached)
            seen = self._seen(rows, prefix[0].shape[2], sliding_window)
            if attention_mask.dtype != torch.bool:
                seen = torch.zeros_like(seen, dtype=attention_mask.dtype).masked_fill(
                    ~seen, torch.finfo(attention_mask.dtype).min
                )
            seen = seen.expand(max(len(seen), len(attention_mask)), -1, -1, -1)
            attention_mask = torch.cat([seen, attention_mask.expand(len(seen), -1, -1, -1)], 3)
        return stock_attention(module, query, key, value, attention_mask, **options)

    def _seen(self, rows: int, length: int, window: int | None) -> Tensor:
        """(B or 1, 1, rows, length), whether a row sees each position of the prefix."""
        positions = self.positions[:, None, :, None]
        place = torch.arange(-length, 0, device=positions.device)
        if window is None or not self.prefix_in_window:
            return torch.ones(1, 1, rows, length, dtype=torch.bool, device=positions.device)
        return positions - place < window
