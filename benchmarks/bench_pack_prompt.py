"""pack_prompt against the stock way: gather, expand and concatenate, forward and backward, on the CPU or a GPU.

    python -m pytest benchmarks/bench_pack_prompt.py --benchmark-json=pack_prompt.json

Both get packed token ids and give the same packed rows: what padding costs the stock way is left out here.
"""

import pytest
import torch

from fastprompt import _native
from fastprompt.ops import pack_prompt

# name: (vocabulary, width, segments, mean length, prompt rows, per_segment)
SHAPES = {
    "encoder": (250_000, 384, 16, 30, 16, True),
    "encoder-large": (250_000, 1024, 64, 64, 100, True),
    "causal": (49_152, 576, 16, 30, 32, False),
    "causal-long": (128_256, 2048, 16, 384, 32, False),
}
NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]


def stock(embedding, input_ids, cu_seqlens, prompt, per_segment, lengths):
    tokens = torch.nn.functional.embedding(input_ids, embedding)
    if not per_segment:
        return torch.cat([prompt[0], tokens])
    rows = prompt[0].expand(len(lengths), -1, -1)
    return torch.cat([part for pair in zip(rows, tokens.split(lengths), strict=True) for part in pair])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", ["native", "reference", "stock"])
def test_pack_prompt(benchmark, device, shape, way):
    if way == "native" and not _native.available(device):
        pytest.skip(_native.why_not(device))
    vocabulary, width, segments, mean_length, prompt_rows, per_segment = SHAPES[shape]
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    lengths = torch.randint(mean_length // 2, 2 * mean_length - mean_length // 2, (segments,)).tolist()
    embedding = torch.randn(vocabulary, width, device=device, dtype=dtype)
    input_ids = torch.randint(vocabulary, (sum(lengths),), device=device)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    prompt = torch.randn(1, prompt_rows, width, device=device, dtype=dtype, requires_grad=True)
    arguments = embedding, input_ids, cu_seqlens, prompt

    def ours():
        return pack_prompt(*arguments, per_segment=per_segment, backend=way)

    def theirs():
        return stock(*arguments, per_segment, lengths)

    hidden = theirs()
    grad = torch.randn_like(hidden)

    def step(forward):
        (grad_prompt,) = torch.autograd.grad(forward(), prompt, grad)
        if device == "cuda":
            torch.cuda.synchronize()
        return grad_prompt

    exact = grad.double()[:prompt_rows] if not per_segment else None
    if per_segment:
        starts = cu_seqlens[:-1, None] + prompt_rows * torch.arange(segments, device=device)[:, None]
        exact = grad.double()[starts + torch.arange(prompt_rows, device=device)].sum(0)
    forward = theirs if way == "stock" else ours
    stock_error, error = ((step(run)[0].double() - exact).abs().max() for run in (theirs, forward))
    assert torch.equal(forward(), hidden)
    assert error <= 2 * stock_error + torch.finfo(dtype).eps * exact.abs().max()

    benchmark.group = f"{shape} {device} {str(dtype).removeprefix('torch.')}"
    benchmark.extra_info["rows"] = len(hidden)
    benchmark(step, forward)
