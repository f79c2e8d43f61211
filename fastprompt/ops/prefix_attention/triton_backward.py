"""Triton kernels of prefix attention's backward. Nothing is added atomically: equal inputs give equal bits.

Rows are laid out as in triton_kernels.py.
"""

import triton
import triton.language as tl

from .triton_kernels import (
    biases,
    column_tiles,
    find_tile,
    kept,
    load_peak_sum,
    load_rows,
    own_columns,
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
    """delta = sum of grad * out over the features, (T, H): where query_kernel, which finds it too, does not run.

    Grid: (tiles of T * H rows,).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < count
    do = load_rows(grad, row_offsets(row // heads, row % heads, grad_strides), valid, FEATURES, FEATURES_BLOCK)
    o = load_rows(out, row.to(tl.int64) * FEATURES, valid, FEATURES, FEATURES_BLOCK)
    tl.store(delta + row, tl.sum(do.to(tl.float32) * o.to(tl.float32), 1), mask=valid)


@triton.jit(
    do_not_specialize=["segments", "prefix", "reach", "own_rows", "bias_columns"],
    do_not_specialize_on_alignment=["cu_seqlens", "prefix_index", "cu_seqlens_k"],
)
def query_kernel(
    grad,
    query,
    key,
    value,
    prefix_key,
    prefix_value,
    out,
    cu_seqlens,
    prefix_index,
    seed,
    relative_bias,
    cu_seqlens_k,
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
    own_rows,
    bias_columns,
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
    """The query's gradient (T, H, D), and delta (T, H), of one tile of rows. Grid: (slots, Hkv)."""
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
    peak, log_sum = load_peak_sum(peak_sum, begin + position, head, heads, scale, own_rows, valid)
    written = row_offsets(begin + position, head, (heads * FEATURES, FEATURES))
    o = load_rows(out, written, valid, FEATURES, FEATURES_BLOCK)
    row_delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + (begin + position) * heads + head, row_delta, mask=valid)

    entry = segment * 0
    if prefix_index is not None:
        entry = tl.load(prefix_index + segment)
    key_begin, key_length = own_columns(cu_seqlens_k, segment, begin, length)
    keys, prefix_keys = source(key, prefix_key, key_strides, prefix_key_strides, key_begin, entry, kv_head, prefix)
    values, prefix_values = source(
        value, prefix_value, value_strides, prefix_value_strides, key_begin, entry, kv_head, prefix
    )
    low, high = first_row // GROUP, (first_row + ROWS - 1) // GROUP
    first_tile, prefix_tiles, first_column, tiles = column_tiles(
        low, high, key_length, prefix, reach, CAUSAL, PREFIX_IN_WINDOW, COLUMNS
    )
    sums = tl.zeros((ROWS, FEATURES_BLOCK), dtype=tl.float32)
    if own_rows is not None:
        tiles = prefix_tiles
    for tile in range(first_tile, tiles):
        in_prefix = tile < prefix_tiles
        first = tl.where(in_prefix, tile * COLUMNS - prefix, (tile - prefix_tiles) * COLUMNS + first_column)
        column = first + tl.arange(0, COLUMNS)
        there = column < tl.where(in_prefix, 0, key_length)
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
        if relative_bias is not None:
            score += biases(relative_bias, head[:, None], column[None, :] - position[:, None], bias_columns)
        seen = visible(position[:, None], column[None, :], key_length, reach, CAUSAL, PREFIX_IN_WINDOW) & there[None, :]
        weight = tl.where(seen, weights(score, unit_of(scale, softcap), peak[:, None], log_sum[:, None]), 0.0)
        grad_weight = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if seed is not None:
            keep = kept(seed, (begin + position) * heads + head, first, prefix, dropout_p, ROWS, COLUMNS)
            grad_weight = tl.where(keep, grad_weight * (1.0 / (1.0 - dropout_p)), 0.0)
        grad_score = weight * (grad_weight - row_delta[:, None]) * slope
        sums = tl.dot(grad_score.to(k.dtype), k, sums, input_precision=PRECISION)
    sums *= scale
    if own_rows is not None:
        sums += load_rows(grad_query, written, valid, FEATURES, FEATURES_BLOCK).to(tl.float32)
    store_rows(grad_query, written, valid, sums, FEATURES, FEATURES_BLOCK)


@triton.jit
def load_tile(
    grad,
    query,
    peak_sum,
    delta,
    grad_strides,
    query_strides,
    token,
    head,
    heads,
    valid,
    scale,
    own_rows,
    FEATURES: tl.constexpr,
    FEATURES_BLOCK: tl.constexpr,
):
    """What `add_rows` wants of rows; zero where they are not `valid`."""
    q = load_rows(query, row_offsets(token, head, query_strides), valid, FEATURES, FEATURES_BLOCK)
    do = load_rows(grad, row_offsets(token, head, grad_strides), valid, FEATURES, FEATURES_BLOCK)
    peak, log_sum = load_peak_sum(peak_sum, token, head, heads, scale, own_rows, valid)
    return q, do, peak, log_sum, tl.load(delta + token * heads + head, mask=valid, other=0.0)


