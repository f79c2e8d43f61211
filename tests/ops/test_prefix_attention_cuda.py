"""The CUDA C++ kernels of prefix_attention: on a GPU where there is one, and everywhere in tests/cuda_emulator."""

import itertools
import random

import pytest
import torch
from cuda_emulator import load_emulated
from layouts import LAYOUTS, in_layout
from test_prefix_attention import MASKS, NAMES, check, in_layouts, inputs
from test_prefix_attention_limits import check_without_slack, with_scores

from fastprompt import _native
from fastprompt.ops import prefix_attention

if not _native.available("cpu"):
    pytest.skip(str(_native.why_not("cpu")), allow_module_level=True)

from fastprompt.ops.prefix_attention import _in_two_calls, _with_positive_scale, native  # noqa: E402

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
def device(request, monkeypatch):
    """Where tensors lie for `run` to take them to the kernels."""
    if request.param == "emulator":
        emulated = load_emulated()
        monkeypatch.setattr(native, "_forward", emulated.prefix_attention.default)
        monkeypatch.setattr(native, "_backward", emulated.prefix_attention_backward.default)
        return "cpu"
    if not _native.available("cuda"):
        pytest.skip(_native.why_not("cuda"))
    return "cuda"


@pytest.fixture(autouse=True)
def setting():
    torch.manual_seed(0)  # the budget of few numbers is a matter of luck: let it be the same luck every time
    # New memory is filled with NaN in this mode: what a kernel leaves out of its outputs, or of its sums, shows.
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(was)


def run(return_lse=True, backend=None, **args):
    """prefix_attention through csrc/cuda/: past the choice of backend, which on the CPU has other kernels."""
    query, scale = _with_positive_scale(args["query"], args.get("scale"))
    options = args.get("is_causal", False), scale, args.get("window"), None, args.get("prefix_in_window", False), 0.0
    return native.prefix_attention(
        query, *(args[name] for name in NAMES[1:]), args["cu_seqlens"], args["prefix_index"], *options
    )


@pytest.mark.parametrize("lengths, mask, prefix, features, heads, index, dtype", CASES)
def test_values_and_gradients(device, lengths, mask, prefix, features, heads, index, dtype):
    args = inputs(lengths, prefix, features, heads, index=index, device=device, dtype=dtype)
    check(in_layouts(args, "aligned"), run=run, **mask)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [-0.7, 30.0])
def test_layouts_and_scales(device, layout, scale):
    args = in_layouts(inputs([20, 3], 17, 16, (4, 2), device=device, dtype=torch.float16), layout)
    check(args, lambda x: in_layout(torch.randn_like(x), layout), run, scale=scale)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e9, 1e30])
def test_scores_of_any_size(device, size):
    args = with_scores(inputs([9, 12], 5, 16, (4, 2), device=device, dtype=torch.bfloat16), size)
    check_without_slack(args, run, is_causal=size == 1e9)


