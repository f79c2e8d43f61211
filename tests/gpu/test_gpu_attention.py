"""prefix_attention on a GPU as it comes: heads of any size and grouping, banks, windows, and no backend named."""

import itertools

import pytest
import torch
from stock import check
from torch import Tensor

from fastprompt import ops

BF16 = torch.bfloat16
LENGTHS = (37, 1, 0, 64, 129)
# D, query heads a key head, number of prefixes, options
HEADS = [
    (64, 1, 1, dict(is_causal=True)),
    (64, 8, 3, dict()),
    (80, 2, 2, dict(is_causal=True, window=20)),
    (96, 3, 1, dict(window=5)),
    (96, 4, 2, dict(is_causal=True)),
    (112, 5, 2, dict(is_causal=True, window=9, prefix_in_window=True)),
    (112, 6, 1, dict(is_causal=True, prompt_rows=7)),
    (128, 7, 3, dict()),
    (128, 4, 1, dict(is_causal=True, softcap=20.0)),
    (256, 8, 1, dict(is_causal=True, window=70)),
    (256, 1, 2, dict(window=70)),
]


def bounds(lengths, device: str) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, BF16) for case in HEADS), *((case, torch.float32) for case in HEADS[3::4])], ids=str
)
def test_prefix_attention_by_default(device, case, dtype):
    """Out of the box, no backend named: heads of any size and grouping, banks, windows, causal or not."""
    features, group, entries, options = case
    heads, prompt = 2 * group, options.get("prompt_rows", 0)
    rows = sum(LENGTHS) + prompt
    shapes = [(rows, heads, features), *[(rows, 2, features)] * 2]
    shapes += [] if prompt else [(entries, 2, 19, features)] * 2
    leaves = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]
    index = None if entries == 1 else torch.randint(entries, (len(LENGTHS),), device=device)
    outer = torch.randn(rows, heads, features, device=device, dtype=dtype)

    def run(dtype: torch.dtype, backend: str | None = None) -> dict[str, Tensor]:
        tensors = [x.detach().to(dtype).requires_grad_() for x in leaves]
        query, key, value, *prefix = tensors
        out = ops.prefix_attention(
            *(query, key, value, *(prefix or (None, None)), bounds(LENGTHS, device)),
            prefix_index=index,
            backend=backend,
            **options,
        )
        grads = torch.autograd.grad(out, tensors, outer.to(dtype))
        names = "query", "key", "value", "prefix_key", "prefix_value"
        return {"out": out.detach()} | dict(zip(names, grads, strict=False))

    check(run(dtype), run(torch.float64, "reference"), run(dtype, "reference"), dtype)
