"""gated through Triton. Imported only where triton is there."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._autograd import direct, once_differentiable, with_derivative
from .._triton import power_of_2, readable

ACTIVATIONS = ("silu", "gelu_tanh")
BLOCK = 1024  # numbers of a program


@triton.jit
def exponential(x):
    """e^x to the last places, which tl.exp has only near 0; infinity above float32, 0 below e^-87, NaN of NaN."""
    x = tl.where(x < -87.3, -87.3, x)
    x = tl.where(x > 89.0, 89.0, x)
    n = tl.floor(x * 1.44269504 + 0.5)
    rest = (x - n * 0.693359375) - n * -2.12194440e-4  # ln(2) in two parts: the first product is exact
    scale = (n.to(tl.int32) + 126) << 23  # of 2^(n - 1): 2^128 has no bits, though half of the result may be a number
    return tl.exp2(rest * 1.44269504) * scale.to(tl.float32, bitcast=True) * 2.0


@triton.jit
def sigmoid(x, ACTIVATION: tl.constexpr):
    """(s(v(x)), 1 - s(v(x)), v'(x)): both activations are x s(v(x)), s the sigmoid.

    For (1 + tanh(u)) / 2 = s(2 u), gelu in its tanh approximation has v(x) = 2 sqrt(2 / pi) (x + 0.044715 x^3).
    """
    v = x
    slope = tl.full(x.shape, 1.0, tl.float32)
    if ACTIVATION == "gelu_tanh":
        square = tl.where(x * x > 1024.0, 1024.0, x * x)  # s is 0 or 1 from there on; more would overflow
        v = 1.5957691216057308 * x * (1.0 + 0.044715 * square)
        slope = 1.5957691216057308 * (1.0 + 3 * 0.044715 * square)
    e = exponential(-v)
    value = tl.div_rn(1.0, 1.0 + e)
    rest = tl.where(e > 3.4028234663852886e38, 3.4028234663852886e38, e) * value  # 0, not NaN, where s is 0
    return value, rest, slope


@triton.jit
def place(width, blocks, COLUMNS: tl.constexpr):
    """(row, columns, which are inside) of this program. Rows are whole, so that none needs a mask: widths are few and
    mostly even, and a mask by the number of all elements would be as many kernels or no loads of 16 bytes."""
    program = tl.program_id(0)
    column = (program % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    return (program // blocks).to(tl.int64), column, column < width


@triton.jit
def gated_kernel(gate, up, out, width, blocks, gate_stride, up_stride, ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, mask = place(width, blocks, COLUMNS)
    x = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    value, _, _ = sigmoid(x, ACTIVATION)
    tl.store(out + row * width + column, (x * value * u).to(out.dtype.element_ty), mask=mask)


@triton.jit
def gated_backward_kernel(
    grad, gate, up, grad_gate, grad_up, width, blocks, grad_stride, gate_stride, up_stride,
    ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, mask = place(width, blocks, COLUMNS)
    g = tl.load(grad + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    value, rest, slope = sigmoid(x, ACTIVATION)
    product = x * value
    to = row * width + column
    tl.store(grad_gate + to, (g * u * (value + product * rest * slope)).to(grad_gate.dtype.element_ty), mask=mask)
    tl.store(grad_up + to, (g * product).to(grad_up.dtype.element_ty), mask=mask)


def _launch(kernel, activation: str, outputs: int, *inputs: Tensor) -> list[Tensor]:
    """Run a kernel over inputs of one shape. Returns its outputs, of that shape."""
    like = inputs[0]
    tensors = [readable(tensor if tensor.ndim else tensor[None]) for tensor in inputs]
    out = [tensors[0].new_empty(like.shape) for _ in range(outputs)]
    if like.numel():
        width = tensors[0].shape[-1]
        tensors = [tensor.reshape(-1, width) for tensor in tensors]
        columns = min(BLOCK, power_of_2(width))
        blocks = -(-width // columns)
        with torch.cuda.device_of(like):
            kernel[(tensors[0].shape[0] * blocks,)](
                *(*tensors, *out, width, blocks, *(tensor.stride(0) for tensor in tensors)),
                ACTIVATION=activation,
                COLUMNS=columns,
            )
    return [tensor.to(like.dtype) for tensor in out]


torch.library.define("fastprompt::gated_triton", "(Tensor gate, Tensor up, str activation) -> Tensor")
torch.library.define(
    "fastprompt::gated_triton_backward", "(Tensor grad, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)"
)


def run(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return _launch(gated_kernel, activation, 1, gate, up)[0]


torch.library.impl("fastprompt::gated_triton", ("cpu", "cuda"), run)


def run_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return tuple(_launch(gated_backward_kernel, activation, 2, grad, gate, up))


torch.library.impl("fastprompt::gated_triton_backward", ("cpu", "cuda"), run_backward)


@torch.library.register_fake("fastprompt::gated_triton")
def _(gate: Tensor, *_) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.register_fake("fastprompt::gated_triton_backward")
def _(grad: Tensor, gate: Tensor, *_) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _differentiate(ctx, grad: Tensor) -> tuple:
    return *_backward(grad, *ctx.saved_tensors, ctx.activation), None


_backward = direct(torch.ops.fastprompt.gated_triton_backward.default, run_backward)
gated = with_derivative(
    torch.ops.fastprompt.gated_triton.default, _save, once_differentiable("gated", _differentiate), run
)
