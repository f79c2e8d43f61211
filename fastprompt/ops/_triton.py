"""What the Triton backends of several operators share. Imported only where triton is there."""

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = triton.knobs.runtime.interpret


def why_not(x: Tensor) -> str | None:
    """What keeps the kernels from a tensor of this type and device; None if nothing does."""
    if x.dtype not in DTYPES:
        return f"computes in float32, bfloat16 or float16, got {x.dtype}"
    if x.device.type == "cpu" and not INTERPRETED:
        return "needs tensors on a GPU (or TRITON_INTERPRET=1 in the environment)"
    return None


def precision() -> str:
    """That of products of float32."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32x3"


def readable(x: Tensor) -> Tensor:
    """x with features side by side, in a type that the interpreter can compute with: it has no bfloat16."""
    if INTERPRETED and x.dtype == torch.bfloat16:
        x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)  # triton's own takes 5 us on the host


def power_of_2(number: int) -> int:
    """The least that is not below it, at a tenth of the cost of Triton's own."""
    return 1 << max(0, number - 1).bit_length()


def block_of(count: int) -> int:
    return max(16, power_of_2(count))  # 16: the least that tl.dot takes


def search_steps(segments: int) -> int:
    """Of `segment_of`."""
    return max(0, segments - 1).bit_length()


@triton.jit
def segment_of(row, cu_seqlens, segments, steps):
    """The segments of rows: each the last one to begin at or before its row."""
    segment = row * 0
    high = segment + segments
    for _ in range(steps):
        middle = (segment + high) // 2
        before = tl.load(cu_seqlens + middle) <= row
        segment = tl.where(before, middle, segment)
        high = tl.where(before, high, middle)
    return segment
