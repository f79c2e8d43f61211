"""rms_norm through Triton. Imported only where triton is there."""

from ctypes import c_float

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._autograd import direct, once_differentiable, with_derivative
from .._triton import power_of_2, readable

TILE = 2048  # numbers of a program, where rows are short


@triton.jit
def factor_of(square, width, eps):
    """1 / sqrt(mean + eps) of a row, exactly rounded: once a row, that costs nothing."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(square, width.to(tl.float32)) + eps))


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(x, weight, out, rows, width, x_stride, eps, offset, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # 64 bit: T * E may pass 2**31
    column = tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    a = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    factor = factor_of(tl.sum(a * a, axis=1), width, eps)
    y = a * factor[:, None] * (offset + w)[None, :]
    tl.store(out + row[:, None] * width + column[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def norm_backward_kernel(
    grad, x, weight, grad_x, rows, width, grad_stride, x_stride, eps, offset,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """With r = 1 / sqrt(mean(x^2) + eps), found again, and h = (offset + weight) grad: dx = r h - r^3 mean(h x) x."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    a = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + row[:, None] * grad_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    h = g * (offset + w)[None, :]
    factor = factor_of(tl.sum(a * a, axis=1), width, eps)
    along = factor * factor * factor * tl.div_rn(tl.sum(h * a, axis=1), width.to(tl.float32))
    dx = factor[:, None] * h - along[:, None] * a
    tl.store(grad_x + row[:, None] * width + column[None, :], dx.to(grad_x.dtype.element_ty), mask=mask)


def _launch(kernel, weight: Tensor, eps: float, offset: float, *rows_of: Tensor) -> Tensor:
    """Run a kernel over the rows of some tensors (..., D), of which x is the last. Returns its output, of x's shape."""
    *_, x = rows_of
    tensors = [readable(tensor) for tensor in rows_of]
    out = tensors[-1].new_empty(x.shape)
    width = x.shape[-1]
    if out.numel():
        tensors = [tensor.reshape(-1, width) for tensor in tensors]
        rows, columns = tensors[0].shape[0], power_of_2(width)
        tile = max(1, TILE // columns)
        with torch.cuda.device_of(x):
            kernel[(-(-rows // tile),)](
                *(*tensors, readable(weight), out, rows, width, *(tensor.stride(0) for tensor in tensors)),
                *(c_float(eps).value, c_float(offset).value),  # what float32 makes of them, infinity included
                ROWS=tile,
                COLUMNS=columns,
                num_warps=min(16, max(4, columns // 512)),
            )
    return out.to(x.dtype)


torch.library.define("fastprompt::rms_norm_triton", "(Tensor x, Tensor weight, float eps, float offset) -> Tensor")
torch.library.define(
    "fastprompt::rms_norm_triton_backward", "(Tensor grad, Tensor x, Tensor weight, float eps, float offset) -> Tensor"
)


def run(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return _launch(norm_kernel, weight, eps, offset, x)


torch.library.impl("fastprompt::rms_norm_triton", ("cpu", "cuda"), run)


def run_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return _launch(norm_backward_kernel, weight, eps, offset, grad, x)


torch.library.impl("fastprompt::rms_norm_triton_backward", ("cpu", "cuda"), run_backward)


@torch.library.register_fake("fastprompt::rms_norm_triton")
def _(x: Tensor, *_) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("fastprompt::rms_norm_triton_backward")
def _(grad: Tensor, x: Tensor, *_) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, *ctx.options = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, grad: Tensor) -> tuple:
    return _backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


_backward = direct(torch.ops.fastprompt.rms_norm_triton_backward.default, run_backward)
rms_norm = with_derivative(
    torch.ops.fastprompt.rms_norm_triton.default, _save, once_differentiable("rms_norm", _differentiate), run
)
