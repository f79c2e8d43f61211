"""Triton kernels of "infonce". With s_ij = u_i . v_j / temperature over the rows that are kept, loss i is

    (log sum_j exp(s_ij - s_ii) + log sum_j exp(s_ji - s_ii)) / 2

No s is kept: a program sweeps over the columns of its rows as flash attention does. unit (2, N, Dt) holds u and v; side 0
is the rows of u against those of v, side 1 the other way round.
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


@triton.jit
def infonce_kernel(
    unit,
    row_weight,
    lse,
    losses,
    rows,
    scale,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
):
    """Both sides' log-sum-exp and loss: (2, N). Grid: (tiles of N, 2)."""
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
    log_total = tl.log(tl.where(kept, total, 1.0))
    written = side * rows + row
    tl.store(lse + written, tl.where(kept, peak + log_total, 0.0), mask=row < rows)
    # Not lse - own: at a small temperature both are large.
    tl.store(losses + written, tl.where(kept, (peak - own) + log_total, 0.0), mask=row < rows)


@triton.jit
def similarity_gradient_kernel(
    unit,
    row_weight,
    share,
    lse,
    grad,
    side,
    first,
    end,
    rows,
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
    row_lse = tl.load(lse + side * rows + row, mask=kept, other=0.0)
    column_lse = tl.load(lse + (1 - side) * rows + column, mask=kept_column, other=0.0)
    own = tl.where(row[:, None] == column[None, :], 1.0, 0.0)
    row_share = load_share(share, row, kept, share_scale)[:, None]
    column_share = load_share(share, column, kept_column, share_scale)[None, :]
    ds = row_share * (tl.exp(s - row_lse[:, None]) - own) + column_share * (tl.exp(s - column_lse[None, :]) - own)
    ds = tl.where(kept[:, None] & kept_column[None, :], ds * (0.5 * scale), 0.0)
    target = grad + local.to(tl.int64)[:, None] * rows + column[None, :]
    tl.store(target, ds.to(grad.dtype.element_ty), mask=(row < end)[:, None] & (column < rows)[None, :])
