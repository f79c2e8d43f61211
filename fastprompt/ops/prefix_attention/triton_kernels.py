"""Triton kernels of prefix attention: what all share, and the forward.

The query heads of a group lie in one tile beside each other: "row" r of a segment is its token r // GROUP under query
head r % GROUP of the group. So a group reads its keys and values once, and short segments fill their tiles.

The hardware's exponential is exp2. A weight is that of a difference of products of queries and keys, times a factor, in
this order: the factor would round products to their own size, and the difference would show it. The backward finds the
very weights of the forward from each row's peak, its greatest product, and sum; from a log-sum-exp, which is rounded to
the size of the scores, it could not.

Where the library's flash kernels have attended to a segment's own rows, these add the prefix (own_rows, the number of
rows): out, lse and the query's gradient hold what has come so far, and lse, (H, T) then, stands for peak and sum.

Where the first rows are a prompt (PROMPT), they are segment 0, which has no prefix; the segments of cu_seqlens, which
counts from behind them, come after it, and their prefix is the prompt's keys and values.

Arguments that are None (prefix_index, seed, relative_bias, cu_seqlens_k, reach, softcap, places, own_rows) and GROUP,
FEATURES, ... are constants of the compilation. relative_bias is divided by `scale`, to be added to products.
What varies from batch to batch is no reason to compile anew, whether it is a multiple of 16 or not: do_not_specialize.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234e38)
SEARCHED = tl.constexpr(128)  # segments at a time
SCANNED = tl.constexpr(1024)  # rows at a time


@triton.jit
def segment_begin(cu_seqlens, b, prefix, valid, PROMPT: tl.constexpr):
    """The first row of segment b, or of several."""
    if PROMPT:
        return tl.load(cu_seqlens + b - 1, mask=valid & (b > 0), other=-prefix) + prefix
    else:
        return tl.load(cu_seqlens + b, mask=valid, other=0)


@triton.jit
def find_tile(slot, cu_seqlens, segments, prefix, GROUP: tl.constexpr, BLOCK: tl.constexpr, PROMPT: tl.constexpr):
    """Which segment, and which BLOCK of its rows, a program works on: (segment, begin, length, first row, its prefix).

    Segment b owns the slots from its begin * GROUP // BLOCK + b on: at least as many as it has tiles, so the grid
    follows from shapes alone. The first row of a slot that is too many lies behind the segment's last.
    """
    segment = -1
    for first in range(0, segments, SEARCHED):
        b = first + tl.arange(0, SEARCHED)
        begin = segment_begin(cu_seqlens, b, prefix, b < segments, PROMPT)
        segment += tl.sum(((begin * GROUP // BLOCK + b <= slot) & (b < segments)).to(tl.int32))
    begin = segment_begin(cu_seqlens, segment, prefix, segment >= 0, PROMPT)
    length = segment_begin(cu_seqlens, segment + 1, prefix, segment >= 0, PROMPT) - begin
    if PROMPT:
        prefix = tl.where(segment == 0, 0, prefix)
    return segment, begin, length, (slot - begin * GROUP // BLOCK - segment) * BLOCK, prefix


@triton.jit
def load_rows(tensor, offset, valid, FEATURES: tl.constexpr, FEATURES_BLOCK: tl.constexpr):
    """tensor[offset] for offsets (R,) of rows -> (R, FEATURES_BLOCK), zero where not `valid` and past FEATURES."""
    feature = tl.arange(0, FEATURES_BLOCK)
    mask = valid[:, None]
    if FEATURES != FEATURES_BLOCK:
        mask = mask & (feature < FEATURES)[None, :]
    return tl.load(tensor + offset[:, None] + feature[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(tensor, offset, valid, rows, FEATURES: tl.constexpr, FEATURES_BLOCK: tl.constexpr):
    feature = tl.arange(0, FEATURES_BLOCK)
    mask = valid[:, None]
    if FEATURES != FEATURES_BLOCK:
        mask = mask & (feature < FEATURES)[None, :]
    tl.store(tensor + offset[:, None] + feature[None, :], rows.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def row_offsets(token, head, strides):
    """Offsets of rows of a (T, heads, D) tensor. 64 bit: T * heads * D may pass 2**31.

    So may head * strides[1] of a bank: its head is to be of 64 bits. The host copies others that lie so far apart.
    """
    return token.to(tl.int64) * strides[0] + head * strides[1]


@triton.jit
def tanh(x):
    # No tanh serves both the GPU and the interpreter. 1 - 2 / (exp(2x) + 1) cancels near 0, the polynomial does not.
    square = x * x
    tail = ((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square + 1.33314422036e-1
    near = x + x * square * (tail * square - 3.33332819422e-1)
    far = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, far)


@triton.jit
def scores(product, scale, softcap):
    """Scores of the products q.k, in what `unit_of` says, and their derivative but for `scale`."""
    if softcap is None:
        return product, 1.0
    else:  # not compiled then
        capped = tanh(product * tl.minimum(scale / softcap, 1e38))  # of a product of 0 infinity would make NaN
        return capped, 1.0 - capped * capped


@triton.jit
def biases(relative_bias, head, distance, bias_columns):
    """What is added to products of queries and keys; both arguments may be several, of one shape when broadcast."""
    column = tl.minimum(tl.maximum(distance + bias_columns // 2, 0), bias_columns - 1)
    return tl.load(relative_bias + head.to(tl.int64) * bias_columns + column)


@triton.jit
def own_columns(cu_seqlens_k, segment, begin, length):
    """Where the keys of a segment of these rows are: (begin, length)."""
    if cu_seqlens_k is None:
        return begin, length
    else:  # not compiled then
        key_begin = tl.load(cu_seqlens_k + segment)
        return key_begin, tl.load(cu_seqlens_k + segment + 1) - key_begin


@triton.jit
def unit_of(scale, softcap):
    return scale if softcap is None else softcap


@triton.jit
def load_peak_sum(peak_sum, token, head, heads, scale, own_rows, valid):
    """Of rows: their peak, and their sum's logarithm in units of ln 2."""
    if own_rows is None:
        row = token * heads + head
        peak = tl.load(peak_sum + 2 * row, mask=valid, other=0.0)
        return peak, tl.log2(tl.load(peak_sum + 2 * row + 1, mask=valid, other=1.0))
    else:
        lse = tl.load(peak_sum + head * own_rows + token, mask=valid, other=0.0)
        return lse / scale, lse * 0.0


