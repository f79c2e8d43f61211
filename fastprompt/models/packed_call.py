"""One call of a PackedBackbone: what stands in for its base model's own forward."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastprompt.ops import pack_prompt

from .attention import PackedPass
from .head import CausalHead
from .packing import Packing

if TYPE_CHECKING:
    from .packed import PackedBackbone

# The stock arguments that a packed pass replaces. What else a head hands to its base model is passed on.
_REPLACED = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds", "past_key_values")
_SAMPLES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")  # of a batch that came packed


class Call:
    """What goes into the base model and what comes out of it share this."""

    def __init__(
        self,
        owner: "PackedBackbone",
        prefix: dict[int, tuple[Tensor, Tensor]],
        prompt: Tensor | None,
        prompt_index: Tensor | None,
        shared_ids: Tensor | None,
        position_offset: int,
        prefix_in_window: bool,
        adapters: nn.ModuleList | None,
    ) -> None:
        self.owner, self.prefix, self.prompt = owner, prefix, prompt
        self.prompt_index, self.shared_ids = prompt_index, shared_ids
        self.position_offset, self.prefix_in_window, self.adapters = position_offset, prefix_in_window, adapters
        self.head: CausalHead | None = None
        self.front = 0, 0  # entries, and rows of each, that stand once before all segments
        self.states: Tensor | None = None  # (T, D) to start from above the embedding
        self.pools_prompt = False

    def run(self, inputs: dict, model: nn.Module | None = None):
        # Not hooks: replicas of a model share the dictionaries that hooks are kept in, and run at the same time.
        base = self.owner.base
        forward, own = base.forward, base.__dict__.get("forward")
        base.forward = lambda *args, **kwargs: self.unpack(base, forward(**self.pack(args, kwargs)))
        try:
            return (self.owner.model if model is None else model)(**inputs)
        finally:
            if own is None:
                del base.forward
            else:
                base.forward = own

    # -- what goes into the base model ---------------------------------------------------------------------------

    def pack(self, args: tuple, kwargs: dict) -> dict:
        parameters = _parameters(type(self.owner.base).forward)
        given = dict(zip(parameters, args, strict=False)) | kwargs
        stock = {name: given.pop(name, None) for name in _REPLACED}
        samples = {name: given.pop(name, None) for name in _SAMPLES}
        self.packing = packing = _packing(stock, samples["cu_seq_lens_q"], samples["seq_idx"])
        self._check_segments(packing)
        positions = self._positions(stock["position_ids"])
        packed = {"position_ids": positions + self.position_offset + self._shared_rows}
        if stock["token_type_ids"] is not None:
            packed["token_type_ids"] = stock["token_type_ids"].expand(packing.shape).flatten()[packing.index]
        cu_seqlens = packing.cu_seqlens
        if self.states is not None:
            if len(self.states) != len(packing.index):
                raise ValueError(f"start must have the batch's {len(packing.index)} rows, got {len(self.states)}")
            packed["inputs_embeds"] = self.states
        elif self.prompt is not None or self._shared_rows:
            packed["inputs_embeds"] = self._embed(stock, packed)
            if not self.owner.geometry.is_causal:
                cu_seqlens = self.segments_with_prompt
        elif stock["input_ids"] is not None:
            packed["input_ids"] = stock["input_ids"].flatten()[packing.index]
        else:
            packed["inputs_embeds"] = stock["inputs_embeds"].flatten(0, 1)[packing.index]
        packed = {name: tensor.unsqueeze(0) for name, tensor in packed.items()}
        # A mask of four dimensions is taken by transformers as prepared: it builds none of its own.
        prepared = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=packing.index.device)
        state = PackedPass(
            cu_seqlens,
            self.owner.geometry.is_causal,
            self.prefix,
            self.prompt_index,
            self.front,
            self.prefix_in_window,
            self.adapters,
        )
        if "use_cache" in parameters:
            given["use_cache"] = False
        return given | packed | {"attention_mask": prepared, "fastprompt_pass": state}

    @property
    def _shared_rows(self) -> int:
        return 0 if self.shared_ids is None else len(self.shared_ids)

    def _positions(self, ids: Tensor | None) -> Tensor:
        """(T,) the tokens' positions as the backbone counts them, without a prompt."""
        packing, geometry = self.packing, self.owner.geometry
        first, longest = geometry.first_position, packing.longest
        positions = packing.positions + first
        if ids is not None and len(packing.index):
            positions = ids.expand(packing.shape).flatten()[packing.index].long()
            if first:  # a table with an offset: positions may be counted with it, or from 0 as collators do
                begins = positions[packing.positions == 0]
                if bool((begins == 0).all()):
                    positions = positions + first
                elif not bool((begins == first).all()):
                    raise ValueError(
                        f"position_ids must begin every sample at {first}, as the backbone's own do, or every one at "
                        f"0, got {sorted(set(begins.tolist()))}"
                    )
            longest = int(positions.max()) + 1 - first
            if geometry.positions is not None and int(positions.min()) < 0:
                raise ValueError(f"position_ids must not be negative, got {int(positions.min())}")
        table = geometry.positions
        if table is not None and longest + self.position_offset > table:
            raise ValueError(
                f"input_ids must have at most {table - self.position_offset} tokens a sentence: the position table has "
                f"{table} rows and the prompt takes {self.position_offset}, got {longest}"
            )
        return positions

    def _check_segments(self, packing: Packing) -> None:
        if packing.came_packed and self.owner.one_result_a_row:
            raise ValueError(
                "samples that share a row are not for a head with one result a row, "
                f"{type(self.owner.model).__name__}: give each a row of its own, padded"
            )
        segments = len(packing.cu_seqlens) - 1
        if self.prompt_index is not None and self.prompt_index.shape != (segments,):
            raise ValueError(f"prompt_ids must be ({segments},), one a sentence, got {tuple(self.prompt_index.shape)}")

    def _embed(self, stock: dict, packed: dict) -> Tensor:
        """(R, E): the prompt rows and the embeddings of the tokens. Gives the prompt rows their places in `packed`."""
        packing, embedding = self.packing, self.owner.base.get_input_embeddings()
        scale = getattr(embedding, "embed_scale", 1.0)
        # The scale rounded as the model rounds it: Gemma's is 33.94 in float32 and 34 in bfloat16.
        scale = float(scale.to(embedding.weight.dtype)) if isinstance(scale, Tensor) else float(scale)
        if stock["input_ids"] is not None:
            table, ids = embedding.weight, stock["input_ids"].flatten()[packing.index]
        else:
            table, ids, scale = stock["inputs_embeds"].flatten(0, 1), packing.index, 1.0
        rows = None if self.prompt is None else self.prompt.to(table.dtype)  # (N, P, E)
        if self._shared_rows:
            shared = embedding(self.shared_ids).to(table.dtype)
            # Entries of a prefix bank read different keys in every layer: each has the text's rows to itself.
            entries = len(rows) if rows is not None else len(next(iter(self.prefix.values()), (shared[None],))[0])
            shared = shared.expand(entries, -1, -1)
            rows = shared if rows is None else torch.cat([rows, shared], 1)
        if self.owner.geometry.is_causal:
            self._place_front(packed, *rows.shape[:2])
        else:
            self._place_in_segments(packed, rows.shape[1])
        return pack_prompt(
            *(table, ids, packing.cu_seqlens, rows),
            prompt_index=self.prompt_index,
            per_segment=not self.owner.geometry.is_causal,
            scale=scale,
        )

    def _place_front(self, packed: dict, entries: int, rows: int) -> None:
        """Positions of rows that stand once before all segments: those before the text's."""
        self.front = entries, rows
        last = self.position_offset + self._shared_rows + self.owner.geometry.first_position
        own = torch.arange(last - rows, last, device=self.packing.index.device)
        packed["position_ids"] = torch.cat([own.repeat(entries), packed["position_ids"]])

    def _place_in_segments(self, packed: dict, prompt_rows: int) -> None:
        """Positions (0..P-1) and token types (0) of prompt rows that stand in every segment."""
        packing, device = self.packing, self.packing.index.device
        own = torch.arange(prompt_rows, device=device) + self.owner.geometry.first_position
        rows = {"position_ids": own, "token_type_ids": torch.zeros_like(own)}
        segments = len(packing.cu_seqlens) - 1
        self.token_rows = torch.arange(len(packing.index), device=device) + (packing.segment + 1) * prompt_rows
        begins = packing.cu_seqlens + torch.arange(segments + 1, device=device) * prompt_rows
        prompt_index = (begins[:-1, None] + torch.arange(prompt_rows, device=device)).flatten()
        for name in rows.keys() & packed.keys():
            whole = packed[name].new_empty(int(segments * prompt_rows) + len(packing.index))
            whole[self.token_rows] = packed[name]
            whole[prompt_index] = rows[name].repeat(segments)
            packed[name] = whole
        self.segments_with_prompt = begins.to(torch.int32)

    # -- what comes out of it ------------------------------------------------------------------------------------

    def unpack(self, base: nn.Module, output):
        hidden = output.last_hidden_state  # (1, R, D)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(self.packing.unpack(self._tokens(state)) for state in output.hidden_states)
        pooler = getattr(base, "pooler", None)
        if pooler is not None:
            # It reads the first column, which left padding leaves empty: hand it each segment's first row.
            output.pooler_output = pooler(self._first(hidden).unsqueeze(1))
        if self.head is not None:
            entries, rows = self.front
            ends = torch.arange(entries, device=hidden.device) * rows + rows - 1
            entry = torch.zeros_like(self.packing.index)
            if self.prompt_index is not None:
                entry = self.prompt_index.to(entry)[self.packing.segment]
            output.last_hidden_state = self.head.rows(hidden, self.packing, ends, entry)
            return output
        padded = self.packing.unpack(self._tokens(hidden))  # (B, L, D)
        if self.owner.pools_first_row and (self.packing.left_padded or self.pools_prompt) and padded.shape[1]:
            padded[:, 0] = self._first(hidden)  # such heads without a pooler read the first column themselves
        output.last_hidden_state = padded
        return output

    def _first(self, hidden: Tensor) -> Tensor:
        """(1, R, D) -> (S, D): the row that stands for each segment where one is pooled."""
        if self.pools_prompt:
            return hidden[0, self.segments_with_prompt[:-1].long()]
        return self._tokens(hidden)[self.packing.first_rows]

    def _tokens(self, hidden: Tensor) -> Tensor:
        """(1, R, D) -> (T, D), without prompt rows."""
        if self.prompt is not None and not self.owner.geometry.is_causal:
            return hidden[0, self.token_rows]
        entries, rows = self.front
        return hidden[0, entries * rows :]


class StandIn(nn.Module):
    """In place of some layers: passes on the hidden states it is given or, if it has none, those that come first."""

    def __init__(self, states: Tensor | None) -> None:
        super().__init__()
        self.states = states

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if self.states is None:
            self.states = hidden_states
        return self.states


@cache
def _parameters(forward: Callable) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]  # without self


def _packing(stock: dict, cu_seqlens: Tensor | None, seq_idx: Tensor | None) -> Packing:
    batch = stock["input_ids"] if stock["input_ids"] is not None else stock["inputs_embeds"]
    mask = stock["attention_mask"]
    everything = torch.ones(batch.shape[:2], dtype=torch.bool, device=batch.device) if mask is None else mask
    return Packing.of_batch(everything, stock["position_ids"], cu_seqlens, seq_idx, masked=mask is not None)
