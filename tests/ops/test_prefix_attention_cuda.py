"""The CUDA C++ kernels of prefix_attention: on a GPU where there is one, and everywhere in tests/cuda_emulator."""

import itertools
import random

import pytest
import torch
from emulated import load_emulated
from test_prefix_attention import MASKS, NAMES, check, gradients, inputs

from fastprompt import _native
from fastprompt.ops import prefix_attention

if not _native.available("cpu"):
    pytest.skip(str(_native.why_not("cpu")), allow_module_level=True)

from fastprompt.ops.prefix_attention import native  # noqa: E402

DTYPES = (torch.bfloat16, torch.float16)
# Every list of lengths with every mask; the rest drawn, with a seed that lets nearly all pairs of values meet.
LENGTHS = [[1, 0, 15], [16, 17], [63, 0, 1], [64, 65], [97], [130, 3]]
REST = [[0, 1, 17, 64, 130], [32, 64, 80, 128], [(2, 2), (3, 1), (4, 1), (6, 2)], [None, torch.int64, torch.int32]]
RNG = random.Random(5)
CASES = [
    (lengths, mask, *map(RNG.choice, REST), DTYPES[n % 2])
    for n, (lengths, mask) in enumerate(itertools.product(LENGTHS, MASKS))
]


@pytest.fixture(params=["emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def where(request, monkeypatch):
    """The device whose tensors the kernels take, with prefix_attention(backend="native") set to run them."""
    if request.param == "emulator":
        emulated = load_emulated()
        monkeypatch.setattr(native, "_forward", emulated.prefix_attention.default)
        monkeypatch.setattr(native, "_backward", emulated.prefix_attention_backward.default)
        yield "cpu"
    else:
        if not _native.available("cuda"):
            pytest.skip(_native.why_not("cuda"))
        yield "cuda"


@pytest.fixture(autouse=True)
def setting():
    torch.manual_seed(0)  # the budget of few numbers is a matter of luck: let it be the same luck every time
    # New memory is filled with NaN in this mode: what a kernel leaves out of its outputs, or of its sums, shows.
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(was)


def run(*tensors, prefix_index=None, is_causal=False, scale=None, window=None, prefix_in_window=False, **kwargs):
    """prefix_attention without its choice of backend, which has no float16 on the CPU."""
    args = dict(zip((*NAMES, "cu_seqlens"), tensors, strict=False)) | kwargs
    scale = args["query"].shape[-1] ** -0.5 if scale is None else scale
    tensors = (among_nan(args[name]) for name in NAMES)
    out, lse = native.prefix_attention(
        *(*tensors, args["cu_seqlens"], prefix_index, is_causal, scale, window, prefix_in_window)
    )
    return (out, lse) if kwargs.get("return_lse") else out


def among_nan(x):
    """x between rows of NaN, which a step out of bounds would read."""
    return torch.nn.functional.pad(x, (0, 16, 0, 1, 3, 9), value=torch.nan)[..., 3:-9 or None, :-1, :-16]


@pytest.mark.parametrize("lengths, mask, prefix, features, heads, index, dtype", CASES)
def test_values_and_gradients(where, lengths, mask, prefix, features, heads, index, dtype):
    check(inputs(lengths, prefix, features, heads, index=index, device=where, dtype=dtype), run=run, **mask)