@triton.jit
def weights(score, unit, peak, log_sum):
    """Those that the forward has found. However products are rounded this time, none is above the peak."""
    return tl.exp2((score - tl.maximum(score, peak)) * (unit * LOG2E) - log_sum)


@triton.jit
def visible(row, column, length, reach, CAUSAL: tl.constexpr, PREFIX_IN_WINDOW: tl.constexpr):
    """Whether rows at positions of a segment see columns at positions; those of the prefix are -P..-1."""
    seen = column < length
    if CAUSAL:
        seen = seen & (column <= row)
    if reach is not None:
        inside = row - column <= reach
        if not CAUSAL:
            inside = inside & (column - row <= reach)
        if not PREFIX_IN_WINDOW:
            inside = inside | (column < 0)
        seen = seen & inside
    return seen


@triton.jit
def kept(seed, row, first, prefix, dropout_p, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) bool: which weights dropout keeps. It counts by the weight's own place, whatever the tiles.

    One call of the generator serves four neighbouring columns: tiles begin at multiples of 4 of their part's columns.

    Args:
        row: (ROWS,) token * H + head, token counted over all segments.
        first: position of the first column, negative in the prefix.
    """
    quad = tl.where(first < 0, first + prefix, first) // 4 + tl.arange(0, COLUMNS // 4)
    part = (first < 0).to(tl.int32)
    zero = tl.zeros((ROWS, COLUMNS // 4), dtype=tl.int32)
    a, b, c, d = tl.philox(tl.load(seed), zero + quad[None, :], zero + row[:, None], zero + part, zero)
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, COLUMNS))
    return tl.uint_to_uniform_float(bits) >= dropout_p


@triton.jit
def column_tiles(
    low, high, length, prefix, reach, CAUSAL: tl.constexpr, PREFIX_IN_WINDOW: tl.constexpr, BLOCK: tl.constexpr
):
    """The columns that rows at positions low..high can see: (first tile of the prefix, its end, first column, tiles).

    Tiles of the prefix and of the segment are counted through, for one loop: two would each wait for their first load.
    """
    prefix_begin, begin, end = 0, 0, length
    if CAUSAL:
        end = tl.minimum(length, high + 1)
    if reach is not None:
        begin = tl.maximum(low - reach, 0) // BLOCK * BLOCK
        if not CAUSAL:
            end = tl.minimum(length, high + reach + 1)
        if PREFIX_IN_WINDOW:
            prefix_begin = tl.maximum(low - reach + prefix, 0) // BLOCK
    prefix_end = tl.cdiv(prefix, BLOCK)
    return tl.minimum(prefix_begin, prefix_end), prefix_end, begin, prefix_end + tl.cdiv(end - begin, BLOCK)


@triton.jit
def source(tensor, prefix_tensor, strides, prefix_strides, begin, entry, kv_head, prefix):
    """Pointers to position 0 of the segment, and to where position 0 would be if it followed the prefix."""
    segment_source = tensor + row_offsets(begin, kv_head, strides)
    prefix_offset = row_offsets(entry, kv_head.to(tl.int64), prefix_strides)
    prefix_offset += tl.full((), prefix, tl.int64) * prefix_strides[2]
    return segment_source, prefix_tensor + prefix_offset


@triton.jit(
    do_not_specialize=["segments", "prefix", "reach", "own_rows", "bias_columns"],
    do_not_specialize_on_alignment=["cu_seqlens", "prefix_index", "cu_seqlens_k"],
)
def forward_kernel(
    query,
    key,
    value,
    prefix_key,
    prefix_value,
    cu_seqlens,
    prefix_index,
    seed,
    relative_bias,
    cu_seqlens_k,
    out,
    lse,
    peak_sum,
    places,
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
    """out (T, H, D), log-sum-exp (T, H), peak and sum (T, H, 2) of one tile of rows. Grid: (slots, Hkv).

    And, for the gradient of the prefix, each token's entry of the bank and place in its segment: places (T, 2).
    """
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
    peak = tl.full((ROWS,), LOWEST, dtype=tl.float32)  # finite: a tile may hide all its columns from a row
    unit = unit_of(scale, softcap)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    sums = tl.zeros((ROWS, FEATURES_BLOCK), dtype=tl.float32)
    written = row_offsets(begin + position, head, (heads * FEATURES, FEATURES))
    if own_rows is not None:
        tiles = prefix_tiles
        peak = load_peak_sum(lse, begin + position, head, heads, scale, own_rows, valid)[0]
        total += 1.0
        sums += load_rows(out, written, valid, FEATURES, FEATURES_BLOCK).to(tl.float32)
    if places is not None:
        place = places + 2 * (begin + position)
        tl.store(place, position * 0 + entry, mask=valid & (head == 0))
        tl.store(place + 1, position, mask=valid & (head == 0))
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
        score, _ = scores(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap)
        if relative_bias is not None:
            score += biases(relative_bias, head[:, None], column[None, :] - position[:, None], bias_columns)
        seen = visible(position[:, None], column[None, :], key_length, reach, CAUSAL, PREFIX_IN_WINDOW) & there[None, :]
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp2((score - higher[:, None]) * (unit * LOG2E))
        shrink = tl.exp2((peak - higher) * (unit * LOG2E))
        total = total * shrink + tl.sum(weight, 1)
        peak = higher
        if seed is not None:
            keep = kept(seed, (begin + position) * heads + head, first, prefix, dropout_p, ROWS, COLUMNS)
            weight = tl.where(keep, weight, 0.0)
        sums = tl.dot(weight.to(v.dtype), v, sums * shrink[:, None], input_precision=PRECISION)
    blind = total == 0.0  # a row past the end, or one without any key
    total = tl.where(blind, 1.0, total)
    norm = 1.0 / total
    if seed is not None:
        norm = norm / (1.0 - dropout_p)
    store_rows(out, written, valid, sums * norm[:, None], FEATURES, FEATURES_BLOCK)
    log_sum = peak * unit + tl.log2(total) * LN2
    if relative_bias is not None or cu_seqlens_k is not None:
        log_sum = tl.where(blind, float("-inf"), log_sum)
    row = (begin + position) * heads + head
    if own_rows is None:
        tl.store(lse + row, log_sum, mask=valid)
        pair = peak_sum + 2 * row[:, None] + tl.arange(0, 2)[None, :]
        tl.store(pair, tl.join(peak, total), mask=valid[:, None])
    else:
        tl.store(lse + head * own_rows + begin + position, log_sum, mask=valid)
