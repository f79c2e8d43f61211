"""alignment_loss, forward and backward, against well-written eager PyTorch and `torch.compile` of it.

    python -m pytest benchmarks/bench_alignment_loss.py --benchmark-enable --benchmark-json=alignment.json

Student vectors and projection are trained, the teacher is frozen. Gradients are checked against float64, then the ways
take turns. On the CPU the peak of memory beyond inputs and gradients comes from a process of its own each.
"""

import json
import statistics
import sys

import pytest
import torch
import torch.nn.functional as F
from memory import high_water, in_process
from timing import in_turns, matrix_rate, ratio

from fastprompt.ops import alignment_loss

SHAPES = [("cosine", rows, size) for size in (384, 768, 1024) for rows in (16, 64, 256, 4096, 16384)]
SHAPES += [("infonce", rows, size) for size in (384, 768) for rows in (16, 64, 256, 4096, 8192)]
SHAPES += [("infonce+cosine", 64, 384), ("smooth_l1", 4096, 768)]
NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]


def eager(student, teacher, weight, distance):
    u, v = F.normalize(F.linear(student, weight), dim=-1), F.normalize(teacher, dim=-1)
    loss = 0
    for name in distance.split("+"):
        if name == "cosine":
            loss = loss + 1 - (u * v).sum(-1).mean()
        elif name == "smooth_l1":
            loss = loss + F.smooth_l1_loss(u, v)
        else:
            similarity, partner = u @ v.T / 0.05, torch.arange(len(u), device=u.device)
            loss = loss + (F.cross_entropy(similarity, partner) + F.cross_entropy(similarity.T, partner)) / 2
    return loss


def ours(student, teacher, weight, distance):
    return alignment_loss(student, teacher, weight, distance=distance)


def inputs(rows: int, size: int, device: str, dtype: torch.dtype):
    torch.manual_seed(0)
    student = torch.randn(rows, size, device=device, dtype=dtype, requires_grad=True)
    teacher = torch.randn(rows, size, device=device, dtype=dtype)
    weight = (torch.randn(size, size, device=device) / size**0.5).to(dtype).requires_grad_()
    return student, teacher, weight


def step(way, tensors, distance):
    return torch.autograd.grad(way(*tensors, distance), (tensors[0], tensors[2]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}-N{0[1]}-D{0[2]}".format)
def test_alignment_loss(benchmark, shape, device):
    distance, rows, size = shape
    tensors = inputs(rows, size, device, torch.float32 if device == "cpu" else torch.bfloat16)
    torch.compiler.reset()
    forwards = {"ours": ours, "eager": eager, "compiled": torch.compile(eager)}
    if rows <= 4096:
        check(forwards, tensors, distance)
    ways = {name: lambda way=way: step(way, tensors, distance) for name, way in forwards.items()}
    turns = max(5, min(101, 40_000 // rows))
    seconds = in_turns(ways, turns, device)
    mine = seconds.pop("ours")
    ratios = {name: ratio(theirs, mine) for name, theirs in seconds.items()}
    benchmark.extra_info |= {
        "ratios": ratios,
        "best_rival_over_ours": min(ratios.values()),
        "microseconds": statistics.median(mine) * 1e6,
        "useful_gflops": flops(*shape) / statistics.median(mine) / 1e9,
        "matrix_gflops": matrix_rate(device, dtype=tensors[0].dtype) / 1e9,
    }
    if device == "cpu" and rows >= 4096:
        benchmark.extra_info["peak_mib"] = {name: in_process(__file__, name, *shape) for name in ("ours", "eager")}
    print("", benchmark.extra_info)
    benchmark.pedantic(ways["ours"], rounds=3)


def flops(distance: str, rows: int, size: int) -> int:
    """What must be done: three products with the projection; two with the similarities, as the teacher is frozen."""
    return 6 * rows * size * size + ("infonce" in distance) * 4 * rows * rows * size


def check(forwards, tensors, distance) -> None:
    """Each way's gradients against float64, or the shape has no time."""
    exact = step(eager, [x.detach().double().requires_grad_(x.requires_grad) for x in tensors], distance)
    tolerance = 1e-5 if tensors[0].dtype == torch.float32 else 3e-2
    for name, way in forwards.items():
        for got, want in zip(step(way, tensors, distance), exact, strict=True):
            error = (got.double() - want).abs().max() / want.abs().max()
            assert error < tolerance, f"{name}: relative error {error:.1e}"


def _main() -> None:
    name, distance, rows, size = json.loads(sys.argv[1])
    way = {"ours": ours, "eager": eager}[name]
    step(way, inputs(64, size, "cpu", torch.float32), distance)  # what is set up once
    tensors = inputs(rows, size, "cpu", torch.float32)
    before, most = high_water(lambda: step(way, tensors, distance))
    print(most - before - (rows + size) * size * 4 / 2**20)  # beyond the gradients it returns


if __name__ == "__main__":
    _main()