@triton.jit
def add_rows(
    sums_key,
    sums_value,
    k,
    v,
    tile,
    row,
    head,
    position,
    first_column,
    seed,
    relative_bias,
    length,
    prefix,
    scale,
    reach,
    softcap,
    dropout_p,
    bias_columns,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add what a tile of rows gives to the gradients of a tile of columns, both (COLUMNS, D); scores lie transposed.

    Rows that are not valid give zero, as their query, grad and delta are. A column past the last has any value at
    all, which goes nowhere.

    Args:
        tile: of `load_tile`.
        row: (ROWS,) token * H + head, token counted over all segments.
    """
    q, do, peak, log_sum, row_delta = tile
    score, slope = scores(tl.dot(k, tl.trans(q), input_precision=PRECISION), scale, softcap)
    column = first_column + tl.arange(0, COLUMNS)
    if relative_bias is not None:
        score += biases(relative_bias, head[None, :], column[:, None] - position[None, :], bias_columns)
    weight = weights(score, unit_of(scale, softcap), peak[None, :], log_sum[None, :])
    if CAUSAL or reach is not None:
        weight = tl.where(visible(position[None, :], column[:, None], length, reach, CAUSAL, True), weight, 0.0)
    grad_weight = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    given = weight
    if seed is not None:
        keep = tl.trans(kept(seed, row, first_column, prefix, dropout_p, ROWS, COLUMNS))
        given = tl.where(keep, weight * (1.0 / (1.0 - dropout_p)), 0.0)
        grad_weight = tl.where(keep, grad_weight * (1.0 / (1.0 - dropout_p)), 0.0)
    sums_value = tl.dot(given.to(do.dtype), do, sums_value, input_precision=PRECISION)
    grad_score = weight * (grad_weight - row_delta[None, :]) * slope
    sums_key = tl.dot(grad_score.to(q.dtype), q, sums_key, input_precision=PRECISION)
    return sums_key, sums_value


@triton.jit(
    do_not_specialize=["segments", "prefix", "reach", "bias_columns"],
    do_not_specialize_on_alignment=["cu_seqlens", "cu_seqlens_k"],
)
def key_value_kernel(
    grad,
    query,
    key,
    value,
    cu_seqlens,
    seed,
    relative_bias,
    cu_seqlens_k,
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
    bias_columns,
    GROUP: tl.constexpr,
    FEATURES: tl.constexpr,
    FEATURES_BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    PROMPT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradients of key and value, in their shape, one tile of a segment's columns. Grid: (slots, Hkv).

    Those of a prompt's rows are one of the sums that sum_splits_kernel adds up, partial_key and partial_value.
    """
    query_strides, key_strides, value_strides = strides
    key_bounds = cu_seqlens
    if cu_seqlens_k is not None:
        key_bounds = cu_seqlens_k
    segment, key_begin, key_length, first_column, _ = find_tile(
        tl.program_id(0), key_bounds, segments, prefix, 1, COLUMNS, PROMPT
    )
    if first_column >= key_length:
        return
    begin, length = key_begin, key_length
    if cu_seqlens_k is not None:
        begin = tl.load(cu_seqlens + segment)
        length = tl.load(cu_seqlens + segment + 1) - begin
    kv_head, kv_heads = tl.program_id(1), tl.num_programs(1)
    column = first_column + tl.arange(0, COLUMNS)
    there = column < key_length
    k = load_rows(key, row_offsets(key_begin + column, kv_head, key_strides), there, FEATURES, FEATURES_BLOCK)
    v = load_rows(value, row_offsets(key_begin + column, kv_head, value_strides), there, FEATURES, FEATURES_BLOCK)
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
        tile = load_tile(
            *(grad, query, peak_sum, delta, grad_strides, query_strides, begin + position, head, kv_heads * GROUP),
            *(row < end * GROUP, scale, None, FEATURES, FEATURES_BLOCK),
        )
        sums_key, sums_value = add_rows(
            *(sums_key, sums_value, k, v, tile, (begin + position) * kv_heads * GROUP + head, head, position),
            *(first_column, seed, relative_bias, length, 0, scale, reach, softcap, dropout_p, bias_columns),
            *(CAUSAL, PRECISION, ROWS, COLUMNS),
        )
    written = row_offsets(key_begin + column, kv_head, (kv_heads * FEATURES, FEATURES))
    if PROMPT:
        own = there & (begin + column < prefix)
        store_rows(partial_key, written, own, sums_key * scale, FEATURES, FEATURES_BLOCK)
        store_rows(partial_value, written, own, sums_value, FEATURES, FEATURES_BLOCK)
        there = there & (begin + column >= prefix)
    store_rows(grad_key, written, there, sums_key * scale, FEATURES, FEATURES_BLOCK)
    store_rows(grad_value, written, there, sums_value, FEATURES, FEATURES_BLOCK)
