"""Triton kernels of prefix attention's backward: the prefix's gradients, summed over all rows that read them."""

import triton
import triton.language as tl

from .triton_backward import add_rows, load_tile
from .triton_kernels import SCANNED, load_rows, row_offsets, store_rows


@triton.jit
def reads(places, token, valid, entry, last_column, reach):
    """Whether rows read this entry of the bank, and see its last column here, as the nearest."""
    valid = valid & (tl.load(places + 2 * token, mask=valid, other=-1) == entry)
    if reach is not None:
        valid = valid & (tl.load(places + 2 * token + 1, mask=valid, other=0) - last_column <= reach)
    return valid


@triton.jit(
    do_not_specialize=["rows", "rows_per_split", "kv_heads", "prefix", "reach", "own_rows", "bias_columns"],
)
def prefix_kernel(
    grad,
    query,
    prefix_key,
    prefix_value,
    places,
    seed,
    relative_bias,
    peak_sum,
    delta,
    grad_prefix_key,
    grad_prefix_value,
    grad_strides,
    strides,
    rows,
    rows_per_split,
    kv_heads,
    prefix,
    scale,
    reach,
    softcap,
    dropout_p,
    own_rows,
    bias_columns,
    GROUP: tl.constexpr,
    FEATURES: tl.constexpr,
    FEATURES_BLOCK: tl.constexpr,
    PROMPT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradients of the prefixes, summed over a part of all rows: (splits, N, Hkv, P, D).

    Of a prompt, (splits, P, Hkv, D), over the `rows` behind its own.

    A prefix is columns to the rows of all segments alike, so tiles of rows go across segments. Which rows read another
    prefix of a bank, or are too far behind, `places` tells, and where in their segments rows stand, for their biases;
    None: all read the first, and see all of it.

    Grid: (tiles of P * N * Hkv, splits).
    """
    before = 0
    if PROMPT:
        before = prefix
    query_strides, prefix_key_strides, prefix_value_strides = strides
    tiles = tl.cdiv(prefix, COLUMNS)
    tile, pair = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    entry, kv_head = pair // kv_heads, pair % kv_heads
    wide = kv_head.to(tl.int64)
    first_column = tile * COLUMNS - prefix
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    there = column < prefix
    key_offset = row_offsets(entry, wide, prefix_key_strides) + column.to(tl.int64) * prefix_key_strides[2]
    value_offset = row_offsets(entry, wide, prefix_value_strides) + column.to(tl.int64) * prefix_value_strides[2]
    k = load_rows(prefix_key, key_offset, there, FEATURES, FEATURES_BLOCK)
    v = load_rows(prefix_value, value_offset, there, FEATURES, FEATURES_BLOCK)
    first = tl.program_id(1) * rows_per_split
    end = tl.minimum(first + rows_per_split, rows)
    last_column = first_column + COLUMNS - 1
    if places is None:
        end = tl.where(entry > 0, first, end)
    else:  # from the first to the last that reads it: an `if` in the loop below would keep its loads from running ahead
        low, high = tl.maximum(first, end), first
        for scanned in range(first, end, SCANNED):
            row = scanned + tl.arange(0, SCANNED)
            valid = reads(places, before + row // GROUP, row < end, entry, last_column, reach)
            low = tl.minimum(low, tl.min(tl.where(valid, row, end)))
            high = tl.maximum(high, tl.max(tl.where(valid, row + 1, first)))
        first, end = low, high
    sums_key = tl.zeros((COLUMNS, FEATURES_BLOCK), dtype=tl.float32)
    sums_value = tl.zeros((COLUMNS, FEATURES_BLOCK), dtype=tl.float32)
    for first_row in range(first, end, ROWS):
        row = first_row + tl.arange(0, ROWS)
        valid = row < end
        token, head = before + row // GROUP, kv_head * GROUP + row % GROUP
        position = token
        if places is not None:
            valid = reads(places, token, valid, entry, last_column, reach)
            position = tl.load(places + 2 * token + 1, mask=valid, other=0)
        loaded = load_tile(
            *(grad, query, peak_sum, delta, grad_strides, query_strides, token, head, kv_heads * GROUP),
            *(valid, scale, own_rows, FEATURES, FEATURES_BLOCK),
        )
        sums_key, sums_value = add_rows(
            *(sums_key, sums_value, k, v, loaded, token * kv_heads * GROUP + head, head, position, first_column),
            *(seed, relative_bias, 0, prefix, scale, reach, softcap, dropout_p, bias_columns),
            *(False, PRECISION, ROWS, COLUMNS),
        )
    block = (tl.program_id(1) * (tl.num_programs(0) // tiles) + pair).to(tl.int64)
    written = (block * prefix + column) * FEATURES
    if PROMPT:
        written = ((tl.program_id(1).to(tl.int64) * prefix + column) * kv_heads + kv_head) * FEATURES
    store_rows(grad_prefix_key, written, there, sums_key * scale, FEATURES, FEATURES_BLOCK)
    store_rows(grad_prefix_value, written, there, sums_value, FEATURES, FEATURES_BLOCK)


@triton.jit(do_not_specialize=["splits"])
def sum_splits_kernel(
    partial,
    grad_prefix_key,
    grad_prefix_value,
    splits,
    count,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sums of partial (2, splits, count) over its splits, always in one order. Grid: (blocks of count, 2)."""
    i = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    which = tl.program_id(1)
    first = partial + which.to(tl.int64) * splits * count
    total = tl.zeros((SPLITS, COLUMNS), dtype=tl.float32)  # several splits' loads are under way at once
    for begin in range(0, splits, SPLITS):
        split = begin + tl.arange(0, SPLITS)
        there = (split < splits)[:, None] & (i < count)[None, :]
        total += tl.load(first + split.to(tl.int64)[:, None] * count + i[None, :], mask=there, other=0.0)
    grad = grad_prefix_key
    if which == 1:
        grad = grad_prefix_value
    tl.store(grad + i, tl.sum(total, 0).to(grad.dtype.element_ty), mask=i < count)
