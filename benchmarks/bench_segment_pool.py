"""segment_mean, segment_first and segment_last against what a user would write, forward and backward, on the CPU or a
GPU.

    python -m pytest benchmarks/bench_segment_pool.py --benchmark-enable --benchmark-json=segment_pool.json

The rivals get what they need ready-made (the segment of each row, lengths, masks, indices), the padded ones also their
padded batch: no conversion is timed.
    index_add       sums by torch.index_add, over the lengths
    segment_reduce  torch.segment_reduce
    index           hidden[indices], for first and last
    masked          (padded * mask).sum(1) over the lengths
    bmm             1 / length, 0 for pads, times padded, as a batched matrix product
"""

from itertools import accumulate

import pytest
import torch

from fastprompt import _native
from fastprompt.ops import segment_first, segment_last, segment_mean

SHAPES = {  # segments, longest, ragged, width
    "sentences-384": (32, 40, True, 384),
    "sentences-768": (32, 40, True, 768),
    "passages-1024": (8, 384, False, 1024),
    "one-long": (1, 8192, False, 768),
}
FUNCTIONS = {"mean": segment_mean, "first": segment_first, "last": segment_last}
OURS = ["native", "triton", "reference"]
WAYS = [("mean", way) for way in [*OURS, "index_add", "segment_reduce", "masked", "bmm"]]
WAYS += [(pool, way) for pool in ("first", "last") for way in [*OURS, "index"]]
NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]


class Batch:
    """One problem as packed rows and as a padded batch, with what the rivals need ready-made."""

    def __init__(self, shape, device: str, dtype: torch.dtype) -> None:
        segments, longest, ragged, width = shape
        # 20 to 40 rows, 30 on average, where the longest is 40
        lengths = [longest - (n * 7 % (longest // 2 + 1) if ragged else 0) for n in range(segments)]
        self.hidden = torch.randn(sum(lengths), width, device=device).to(dtype).requires_grad_()
        self.grad = torch.randn(segments, width, device=device).to(dtype)
        self.cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        rows = self.hidden.detach().split(lengths)
        self.padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).requires_grad_()
        self.lengths = torch.tensor(lengths, device=device)
        self.owner = torch.arange(segments, device=device).repeat_interleave(self.lengths)
        self.valid = torch.arange(longest, device=device) < self.lengths[:, None]  # (B, L)
        self.mask = self.valid.to(dtype)[..., None]
        self.weights = (self.mask / self.lengths[:, None, None]).mT.contiguous()  # (B, 1, L)
        self.index = {"first": self.cu_seqlens[:-1].long(), "last": self.cu_seqlens[1:].long() - 1}

    def pool(self, pool: str, way: str) -> torch.Tensor:
        counts = self.lengths[:, None]
        match way:
            case "index_add":
                return torch.zeros_like(self.grad).index_add(0, self.owner, self.hidden) / counts
            case "segment_reduce":
                return torch.segment_reduce(self.hidden, "mean", lengths=self.lengths, initial=0, unsafe=True)
            case "index":
                return self.hidden[self.index[pool]]
            case "masked":
                return (self.padded * self.mask).sum(1) / counts
            case "bmm":
                return torch.bmm(self.weights, self.padded)[:, 0]
        return FUNCTIONS[pool](self.hidden, self.cu_seqlens, backend=way)

    def step(self, pool: str, way: str) -> tuple[torch.Tensor, torch.Tensor]:
        pooled, leaf = self.pool(pool, way), self.padded if way in ("masked", "bmm") else self.hidden
        (grad,) = torch.autograd.grad(pooled, leaf, self.grad)
        if grad.is_cuda:
            torch.cuda.synchronize()
        return pooled, grad

    def exact(self, pool: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled rows and the gradient of the packed ones, in float64, by a loop."""
        pooled, grad = self.grad.double(), self.hidden.detach().double().zero_()
        bounds = self.cu_seqlens.tolist()
        for b, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            rows = {"mean": slice(begin, end), "first": slice(begin, begin + 1), "last": slice(end - 1, end)}[pool]
            pooled[b] = self.hidden[rows].detach().double().mean(0)
            grad[rows] = self.grad[b].double() / len(grad[rows])
        return pooled, grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pool, way", WAYS)
def test_segment_pool(benchmark, device, shape, pool, way):
    if way == "native" and not (device == "cpu" and _native.available("cpu")):
        pytest.skip("native is for the CPU, where it was built")
    if way == "triton" and device == "cpu":
        pytest.skip("triton is for GPUs")
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    batch = Batch(SHAPES[shape], device, dtype)
    for result, exact in zip(batch.step(pool, way), batch.exact(pool), strict=True):
        if result.ndim == 3:
            assert not result[~batch.valid].any()
            result = result[batch.valid]
        # 16-bit rivals round each term of the sum; ours is held to a budget by tests/ops/test_segment_pool.py.
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps)

    benchmark.group = f"{pool} {shape} {device} {str(dtype).removeprefix('torch.')}"
    benchmark.extra_info["rows"] = len(batch.hidden)
    benchmark(batch.step, pool, way)
