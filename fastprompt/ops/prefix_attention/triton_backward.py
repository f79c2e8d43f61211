"""Triton kernels of prefix attention's backward. Nothing is added atomically: equal inputs give equal bits.

Rows are laid out as in triton_kernels.py.
"""

import triton
import triton.language as tl

from fastprompt.ops._triton import segment_of

from .triton_kernels import (
    column_tiles,
    find_tile,
    kept,
    load_peak_sum,
    load_rows,
    row_offsets,
    scores,
    source,
    store_rows,
    unit_of,
    visible,
    weights,
)


@triton.jit(do_not_specialize=["count", "heads"])
def delta_kernel(
    grad,
    out,
    delta,
    grad_strides,
    count,
    heads,
    FEATURES: tl.constexpr,
    FEATURES_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """delta = sum of grad * out over the features, (T, H). Grid: (tiles of T * H rows,)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < count
    do = load_rows(grad, row_offsets(row // heads, row % heads, grad_strides), valid, FEATURES, FEATURES_BLOCK)
    o = load_rows(out, row.to(tl.int64) * FEATURES, valid, FEATURES, FEATURES_BLOCK)
    tl.store(delta + row, tl.sum(do.to(tl.float32) * o.to(tl.float32), 1), mask=valid)


@triton.jit(
    do_not_specialize=["segments", "prefix", "reach"], do_not_specialize_on_alignment=["cu_seqlens", "prefix_index"]
)
def query_kernel(
    grad,
    query,
    key,
    value,
    prefix_key,
    prefix_value,
    cu_seqlens,
    prefix_index,
    seed,
    peak_sum,
    delta,
    grad_query,
    grad_strides,
    strides,
    segments,
    prefix,
    scale,
    reach,
    softcap,
    dropout_p,
    GROUP: tl.constexpr,
    FEATURES: tl.constexpr,
    FEATURES_BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    PREFIX_IN_WINDOW: tl.constexpr,
    PROMPT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The query's gradient (T, H, D), one tile of rows. Grid: (slots, Hkv)."""
    query_strides, key_strides, value_strides, prefix_key_strides, prefix_value_strides = strides
    segment, begin, length, first_row, prefix = find_tile(
        tl.program_id(0), cu_seqlens, segments, prefix, GROUP, ROWS, PROMPT
    )
    if first_row >= length * GROUP:
        return
    kv_head, heads = tl.program_id(1), tl.num_programs(1) * GROUP
    row = first_row + tl.arange(0, ROWS)
    valid = row < length * GROUP
    position, head = row // GROUP, kv_head * GROUP + row % GROUP
    q = load_rows(query, row_offsets(begin + position, head, query_strides), valid, FEATURES, FEATURES_BLOCK)
    do = load_rows(grad, row_offsets(begin + position, head, grad_strides), valid, FEATURES, FEATURES_BLOCK)
    peak, log_sum = load_peak_sum(peak_sum, (begin + position) * heads + head, valid)
    row_delta = tl.load(delta + (begin + position) * heads + head, mask=valid, other=0.0)

    entry = segment * 0
    if prefix_index is not None:
        entry = tl.load(prefix_index + segment)
    keys, prefix_keys = source(key, prefix_key, key_strides, prefix_key_strides, begin, entry, kv_head, prefix)
    values, prefix_values = source(
        value, prefix_value, value_strides, prefix_value_strides, begin, entry, kv_head, prefix
    )
    low, high = first_row // GROUP, (first_row + ROWS - 1) // GROUP
    first_tile, prefix_tiles, first_column, tiles = column_tiles(
        low, high, length, prefix, reach, CAUSAL, PREFIX_IN_WINDOW, COLUMNS
    )
    sums = tl.zeros((ROWS, FEATURES_BLOCK), dtype=tl.float32)
    for tile in range(first_tile, tiles):
        in_prefix = tile < prefix_tiles
        first = tl.where(in_prefix, tile * COLUMNS - prefix, (tile - prefix_tiles) * COLUMNS + first_column)
        column = first + tl.arange(0, COLUMNS)
        there = column < tl.where(in_prefix, 0, length)
        k = load_rows(
            tl.where(in_prefix, prefix_keys, keys),
            column.to(tl.int64) * tl.where(in_prefix, prefix_key_strides[2], key_strides[0]),
            there,
            FEATURES,
            FEATURES_BLOCK,
        )
        v = load_rows(
            tl.where(in_prefix, prefix_values, values),
            column.to(tl.int64) * tl.where(in_prefix, prefix_value_strides[2], value_strides[0]),
            there,
            FEATURES,
            FEATURES_BLOCK,
        )
        score, slope = scores(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap)
        seen = visible(position[:, None], column[None, :], length, reach, CAUSAL, PREFIX_IN_WINDOW) & there[None, :]
        weight = tl.where(seen, weights(score, unit_of(scale, softcap), peak[:, None], log_sum[:, None]), 0.0)
        grad_weight = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if seed is not None:
            keep = kept(seed, (begin + position) * heads + head, first, prefix, dropout_p, ROWS, COLUMNS)
            grad_weight = tl.where(keep, grad_weight * (1.0 / (1.0 - dropout_p)), 0.0)
        grad_score = weight * (grad_weight - row_delta[:, None]) * slope
        sums = tl.dot(grad_score.to(k.dtype), k, sums, input_precision=PRECISION)
    written = row_offsets(begin + position, head, (heads * FEATURES, FEATURES))
    store_rows(grad_query, written, valid, sums * scale, FEATURES, FEATURES_BLOCK)


@triton.jit
def add_rows(
    sums_key,
    sums_value,
    k,
    v,
    first_column,
    grad,
    query,
    peak_sum,
    delta,
    grad_strides,
    query_strides,
    token,
    head,
    heads,
    position,
    valid,
    seed,
    length,
    prefix,
    scale,
    reach,
    softcap,
    dropout_p,
    FEATURES: tl.constexpr,
    FEATURES_BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add what a tile of rows gives to the gradients of a tile of columns, both (COLUMNS, D); scores lie transposed.

    Rows that are not `valid` give zero, as their query, grad and delta are. A column past the last has any value at
    all, which goes nowhere.
    """
    q = load_rows(query, row_offsets(token, head, query_strides), valid, FEATURES, FEATURES_BLOCK)
    do = load_rows(grad, row_offsets(token, head, grad_strides), valid, FEATURES, FEATURES_BLOCK)
    peak, log_sum = load_peak_sum(peak_sum, token * heads + head, valid)
    row_delta = tl.load(delta + token * heads + head, mask=valid, other=0.0)
    score, slope = scores(tl.dot(k, tl.trans(q), input_precision=PRECISION), scale, softcap)
    weight = weights(score, unit_of(scale, softcap), peak[None, :], log_sum[None, :])
    if CAUSAL or reach is not None:
        column = first_column + tl.arange(0, COLUMNS)
        weight = tl.where(visible(position[None, :], column[:, None], length, reach, CAUSAL, True), weight, 0.0)
    grad_weight = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    given = weight
    if seed is not None:
        keep = tl.trans(kept(seed, token * heads + head, first_column, prefix, dropout_p, ROWS, COLUMNS))
        given = tl.where(keep, weight * (1.0 / (1.0 - dropout_p)), 0.0)
        grad_weight = tl.where(keep, grad_weight * (1.0 / (1.0 - dropout_p)), 0.0)
    sums_value = tl.dot(given.to(do.dtype), do, sums_value, input_precision=PRECISION)
    grad_score = weight * (grad_weight - row_delta[None, :]) * slope
    sums_key = tl.dot(grad_score.to(q.dtype), q, sums_key, input_precision=PRECISION)
    return sums_key, sums_value


@triton.jit(do_not_specialize=["segments", "prefix", "reach"], do_not_specialize_on_alignment=["cu_seqlens"])
def key_value_kernel(
    grad,
    query,
    key,
    value,
    cu_seqlens,
    seed,
    peak_sum,
    delta,
    grad_key,
    grad_value,
    partial_key,
    partial_value,
    grad_strides,
    strides,
    segments,
    prefix,
    scale,
    reach,
    softcap,
    dropout_p,
    GROUP: tl.constexpr,
    FEATURES: tl.constexpr,
    FEATURES_BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    PROMPT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradients (T, Hkv, D) of key and value, one tile of a segment's columns. Grid: (slots, Hkv).

    Those of a prompt's rows are one of the sums that sum_splits_kernel adds up, partial_key and partial_value.
    """
    query_strides, key_strides, value_strides = strides
    _, begin, length, first_column, _ = find_tile(tl.program_id(0), cu_seqlens, segments, prefix, 1, COLUMNS, PROMPT)
    if first_column >= length:
        return
    kv_head, kv_heads = tl.program_id(1), tl.num_programs(1)
    column = first_column + tl.arange(0, COLUMNS)
    there = column < length
    k = load_rows(key, row_offsets(begin + column, kv_head, key_strides), there, FEATURES, FEATURES_BLOCK)
    v = load_rows(value, row_offsets(begin + column, kv_head, value_strides), there, FEATURES, FEATURES_BLOCK)
    low, end = 0, length
    if reach is not None:
        low = tl.maximum(first_column - reach, 0)
        end = tl.minimum(length, first_column + COLUMNS + reach)
    if CAUSAL:
        low = first_column
    sums_key = tl.zeros((COLUMNS, FEATURES_BLOCK), dtype=tl.float32)
    sums_value = tl.zeros((COLUMNS, FEATURES_BLOCK), dtype=tl.float32)
    for first_row in range(low * GROUP, end * GROUP, ROWS):
        row = first_row + tl.arange(0, ROWS)
        position, head = row // GROUP, kv_head * GROUP + row % GROUP
        sums_key, sums_value = add_rows(
            *(sums_key, sums_value, k, v, first_column, grad, query, peak_sum, delta, grad_strides, query_strides),
            *(begin + position, head, kv_heads * GROUP, position, row < end * GROUP, seed, length, 0),
            *(scale, reach, softcap, dropout_p),
            *(FEATURES, FEATURES_BLOCK, CAUSAL, PRECISION, ROWS, COLUMNS),
        )
    written = row_offsets(begin + column, kv_head, (kv_heads * FEATURES, FEATURES))
    if PROMPT:
        own = there & (begin + column < prefix)
        store_rows(partial_key, written, own, sums_key * scale, FEATURES, FEATURES_BLOCK)
        store_rows(partial_value, written, own, sums_value, FEATURES, FEATURES_BLOCK)
        there = there & (begin + column >= prefix)
    store_rows(grad_key, written, there, sums_key * scale, FEATURES, FEATURES_BLOCK)
    store_rows(grad_value, written, there, sums_value, FEATURES, FEATURES_BLOCK)


@triton.jit(
    do_not_specialize=["segments", "steps", "rows", "rows_per_split", "kv_heads", "prefix", "reach"],
    do_not_specialize_on_alignment=["cu_seqlens", "prefix_index"],
)
def prefix_kernel(
    grad,
    query,
    prefix_key,
    prefix_value,
    cu_seqlens,
    prefix_index,
    seed,
    peak_sum,
    delta,
    grad_prefix_key,
    grad_prefix_value,
    grad_strides,
    strides,
    segments,
    steps,
    rows,
    rows_per_split,
    kv_heads,
    prefix,
    scale,
    reach,
    softcap,
    dropout_p,
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
    prefix of a bank, or are too far behind, says their segment.

    Grid: (tiles of P, N * Hkv, splits).
    """
    before = 0
    if PROMPT:
        before = prefix
    query_strides, prefix_key_strides, prefix_value_strides = strides
    entry, kv_head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    wide = kv_head.to(tl.int64)
    first_column = tl.program_id(0) * COLUMNS - prefix
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < prefix
    key_offset = row_offsets(entry, wide, prefix_key_strides) + column.to(tl.int64) * prefix_key_strides[2]
    value_offset = row_offsets(entry, wide, prefix_value_strides) + column.to(tl.int64) * prefix_value_strides[2]
    k = load_rows(prefix_key, key_offset, there, FEATURES, FEATURES_BLOCK)
    v = load_rows(prefix_value, value_offset, there, FEATURES, FEATURES_BLOCK)
    first = tl.program_id(2) * rows_per_split
    end = tl.minimum(first + rows_per_split, rows)
    if prefix_index is None:
        end = tl.where(entry > 0, first, end)  # all rows read the first entry
    sums_key = tl.zeros((COLUMNS, FEATURES_BLOCK), dtype=tl.float32)
    sums_value = tl.zeros((COLUMNS, FEATURES_BLOCK), dtype=tl.float32)
    for first_row in range(first, end, ROWS):
        row = first_row + tl.arange(0, ROWS)
        valid = row < end
        token, head = row // GROUP, kv_head * GROUP + row % GROUP
        position, some = token, True
        if prefix_index is not None or reach is not None:
            segment = segment_of(token, cu_seqlens, segments, steps)
            if prefix_index is not None:
                valid = valid & (tl.load(prefix_index + segment, mask=valid, other=0) == entry)
            if reach is not None:
                position = token - tl.load(cu_seqlens + segment, mask=valid, other=0)
                valid = valid & (position - (first_column + COLUMNS - 1) <= reach)
            some = tl.max(valid.to(tl.int32)) > 0
        if some:
            sums_key, sums_value = add_rows(
                *(sums_key, sums_value, k, v, first_column, grad, query, peak_sum, delta, grad_strides, query_strides),
                *(
                    before + token,
                    head,
                    kv_heads * GROUP,
                    position,
                    valid,
                    seed,
                    0,
                    prefix,
                    scale,
                    reach,
                    softcap,
                    dropout_p,
                ),
                *(FEATURES, FEATURES_BLOCK, False, PRECISION, ROWS, COLUMNS),
            )
    block = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    written = (block * prefix + column) * FEATURES
    if PROMPT:
        written = ((tl.program_id(2).to(tl.int64) * prefix + column) * kv_heads + kv_head) * FEATURES
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
