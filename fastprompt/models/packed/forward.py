"""One call of a PackedBackbone: what stands in for its base model's own forward."""

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fastprompt.ops import pack_prompt

from . import layout
from .head import CausalHead
from .layout import Packing, to_device
from .passes import PackedPass

if TYPE_CHECKING:
    from .backbone import PackedBackbone

# The stock arguments that a packed pass replaces. What else a head hands to its base model is passed on.
_REPLACED = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds", "past_key_values")
_SAMPLES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")  # of a batch that came packed

_SCALES = WeakIdKeyDictionary()  # of embeddings, by the tensor and the dtype of what is scaled: read once for all steps


class Call:
    """What goes into the base model and what comes out of it share this.

    What a step needs of a batch beside its tensors (places, positions, bounds) is made on the host, where the packing
    is, and brought to the device at once: the plan, by the names in `_planned`.
    """

    def __init__(
        self,
        owner: "PackedBackbone",
        packing: Packing,
        prefix: dict[int, tuple[Tensor, Tensor]],
        prompt: Tensor | None,
        prompt_index: np.ndarray | None,
        shared_ids: Tensor | None,
        position_offset: int,
        prefix_in_window: bool,
        adapters: nn.ModuleList | None,
    ) -> None:
        self.owner, self.packing, self.prefix, self.prompt = owner, packing, prefix, prompt
        self.prompt_index, self.shared_ids = prompt_index, shared_ids
        self.position_offset, self.prefix_in_window, self.adapters = position_offset, prefix_in_window, adapters
        self.head: CausalHead | None = None
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
        for name in _SAMPLES:
            given.pop(name, None)
        self._check_segments()
        batch = stock["input_ids"] if stock["input_ids"] is not None else stock["inputs_embeds"]
        self.plan = plan = to_device(self._planned(), batch.device)
        packed = {"position_ids": plan["positions"]}
        if stock["token_type_ids"] is not None:
            packed["token_type_ids"] = self._token_types(stock["token_type_ids"].expand(self.packing.shape))
        if self.states is not None:
            if len(self.states) != len(self.packing.index):
                raise ValueError(f"start must have the batch's {len(self.packing.index)} rows, got {len(self.states)}")
            packed["inputs_embeds"] = self.states
        elif self._before[1]:
            packed["inputs_embeds"] = self._embed(stock)
        else:
            packed["input_ids" if batch is stock["input_ids"] else "inputs_embeds"] = self._packed(batch)
        packed = {name: tensor.unsqueeze(0) for name, tensor in packed.items()}
        # A mask of four dimensions is taken by transformers as prepared: it builds none of its own.
        prepared = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.device)
        geometry, weight = self.owner.geometry, self.owner.base.get_input_embeddings().weight
        state = PackedPass(
            cu_seqlens=plan.get("segments_with_prompt", plan["cu_seqlens"]),
            is_causal=geometry.is_causal,
            prefix=self.prefix,
            prompt_index=plan.get("prompt_index"),
            nothing=weight.new_empty(max(self._leading[0], 1), geometry.kv_heads, 0, geometry.head_dim),
            num_prompts=self._leading[0],
            leading_rows=self._leading[1],
            leading_bounds=plan.get("leading_bounds"),
            leading_index=plan.get("leading_index"),
            prefix_in_window=self.prefix_in_window,
            adapters=self.adapters,
        )
        if "use_cache" in parameters:
            given["use_cache"] = False
        return given | packed | {"attention_mask": prepared, "fastprompt_pass": state}

    def _planned(self) -> dict[str, np.ndarray]:
        packing, (num_prompts, rows) = self.packing, self._before
        positions = self._positions() + (self.position_offset + self._shared_rows)
        planned = {"cu_seqlens": packing.cu_seqlens}
        if not packing.in_place:
            planned["index"] = packing.index
        if self.prompt_index is not None:
            planned["prompt_index"] = self.prompt_index
        first = self.owner.geometry.first_position
        if self._leading[1]:  # they stand once before all segments, at the positions before the text's
            last = self.position_offset + self._shared_rows + first
            positions = np.concatenate([np.tile(np.arange(last - rows, last), num_prompts), positions])
            if num_prompts > 1 or self.prefix:
                planned["leading_bounds"] = np.arange(0, num_prompts * rows + 1, rows, dtype=np.int32)
                planned["leading_index"] = np.arange(num_prompts)
        elif rows:  # in every segment, at positions 0..P-1
            begins = packing.cu_seqlens + rows * np.arange(packing.segments + 1)
            token_rows = np.arange(len(packing.index)) + (packing.segment + 1) * rows
            whole = np.empty(begins[-1], dtype=np.int64)
            whole[begins[:-1, None] + np.arange(rows)] = np.arange(rows) + first
            whole[token_rows] = positions
            positions = whole
            planned |= {"segments_with_prompt": begins.astype(np.int32), "token_rows": token_rows}
        planned["positions"] = positions
        pools = getattr(self.owner.base, "pooler", None) is not None
        if pools or self._replaces_first:
            firsts = packing.first_rows
            if self.pools_prompt:
                firsts = begins[:-1].astype(np.int64)
            elif rows and not self._leading[1]:
                firsts = token_rows[firsts]
            else:
                firsts = firsts + num_prompts * rows
            planned["firsts"] = firsts
        if self.head is not None:
            planned |= self.head.planned(packing, self._leading, self.prompt_index)
        return planned

    @property
    def _shared_rows(self) -> int:
        return 0 if self.shared_ids is None else len(self.shared_ids)

    @property
    def _before(self) -> tuple[int, int]:
        """Prompts, and rows of each, that stand before the text: once, or those of one in every segment."""
        if self.prompt is not None:
            return self.prompt.shape[0], self.prompt.shape[1] + self._shared_rows
        if self.shared_ids is None:
            return 0, 0
        # Prefixes of a bank hold different keys in every layer: each has the text's rows to itself.
        prefix = next(iter(self.prefix.values()), None)
        return 1 if prefix is None else len(prefix[0]), self._shared_rows

    @property
    def _leading(self) -> tuple[int, int]:
        """Prompts, and rows of each, that stand once before all segments."""
        return self._before if self.owner.geometry.is_causal else (0, 0)

    @property
    def _replaces_first(self) -> bool:
        """Heads that read the first column are to find there what it does not hold."""
        return self.owner.pools_first_row and (self.packing.left_padded or self.pools_prompt)

    def _positions(self) -> np.ndarray:
        """(T,) the tokens' positions as the backbone counts them, without a prompt."""
        packing, geometry = self.packing, self.owner.geometry
        first, longest, positions = geometry.first_position, packing.longest, packing.position_ids
        if positions is None or not len(positions):
            positions = packing.positions + first
        else:
            if first:  # a table with an offset: positions may be counted with it, or from 0 as collators do
                begins = positions[packing.positions == 0]
                if (begins == 0).all():
                    positions = positions + first
                elif not (begins == first).all():
                    raise ValueError(
                        f"position_ids must begin every sample at {first}, as the backbone's own do, or every one at "
                        f"0, got {sorted(set(begins.tolist()))}"
                    )
            longest = positions.max() + 1 - first
            if geometry.positions is not None and positions.min() < 0:
                raise ValueError(f"position_ids must not be negative, got {positions.min()}")
        table = geometry.positions
        if table is not None and longest + self.position_offset > table:
            raise ValueError(
                f"input_ids must have at most {table - self.position_offset} tokens a sentence: the position table has "
                f"{table} rows and the prompt takes {self.position_offset}, got {longest}"
            )
        return positions

    def _check_segments(self) -> None:
        segments = self.packing.segments
        if self.packing.came_packed and self.owner.one_result_a_row:
            raise ValueError(
                "samples that share a row are not for a head with one result a row, "
                f"{type(self.owner.model).__name__}: give each a row of its own, padded"
            )
        if self.prompt_index is not None and self.prompt_index.shape != (segments,):
            raise ValueError(f"prompt_ids must be ({segments},), one a sentence, got {self.prompt_index.shape}")

    def _packed(self, batch: Tensor) -> Tensor:
        """(B, L, ...) -> (T, ...)."""
        flat = batch.flatten(0, 1)
        return flat if self.packing.in_place else flat.index_select(0, self.plan["index"])

    def _token_types(self, types: Tensor) -> Tensor:
        """(R,), 0 for prompt rows."""
        types = self._packed(types)
        if not self._before[1]:
            return types
        return types.new_zeros(len(self.plan["positions"])).index_copy(0, self.plan["token_rows"], types)

    def _embed(self, stock: dict) -> Tensor:
        """(R, E): the prompt rows and the embeddings of the tokens."""
        embedding = self.owner.base.get_input_embeddings()
        if stock["input_ids"] is not None:
            table, ids, scale = embedding.weight, self._packed(stock["input_ids"]), _scale(embedding)
        else:
            table, ids, scale = stock["inputs_embeds"].flatten(0, 1), self.plan.get("index"), 1.0
            ids = torch.arange(len(table), device=table.device) if ids is None else ids
        rows = None if self.prompt is None else self.prompt.to(table.dtype)  # (N, P, E)
        if self._shared_rows:
            shared = embedding(self.shared_ids).to(table.dtype).expand(self._before[0], -1, -1)
            rows = shared if rows is None else torch.cat([rows, shared], 1)
        return pack_prompt(
            *(table, ids, self.plan["cu_seqlens"], rows),
            prompt_index=self.plan.get("prompt_index"),
            per_segment=not self.owner.geometry.is_causal,
            scale=scale,
        )

    # -- what comes out of it ------------------------------------------------------------------------------------

    def unpack(self, base: nn.Module, output):
        hidden = output.last_hidden_state  # (1, R, D)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(self.padded(self._tokens(state)) for state in output.hidden_states)
        pooler = getattr(base, "pooler", None)
        if pooler is not None:
            # It reads the first column, which left padding leaves empty: hand it each segment's first row.
            output.pooler_output = pooler(self._firsts(hidden).unsqueeze(1))
        if self.head is not None:
            output.last_hidden_state = self.head.rows(hidden, self._tokens(hidden), self.plan)
            return output
        padded = self.padded(self._tokens(hidden))  # (B, L, D)
        if self._replaces_first and padded.shape[1]:
            padded[:, 0] = self._firsts(hidden)  # such heads without a pooler read the first column themselves
        output.last_hidden_state = padded
        return output

    def padded(self, packed: Tensor) -> Tensor:
        """(T, ...) -> (B, L, ...), zero where the batch is padded."""
        shape = self.packing.shape
        if not self.packing.in_place:
            padded = packed.new_zeros(shape[0] * shape[1], *packed.shape[1:])
            packed = padded.index_copy(0, self.plan["index"], packed)
        return packed.unflatten(0, shape)

    def _firsts(self, hidden: Tensor) -> Tensor:
        """(1, R, D) -> (S, D): the row that stands for each segment where one is pooled."""
        return hidden[0].index_select(0, self.plan["firsts"])

    def _tokens(self, hidden: Tensor) -> Tensor:
        """(1, R, D) -> (T, D), without prompt rows."""
        rows = self.plan.get("token_rows")
        return hidden[0, math.prod(self._leading) :] if rows is None else hidden[0].index_select(0, rows)


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


def _scale(embedding: nn.Module) -> float:
    """Of its rows, rounded as the model rounds it: Gemma's is 33.94 in float32 and 34 in bfloat16."""
    scale, dtype = getattr(embedding, "embed_scale", 1.0), embedding.weight.dtype
    if not isinstance(scale, Tensor):
        return float(scale)
    known = _SCALES.setdefault(scale, {})
    if dtype not in known:
        value = layout.read({"embed_scale": scale})["embed_scale"].item()
        known[dtype] = torch.tensor(value, dtype=dtype, device="cpu").item()
    return known[dtype]
