"""Pooling of packed segments through Triton. Imported only where triton is there.

All launches follow from shapes; no value on the device is read on the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import INTERPRETED, cdiv, search_steps, segment_of, why_not
from ._autograd import differentiable

__all__ = ["segment_pool", "why_not"]

TILE = dict(ROWS=32, COLUMNS=64)  # narrow, so that a few segments are many programs


@triton.jit
def taken_rows(cu_seqlens, segment, TAKE: tl.constexpr):
    """(begin, end) of the rows that are pooled: all of a segment, its first (TAKE 1) or its last (-1)."""
    begin, end = tl.load(cu_seqlens + segment), tl.load(cu_seqlens + segment + 1)
    if TAKE > 0:
        end = tl.minimum(end, begin + 1)
    if TAKE < 0:
        begin = tl.maximum(begin, end - 1)
    return begin, end


@triton.jit(do_not_specialize_on_alignment=["cu_seqlens"])
def pool_kernel(hidden, cu_seqlens, pooled, width, TAKE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    segment = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = taken_rows(cu_seqlens, segment, TAKE)
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)  # one for each row of the tile until the end
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & (column < width)[None, :]
        offset = row.to(tl.int64)[:, None] * width + column[None, :]  # 64 bit: T * E may pass 2**31
        sums += tl.load(hidden + offset, mask=mask, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(sums, axis=0), tl.maximum(end - begin, 1).to(tl.float32))
    to = pooled + segment.to(tl.int64) * width + column
    tl.store(to, mean.to(pooled.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=["segments", "steps", "rows"], do_not_specialize_on_alignment=["cu_seqlens"])
def spread_kernel(
    grad,
    cu_seqlens,
    grad_hidden,
    segments,
    steps,
    rows,
    width,
    TAKE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    segment = segment_of(row, cu_seqlens, segments, steps)
    begin, end = taken_rows(cu_seqlens, segment, TAKE)
    taken, inside = (row >= begin) & (row < end), (column < width)[None, :]
    offset = segment.to(tl.int64)[:, None] * width + column[None, :]
    value = tl.load(grad + offset, mask=taken[:, None] & inside, other=0.0).to(tl.float32)
    value = tl.div_rn(value, tl.maximum(end - begin, 1).to(tl.float32)[:, None])
    to = grad_hidden + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(to, value.to(grad_hidden.dtype.element_ty), mask=(row < rows)[:, None] & inside)


def _pool(hidden: Tensor, cu_seqlens: Tensor, take: int) -> Tensor:
    width, segments = hidden.shape[1], cu_seqlens.shape[0] - 1
    source, cu_seqlens = _computable(hidden), cu_seqlens.contiguous()
    pooled = source.new_empty(segments, width)
    if pooled.numel():
        with torch.cuda.device_of(hidden):
            pool_kernel[(segments, cdiv(width, TILE["COLUMNS"]))](
                *(source, cu_seqlens, pooled, width), TAKE=take, **TILE
            )
    return pooled.to(hidden.dtype)


def _spread(grad: Tensor, cu_seqlens: Tensor, rows: int, take: int) -> Tensor:
    width, segments = grad.shape[1], cu_seqlens.shape[0] - 1
    source, cu_seqlens = _computable(grad), cu_seqlens.contiguous()
    grad_hidden = source.new_empty(rows, width)
    if grad_hidden.numel():
        with torch.cuda.device_of(grad):
            spread_kernel[(cdiv(rows, TILE["ROWS"]), cdiv(width, TILE["COLUMNS"]))](
                *(source, cu_seqlens, grad_hidden, segments, search_steps(segments), rows, width),
                TAKE=take,
                **TILE,
            )
    return grad_hidden.to(grad.dtype)


def _computable(x: Tensor) -> Tensor:
    """x contiguous, in a type that the interpreter can compute with: it has no bfloat16."""
    return (x.float() if INTERPRETED and x.dtype == torch.bfloat16 else x).contiguous()


_segment_pool = torch.library.custom_op("fastprompt::segment_pool_triton", _pool, mutates_args=())
_segment_pool_backward = torch.library.custom_op("fastprompt::segment_pool_triton_backward", _spread, mutates_args=())


@_segment_pool.register_fake
def _(hidden: Tensor, cu_seqlens: Tensor, take: int) -> Tensor:
    return hidden.new_empty(cu_seqlens.shape[0] - 1, hidden.shape[1])


@_segment_pool_backward.register_fake
def _(grad: Tensor, cu_seqlens: Tensor, rows: int, take: int) -> Tensor:
    return grad.new_empty(rows, grad.shape[1])


segment_pool = differentiable(
    torch.ops.fastprompt.segment_pool_triton.default,
    torch.ops.fastprompt.segment_pool_triton_backward.default,
    _pool,
    _spread,
)
