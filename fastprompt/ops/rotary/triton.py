"""rotary through Triton: query and key in one launch. Imported only where triton is there."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._autograd import direct, with_derivative
from .._triton import power_of_2, readable

TILE = 512  # pairs of a program


@triton.jit
def turn(
    x, out, cos, sin, row, first_head, heads, x_row, x_head, cos_row, sin_row,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """HEADS heads of a row, each pair (x_d, x_{d + D/2}) by the angle of d."""
    head, d = first_head + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    turned = d < HALF
    mask = (head < heads)[:, None] & turned[None, :]
    c = tl.load(cos + row * cos_row + d, mask=turned, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + row * sin_row + d, mask=turned, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        s = -s
    place = x + row * x_row + head.to(tl.int64)[:, None] * x_head + d[None, :]  # 64 bit: T * H * D may pass 2**31
    first = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=mask, other=0.0).to(tl.float32)
    to = out + (row * heads + head[:, None]) * (2 * HALF) + d[None, :]
    tl.store(to, (first * c - second * s).to(out.dtype.element_ty), mask=mask)
    tl.store(to + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=mask)


@triton.jit
def rotary_kernel(
    query, key, cos, sin, out_query, out_key, heads, kv_heads,
    query_row, query_head, key_row, key_head, cos_row, sin_row,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    of_query = (heads + HEADS - 1) // HEADS  # programs, and then those of the key
    blocks = of_query + (kv_heads + HEADS - 1) // HEADS
    program = tl.program_id(0)
    row, block = (program // blocks).to(tl.int64), program % blocks
    if block < of_query:
        turn(
            query, out_query, cos, sin, row, block * HEADS, heads, query_row, query_head, cos_row, sin_row,
            INVERSE, HEADS, HALF, BLOCK,
        )  # fmt: skip
    else:
        turn(
            key, out_key, cos, sin, row, (block - of_query) * HEADS, kv_heads, key_row, key_head, cos_row,
            sin_row, INVERSE, HEADS, HALF, BLOCK,
        )  # fmt: skip


torch.library.define(
    "fastprompt::rotary_triton", "(Tensor query, Tensor key, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)"
)


def run(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    rows, heads, features = query.shape
    kv_heads, dtype = key.shape[1], query.dtype
    query, key, cos, sin = (readable(x) for x in (query, key, cos, sin))
    out = [x.new_empty(x.shape) for x in (query, key)]
    block = power_of_2(features // 2)
    each = max(1, min(TILE // block, power_of_2(max(heads, kv_heads))))
    programs = rows * (-(-heads // each) - (-kv_heads // each))
    if programs and features:
        with torch.cuda.device_of(query):
            rotary_kernel[(programs,)](
                *(query, key, cos, sin, *out, heads, kv_heads),
                *(*query.stride()[:2], *key.stride()[:2], cos.stride(0), sin.stride(0)),
                INVERSE=inverse,
                HEADS=each,
                HALF=features // 2,  # not an argument: 16-byte loads need to know that 8 divides it
                BLOCK=block,
                num_warps=max(2, block // 512),
            )
    return tuple(x.to(dtype) for x in out)


torch.library.impl("fastprompt::rotary_triton", ("cpu", "cuda"), run)


@torch.library.register_fake("fastprompt::rotary_triton")
def _(query: Tensor, key: Tensor, *_) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *_, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx, grad_query: Tensor, grad_key: Tensor) -> tuple:
    back = _operator if torch.is_grad_enabled() else _direct  # under create_graph=True it is differentiated again
    return *back(grad_query, grad_key, *ctx.saved_tensors, not ctx.inverse), None, None, None


_operator = torch.ops.fastprompt.rotary_triton.default
_direct = direct(_operator, run)
_run = with_derivative(_operator, _save, _differentiate, run)


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _run(query, key, cos, sin, False)
