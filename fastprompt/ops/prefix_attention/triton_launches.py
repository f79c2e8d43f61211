"""The launches of the Triton kernels of prefix attention, for the backends that use them.

All follow from shapes; no value on the device is read on the host.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastprompt.ops._triton import block_of, cdiv, precision, readable

from . import triton_backward as backward_kernels
from . import triton_kernels as forward_kernels
from . import triton_prefix as prefix_kernels

LARGEST_HEAD = 256

# (rows, columns, warps, stages) at most, by kernel and padded head dimension: what keeps all in registers. Of a product
# the left side (rows; columns in "columns") must be 64 high to run on Hopper's warp groups.
CONFIGURATIONS = {
    "forward": {64: (64, 64, 4, 3), 128: (64, 32, 4, 3), 256: (64, 32, 8, 2)},
    "query": {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (64, 16, 8, 2)},
    "columns": {64: (32, 64, 4, 3), 128: (32, 64, 8, 2), 256: (16, 64, 8, 2)},
}
# float32 products run on the plain cores and hold twice the bytes.
FLOAT32_CONFIGURATIONS = {
    "forward": {64: (32, 16, 4, 1), 128: (32, 16, 8, 1), 256: (16, 16, 4, 1)},
    "query": {64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (16, 16, 4, 1)},
    "columns": {64: (32, 32, 4, 1), 128: (16, 32, 8, 1), 256: (16, 16, 4, 1)},
}
DELTA_ROWS = 32
MULTIPROCESSORS = 132  # an H100's, where there is no device to ask
SUMMED = dict(SPLITS=16, COLUMNS=128)  # the tile of partial sums that is added up at once


class Options(NamedTuple):
    """What a call says beside its tensors."""

    is_causal: bool
    scale: float
    window: int | None
    softcap: float | None
    prefix_in_window: bool
    dropout_p: float
    prompt_rows: int

    @property
    def reach(self) -> int | None:
        """How far behind a row the last column lies that it sees."""
        return self.window - 1 if self.window is not None and self.is_causal else self.window

    @property
    def prefix_reach(self) -> int | None:
        """The same of columns of the prefix."""
        return self.reach if self.prefix_in_window else None


class Tensors(NamedTuple):
    """Of a call, as the kernels read them: the bank is the prompt's rows, where they are its prefix."""

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    cu_seqlens: Tensor
    prefix_index: Tensor | None
    seed: Tensor | None
    relative_bias: Tensor | None
    cu_seqlens_k: Tensor | None

    @property
    def floats(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self[:5]

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    def segments(self, prompt_rows: int) -> int:
        return self.cu_seqlens.shape[0] - (prompt_rows == 0)  # the prompt's rows are one more

    @property
    def bias_columns(self) -> int | None:
        return None if self.relative_bias is None else self.relative_bias.shape[1]

    def typical(self, segments: int) -> tuple[int, int]:
        """The mean segment's keys, and its rows in a tile: one per token and query head of a group."""
        keys, tokens = (max(1, cdiv(x.shape[0], max(1, segments))) for x in (self.key, self.query))
        return keys, tokens * self.group


def tensors_of(
    query,
    key,
    value,
    prefix_key,
    prefix_value,
    cu_seqlens,
    prefix_index,
    seed,
    prompt_rows,
    relative_bias=None,
    cu_seqlens_k=None,
) -> Tensors:
    query, key, value = (_readable(x) for x in (query, key, value))
    if prompt_rows:
        prefix_key, prefix_value = (x[:prompt_rows].transpose(0, 1).unsqueeze(0) for x in (key, value))
    bank = (_readable(x) for x in (prefix_key, prefix_value))
    return Tensors(query, key, value, *bank, cu_seqlens, prefix_index, seed, relative_bias, cu_seqlens_k)


def _readable(x: Tensor) -> Tensor:
    """As the kernels read: they count what lies between the heads of a row in 32 bits."""
    x = readable(x)
    return x.contiguous() if x.shape[1] * x.stride(1) >= 2**31 else x


def _strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(x.stride()[:-1] for x in tensors)


def _or_none(places: Tensor) -> Tensor | None:
    return places if len(places) else None


def configuration(kernel: str, features: int, dtype: torch.dtype, rows: int, columns: int) -> dict[str, int]:
    """Tile sizes and launch options.

    Args:
        kernel: "forward", "query" or "columns".
        features: D.
        rows, columns: how many rows and columns a tile can typically fill: larger ones would compute on padding.
    """
    block = block_of(features)
    table = (FLOAT32_CONFIGURATIONS if dtype == torch.float32 else CONFIGURATIONS)[kernel]
    most_rows, most_columns, warps, stages = table[max(64, block)]
    tile_rows = min(most_rows, block_of(rows))
    tile_columns = min(most_columns, block_of(columns))
    owned, most_owned = (tile_columns, most_columns) if kernel == "columns" else (tile_rows, most_rows)
    least = max(block // 64, 2 if kernel == "columns" else 1)  # a tile that stays has two sums there
    warps = max(least, warps * owned // most_owned)  # they share its sums
    return dict(
        FEATURES=features,
        FEATURES_BLOCK=block,
        ROWS=tile_rows,
        COLUMNS=tile_columns,
        num_warps=warps,
        num_stages=stages,
    )


@cache
def programs(device: torch.device) -> int:
    """Of the prefix's gradient: two for each multiprocessor, each with its own partial sum."""
    if device.type != "cuda":
        return 2 * MULTIPROCESSORS
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def places_like(
    query: Tensor,
    prefix_index: Tensor | None,
    window: int | None,
    prefix_in_window: bool,
    relative_bias: Tensor | None = None,
) -> Tensor:
    """(T, 2) int32 for the forward to fill; (0, 2) where a prefix is the same to all rows: its gradient needs none."""
    differ = prefix_index is not None or (window is not None and prefix_in_window) or relative_bias is not None
    return query.new_empty((query.shape[0] if differ else 0, 2), dtype=torch.int32)


def forward(
    tensors: Tensors,
    options: Options,
    out: Tensor,
    lse: Tensor,
    peak_sum: Tensor | None,
    places: Tensor,
    own_rows: int | None = None,
) -> None:
    """Fill out (T, H, D), lse (T, H), peak_sum (T, H, 2) and places (T, 2).

    With `own_rows`, T, out and lse (H, T) hold what the segments' own rows gave, and the prefix is added.
    """
    tokens, _, features = tensors.query.shape
    kv_heads, prefix = tensors.prefix_key.shape[1:3]
    segments = tensors.segments(options.prompt_rows)
    typical, typical_rows = tensors.typical(segments)
    columns = max(typical, prefix) if own_rows is None else prefix
    config = configuration("forward", features, tensors.query.dtype, typical_rows, columns)
    slots = tokens * tensors.group // config["ROWS"] + segments  # see find_tile
    if tokens == 0:
        return
    with torch.cuda.device_of(tensors.query):
        forward_kernels.forward_kernel[(slots, kv_heads)](
            *(*tensors, out, lse, peak_sum, _or_none(places), _strides(*tensors.floats), segments, prefix),
            *(options.scale, options.reach, options.softcap, options.dropout_p, own_rows, tensors.bias_columns),
            GROUP=tensors.group,
            CAUSAL=options.is_causal,
            PREFIX_IN_WINDOW=options.prefix_in_window,
            PROMPT=options.prompt_rows > 0,
            PRECISION=precision(),
            **config,
        )


class Backward:
    """The launches of a backward, each into tensors (of `gradients`) that are there.

    Attributes:
        delta: (T, H), which `query` or `delta_alone` fills for the others.
    """

    def __init__(
        self,
        tensors: Tensors,
        options: Options,
        grad: Tensor,
        out: Tensor,
        peak_sum: Tensor,
        places: Tensor,
        own_rows: int | None = None,
    ):
        """peak_sum: with `own_rows`, T, it is the lse (H, T)."""
        self.tensors, self.options, self.own_rows = tensors, options, own_rows
        self.grad, self.out = _readable(grad), _readable(out)
        self.peak_sum, self.places = peak_sum, _or_none(places)
        self.delta = peak_sum.new_empty(tensors.query.shape[:2])
        self.features, self.segments = tensors.query.shape[2], tensors.segments(options.prompt_rows)
        self.prefix, self.kv_heads = tensors.prefix_key.shape[2], tensors.key.shape[1]
        self.constants = dict(GROUP=tensors.group, PROMPT=options.prompt_rows > 0, PRECISION=precision())

    def delta_alone(self) -> None:
        tokens, heads, _ = self.tensors.query.shape
        backward_kernels.delta_kernel[(cdiv(tokens * heads, DELTA_ROWS),)](
            *(self.grad, self.out, self.delta, self.grad.stride()[:-1], tokens * heads, heads),
            *(self.features, block_of(self.features), DELTA_ROWS),
        )

    def query(self, grad_query: Tensor) -> None:
        """With own_rows, the prefix's part is added to what is there."""
        tensors, options = self.tensors, self.options
        typical, typical_rows = tensors.typical(self.segments)
        columns = max(typical, self.prefix) if self.own_rows is None else self.prefix
        config = configuration("query", self.features, tensors.query.dtype, typical_rows, columns)
        slots = tensors.query.shape[0] * tensors.group // config["ROWS"] + self.segments
        backward_kernels.query_kernel[(slots, self.kv_heads)](
            *(self.grad, *tensors.floats, self.out, *tensors[5:], self.peak_sum, self.delta, grad_query),
            *(self.grad.stride()[:-1], _strides(*tensors.floats), self.segments, self.prefix),
            *(options.scale, options.reach, options.softcap, options.dropout_p, self.own_rows, tensors.bias_columns),
            CAUSAL=options.is_causal,
            PREFIX_IN_WINDOW=options.prefix_in_window,
            **self.constants,
            **config,
        )

    def key_value(self, grad_key: Tensor, grad_value: Tensor, of_prompt: tuple) -> None:
        """of_prompt: where what the prompt's rows give to their own goes; None and None without a prompt."""
        tensors, options = self.tensors, self.options
        typical, typical_rows = tensors.typical(self.segments)
        config = configuration("columns", self.features, tensors.query.dtype, typical_rows, typical)
        slots = tensors.key.shape[0] // config["COLUMNS"] + self.segments
        backward_kernels.key_value_kernel[(slots, self.kv_heads)](
            *(self.grad, *tensors[:3], tensors.cu_seqlens, tensors.seed, tensors.relative_bias, tensors.cu_seqlens_k),
            *(self.peak_sum, self.delta, grad_key, grad_value, *of_prompt),
            *(self.grad.stride()[:-1], _strides(*tensors[:3]), self.segments, self.prefix),
            *(options.scale, options.reach, options.softcap, options.dropout_p, tensors.bias_columns),
            CAUSAL=options.is_causal,
            **self.constants,
            **config,
        )


class PrefixSums:
    """The prefix's gradients, summed over parts of all rows apart.

    A prompt's rows are one part more: what they give to their own keys and values.
    """

    def __init__(self, prefix_key: Tensor, tokens: int, group: int, is_prompt: bool):
        entries, kv_heads, prefix, features = prefix_key.shape
        self.rows = tokens * group
        self.config = configuration("columns", features, prefix_key.dtype, self.rows, prefix)
        self.tiles = cdiv(prefix, self.config["COLUMNS"]) * entries * kv_heads
        row_tiles = cdiv(self.rows, self.config["ROWS"])
        splits = max(1, min(programs(prefix_key.device) // self.tiles, row_tiles // 2))
        self.rows_per_split = cdiv(row_tiles, splits) * self.config["ROWS"]
        self.splits, self.parts, self.count = splits, splits + is_prompt, entries * kv_heads * prefix * features
        self.partial = None
        if self.parts > 1:
            self.partial = prefix_key.new_empty((2, self.parts, self.count), dtype=torch.float32)

    @property
    def of_prompt(self) -> tuple[Tensor, Tensor]:
        return self.partial[0, -1], self.partial[1, -1]

    def fill(self, run: Backward, grads: tuple[Tensor, Tensor]) -> None:
        """Fill `grads`, of prefix_key and prefix_value, or the prompt's rows of those of key and value."""
        tensors, options = run.tensors, run.options
        parts = grads if self.partial is None else self.partial
        prefix_kernels.prefix_kernel[(self.tiles, self.splits)](
            *(run.grad, tensors.query, tensors.prefix_key, tensors.prefix_value, run.places, tensors.seed),
            *(tensors.relative_bias, run.peak_sum, run.delta, parts[0], parts[1], run.grad.stride()[:-1]),
            *(_strides(tensors.query, tensors.prefix_key, tensors.prefix_value), self.rows, self.rows_per_split),
            *(run.kv_heads, run.prefix, options.scale, options.prefix_reach, options.softcap, options.dropout_p),
            *(run.own_rows, tensors.bias_columns),
            **run.constants,
            **self.config,
        )
        if self.partial is not None:
            prefix_kernels.sum_splits_kernel[(cdiv(self.count, SUMMED["COLUMNS"]), 2)](
                self.partial, *grads, self.parts, self.count, **SUMMED
            )


def prefix_sums(run: Backward, wanted: bool) -> PrefixSums | None:
    """None where there is nothing to sum."""
    if not wanted or run.tensors.prefix_key.numel() == 0:
        return None
    tokens, prompt_rows = run.tensors.query.shape[0], run.options.prompt_rows
    return PrefixSums(run.tensors.prefix_key, tokens - prompt_rows, run.tensors.group, prompt_rows > 0)


def gradients(
    query, key, value, prefix_key, prefix_value, query_needs: bool, segments_need: bool, prefix_needs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Not yet filled; empty where not needed."""
    needs = query_needs, segments_need, segments_need, prefix_needs, prefix_needs
    tensors = query, key, value, prefix_key, prefix_value
    return tuple(x.new_empty(x.shape if need else (0,)) for x, need in zip(tensors, needs, strict=True))


def differentiated_by(run_backward: Callable) -> Callable:
    """The formula of an autograd.Function, by an operator that takes what it saved, its options and what is needed."""

    def formula(ctx, grad_out, *_):
        need = ctx.needs_input_grad
        needs = need[0], need[1] or need[2], need[3] or need[4]
        grads = run_backward(grad_out, *ctx.saved_tensors, *ctx.options, *needs)
        wanted = [g if wants else None for g, wants in zip(grads, need[:5], strict=True)]
        return *wanted, *[None] * (len(need) - 5)

    return formula
