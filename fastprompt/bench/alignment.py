"""alignment_loss, forward and backward: student vectors and projection are trained, the teacher is frozen.

The rivals:
    eager     the loss as one writes it well in plain PyTorch
    compiled  `torch.compile` of that
Liger has no such loss: its distillation losses compare logits.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.ops import alignment_loss

from .case import OURS, Case, Work

SHAPES = [("cosine", rows, size) for size in (384, 768, 1024) for rows in (16, 64, 256, 4096, 16384)]
SHAPES += [("infonce", rows, size) for size in (384, 768) for rows in (16, 64, 256, 4096, 8192)]
SHAPES += [("infonce+cosine", 64, 384), ("smooth_l1", 4096, 768)]
QUICK = [("cosine", 64, 384), ("infonce+cosine", 64, 384)]
SWEEP = [("infonce", rows, 384) for rows in (512, 1024, 2048, 4096, 8192)]
TEMPERATURE = 0.05


def cases() -> list[Case]:
    return [_case(*shape) for shape in SHAPES] + [_case(*shape, sweep="N") for shape in SWEEP]


def _case(distance: str, rows: int, size: int, sweep: str | None = None) -> Case:
    return Case(
        group="alignment",
        label=f"{distance}-N{rows}-D{size}" + (f"-grow-{sweep}" if sweep else ""),
        sizes={"N": rows, "D": size},
        make=lambda device, dtype, seed: _work(distance, rows, size, device, dtype, seed),
        quick=(distance, rows, size) in QUICK,
        sweep=sweep,
        memory=(OURS, "eager") if rows >= 4096 or sweep else (),
    )


def eager(student: Tensor, teacher: Tensor, weight: Tensor, distance: str) -> Tensor:
    u, v = F.normalize(F.linear(student, weight), dim=-1), F.normalize(teacher, dim=-1)
    loss = student.new_zeros(())
    for name in distance.split("+"):
        if name == "cosine":
            loss = loss + 1 - (u * v).sum(-1).mean()
        elif name == "smooth_l1":
            loss = loss + F.smooth_l1_loss(u, v)
        else:
            similarity, partner = u @ v.T / TEMPERATURE, torch.arange(len(u), device=u.device)
            loss = loss + (F.cross_entropy(similarity, partner) + F.cross_entropy(similarity.T, partner)) / 2
    return loss


def ours(student: Tensor, teacher: Tensor, weight: Tensor, distance: str) -> Tensor:
    return alignment_loss(student, teacher, weight, distance=distance, temperature=TEMPERATURE)


def _work(distance: str, rows: int, size: int, device: str, dtype: torch.dtype, seed: int) -> Work:
    torch.manual_seed(seed)
    student = torch.randn(rows, size, device=device, dtype=dtype, requires_grad=True)
    teacher = torch.randn(rows, size, device=device, dtype=dtype)
    weight = (torch.randn(size, size, device=device) / size**0.5).to(dtype).requires_grad_()
    tensors = student, teacher, weight

    def step(loss, tensors=tensors) -> list[Tensor]:
        return list(torch.autograd.grad(loss(*tensors, distance), (tensors[0], tensors[2])))

    @functools.cache
    def exact() -> list[Tensor]:
        return step(eager, [x.detach().double().requires_grad_(x.requires_grad) for x in tensors])

    compiled = _compiled()
    ways = {OURS: lambda: step(ours), "eager": lambda: step(eager), "compiled": lambda: step(compiled)}
    # Three products with the projection; two with the similarities, as the teacher is frozen.
    flops = 6 * rows * size**2 + ("infonce" in distance) * 4 * rows**2 * size
    elements = 3 * rows * size + 2 * size**2
    return Work(ways, lambda way: exact(), flops, elements, sum(x.nbytes for x in tensors))


@functools.cache
def _compiled():
    return torch.compile(eager)
