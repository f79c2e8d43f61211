"""pack_prompt, forward and backward: embeddings of packed token ids behind the prompt rows.

The rival, `concat`, is the stock way: gather, expand and concatenate. It gets packed ids and gives the same packed
rows: what padding costs it is left out here.
"""

import functools

import torch
from torch import Tensor

from fastprompt.ops import pack_prompt

from .case import OURS, Case, Work

# label: (vocabulary, width, segments, mean length, prompt rows, per_segment)
SHAPES = {
    "encoder": (250_000, 384, 16, 30, 16, True),
    "encoder-large": (250_000, 1024, 64, 64, 100, True),
    "causal": (49_152, 576, 16, 30, 32, False),
    "causal-long": (128_256, 2048, 16, 384, 32, False),
}


def cases() -> list[Case]:
    return [_case(label, *shape) for label, shape in SHAPES.items()]


@functools.lru_cache(1)
def _embedding(vocabulary: int, width: int, device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(vocabulary, width, device=device, dtype=dtype)  # common to all sets: only few rows are read


def _case(
    label: str, vocabulary: int, width: int, segments: int, mean_length: int, prompt: int, per_segment: bool
) -> Case:
    lengths = [mean_length // 2 + n * 7919 % mean_length for n in range(segments)]
    written = sum(lengths) + prompt * (segments if per_segment else 1)

    def make(device: str, dtype: torch.dtype, seed: int) -> Work:
        torch.manual_seed(seed)
        embedding = _embedding(vocabulary, width, device, dtype)
        ids = torch.randint(vocabulary, (sum(lengths),), device=device)
        cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        rows = torch.randn(1, prompt, width, device=device, dtype=dtype, requires_grad=True)
        grad = torch.randn(written, width, device=device, dtype=dtype)

        def concat() -> Tensor:
            tokens = torch.nn.functional.embedding(ids, embedding)
            if not per_segment:
                return torch.cat([rows[0], tokens])
            fronts = rows[0].expand(segments, -1, -1)
            return torch.cat([part for pair in zip(fronts, tokens.split(lengths), strict=True) for part in pair])

        def step(forward) -> list[Tensor]:
            hidden = forward()
            return [hidden, *torch.autograd.grad(hidden, rows, grad)]

        def exact(way: str) -> list[Tensor]:
            starts = (
                cu_seqlens[:-1] + prompt * torch.arange(segments, device=device) if per_segment else grad.new_zeros(1)
            )
            own = starts.long()[:, None] + torch.arange(prompt, device=device)
            return [concat().detach().double(), grad.double()[own].sum(0)[None]]

        def ours(backend: str | None = None) -> Tensor:
            return pack_prompt(embedding, ids, cu_seqlens, rows, per_segment=per_segment, backend=backend)

        ways = {OURS: ours, "concat": concat, "reference (ours)": lambda: ours("reference")}
        steps = {name: lambda way=way: step(way) for name, way in ways.items()}
        elements = (2 * written + (written if per_segment else prompt)) * width
        return Work(steps, exact, 0, elements, 2 * grad.nbytes)

    return Case(
        group="packing",
        label=label,
        sizes={"B": segments, "T": sum(lengths), "P": prompt, "D": width},
        make=make,
        quick=label == "encoder",
    )