def test_second_derivatives_are_refused(device):
    args = inputs([3], 2, 16, device=device, dtype=torch.bfloat16)
    (first,) = torch.autograd.grad(run(**args)[0].sum(), args["value"], create_graph=True)
    with pytest.raises(RuntimeError, match="prefix_attention has no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("lengths", [[], [0, 0], [0, 1]], ids=str)
@pytest.mark.parametrize("prefix", [0, 5])
def test_next_to_nothing(device, lengths, prefix):
    check(inputs(lengths, prefix, 32, device=device, dtype=torch.bfloat16), run=run)


@pytest.mark.parametrize("trains", [c for n in range(1, 6) for c in itertools.combinations(NAMES, n)], ids="-".join)
def test_every_subset_of_requires_grad(device, trains):
    args = inputs([70, 1, 25], 50, 32, (3, 1), device=device, dtype=torch.bfloat16)
    options = dict(is_causal=True, window=60, prefix_in_window=len(trains) % 2 == 0)
    out, _ = run(**args, **options)
    whole = torch.autograd.grad(out, [args[name] for name in NAMES], grad := torch.randn_like(out))
    args |= {name: args[name].detach().requires_grad_(name in trains) for name in NAMES}
    run(**args, **options)[0].backward(grad)
    for name, gradient in zip(NAMES, whole, strict=True):
        assert torch.equal(args[name].grad, gradient) if name in trains else args[name].grad is None


@pytest.mark.parametrize("bank, heads", [(1, (2, 2)), (3, (4, 1))])
def test_sums_over_many_segments_are_the_same_every_time(device, bank, heads):
    """More segments than splits, on the emulator in another order of blocks and threads."""
    args = inputs([1, 2, 0, 3] * 150, 9, 16, heads, bank, device=device, dtype=torch.bfloat16)
    check(args, run=run, window=2)
    results = []
    for _ in range(2):
        out, lse = run(**args, window=2)
        results.append((out, lse, *torch.autograd.grad(out, [args[n] for n in NAMES], torch.ones_like(out))))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("change, match", [
    ({"features": 8}, "16 features, up to 128, got 8"),
    ({"features": 144}, "16 features, up to 128, got 144"),
    ({"dtype": torch.float32}, "needs bfloat16 or float16 on CUDA, got Float"),
    ({"prompt_rows": 2}, "prompt_rows must be 0 on CUDA"),
    ({"softcap": 2.0}, "softcap must be 0, which is none, on CUDA, got 2"),
    ({"dropout_p": 0.5}, "dropout_p must be 0, without a seed, on CUDA, got 0.5"),
])  # fmt: skip
def test_what_the_operator_refuses(device, change, match):
    options = {"softcap": None, "dropout_p": 0.0, "prompt_rows": 0}
    shape = {"features": 16, "dtype": torch.float16}
    shape, options = ({n: change.get(n, x) for n, x in each.items()} for each in (shape, options))
    args = inputs([3, 4], **shape, device=device)
    with pytest.raises(RuntimeError, match=match):
        native.prefix_attention(*args.values(), True, 1.0, None, prefix_in_window=False, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[384, 97, 1, 0, 130], [1000]], ids=str)
@pytest.mark.parametrize("prefix, features", [(32, 64), (257, 128), (1024, 64)])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_long(lengths, prefix, features, mask):
    check(inputs(lengths, prefix, features, (6, 2), device="cuda", dtype=torch.bfloat16), backend="native", **mask)


def test_prompt_rows_are_a_call_of_their_own(device):
    args = inputs([10, 30, 0, 35], 0, 64, index=None, bank=1, device=device, dtype=torch.bfloat16)
    query, key, value = leaves = [args[name] for name in NAMES[:3]]
    bounds = (args["cu_seqlens"] - 10)[1:]
    options = True, 0.125, 20, None, False, 0.0  # is_causal, scale, window, softcap, prefix_in_window, dropout_p
    outs = [_in_two_calls(name, query, key, value, bounds, 10, options)[0] for name in ("native", "reference")]
    grads = (torch.autograd.grad(out, leaves, torch.ones_like(out)) for out in outs)
    torch.testing.assert_close(*outs, rtol=0.02, atol=0.02)
    torch.testing.assert_close(*grads, rtol=0.05, atol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("change, match", [
    ({"dtype": torch.float32}, "needs torch.bfloat16 or torch.float16 on cuda, got torch.float32"),
    ({"features": 24}, "needs D to be a multiple of 16 up to 128 on cuda, got 24"),
    ({"features": 256}, "needs D to be a multiple of 16 up to 128 on cuda, got 256"),
])  # fmt: skip
def test_what_the_function_refuses(change, match):
    shape = {"features": 64, "dtype": torch.bfloat16} | change
    with pytest.raises(ValueError, match=match):
        prefix_attention(**inputs([3, 4], **shape, device="cuda"), backend="native")
