"""Triton kernels of "infonce". With s_ij = u_i . v_j / temperature over the rows that are kept, loss i is

    (log sum_j exp(s_ij - s_ii) + log sum_j exp(s_ji - s_ii)) / 2

The losses are found as in flash attention, in one sweep over the columns. Gradients are those of s for a chunk of its
rows, in memory for torch.mm: the rows are too long for a program to hold the sums that flash attention keeps.

unit (2, N, Dt) holds u and v. Side 0 is the rows of u against those of v, side 1 the other way round.
"""

import triton
import triton.language as tl

from .triton_kernels import find_kept, load_share, product_tile


@triton.jit
def similarities(
    unit,
    side,
    row,
    column,
    rows,
    scale,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
):
    """(ROWS, COLUMNS) s_ij of one side."""
    row_offset, column_offset = side * rows + row, (1 - side) * rows + column
    product = product_tile(
        *(unit, unit, row_offset.to(tl.int64) * FEATURES, column_offset.to(tl.int64) * FEATURES),
        *(row < rows, column < rows, FEATURES, PRECISION, ROWS, COLUMNS, DEPTH_BLOCK),
    )
    return product * scale


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["peaks", "totals", "losses"])
def infonce_kernel(
    unit,
    row_weight,
    peaks,
    totals,
    losses,
    rows,
    scale,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
):
    """Of both sides, (2, N): max_j s_ij, sum_j exp(s_ij - max) and the loss. Grid: (tiles of N, 2)."""
    side = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kept = find_kept(row_weight, row, rows)
    peak = tl.full((ROWS,), -1e30, dtype=tl.float32)  # finite: a tile may hold no column that is kept
    total = tl.zeros((ROWS,), dtype=tl.float32)
    own = tl.zeros((ROWS,), dtype=tl.float32)
    for begin in range(0, rows, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        s = similarities(unit, side, row, column, rows, scale, FEATURES, PRECISION, ROWS, COLUMNS, DEPTH_BLOCK)
        own += tl.sum(tl.where(row[:, None] == column[None, :], s, 0.0), 1)
        s = tl.where(find_kept(row_weight, column, rows)[None, :], s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(s - higher[:, None]), 1)
        peak = higher
    # Never peak + log(total): at a small temperature that is large, and its rounding would show in each difference.
    written = side * rows + row
    tl.store(peaks + written, peak, mask=kept)
    tl.store(totals + written, total, mask=kept)
    log_total = tl.log(tl.where(kept, total, 1.0))
    tl.store(losses + written, (peak - own) + log_total, mask=kept)


@triton.jit
def softmax_gradient(s, own, peaks, totals, share, first, i, kept, scale, AXIS: tl.constexpr):
    """That of the losses i of one side; i, `kept` run along the rows of s or, with AXIS 0, along its columns."""
    peak = tl.expand_dims(tl.load(peaks + first + i, mask=kept, other=0.0), AXIS)
    total = tl.expand_dims(tl.load(totals + first + i, mask=kept, other=1.0), AXIS)
    return tl.expand_dims(load_share(share, i, kept, scale), AXIS) * (tl.exp(s - peak) / total - own)


@triton.jit(do_not_specialize=["side", "first", "end", "rows"], do_not_specialize_on_alignment=["peaks", "totals"])
def similarity_gradient_kernel(
    unit,
    row_weight,
    share,
    peaks,
    totals,
    grad,
    side,
    first,
    end,
    rows,
    grad_stride,
    scale,
    share_scale,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
):
    """grad (end - first, N): that of u_i . v_j for the rows i = first..end of one side.

    Grid: (tiles of N, tiles of end - first).
    """
    local = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row, column = first + local, tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    kept, kept_column = find_kept(row_weight, row, end), find_kept(row_weight, column, rows)
    s = similarities(unit, side, row, column, rows, scale, FEATURES, PRECISION, ROWS, COLUMNS, DEPTH_BLOCK)
    own = tl.where(row[:, None] == column[None, :], 1.0, 0.0)
    ds = softmax_gradient(s, own, peaks, totals, share, side * rows, row, kept, share_scale, 1)
    ds += softmax_gradient(s, own, peaks, totals, share, (1 - side) * rows, column, kept_column, share_scale, 0)
    ds = tl.where(kept[:, None] & kept_column[None, :], ds * (0.5 * scale), 0.0)
    target = grad + local.to(tl.int64)[:, None] * grad_stride + column[None, :]
    tl.store(target, ds.to(grad.dtype.element_ty), mask=(row < end)[:, None] & (column < rows)[None, :])
