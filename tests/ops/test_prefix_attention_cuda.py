"""The CUDA C++ kernels of prefix_attention: on a GPU where there is one, and everywhere in tests/cuda_emulator."""

import itertools
import random

import pytest
import torch
from cuda_emulator import load_emulated
from layouts import LAYOUTS, in_layout
from test_prefix_attention import MASKS, NAMES, check, gradients, in_layouts, inputs
from test_prefix_attention_dropout import check_given_the_mask, kept
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


def emulate(monkeypatch):
    """Backend "native" for tensors on the CPU is the emulator from here on."""
    emulated = load_emulated()
    monkeypatch.setattr(native, "_forward", emulated.prefix_attention.default)
    monkeypatch.setattr(native, "_backward", emulated.prefix_attention_backward.default)


@pytest.fixture(params=["emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where tensors lie for `run` to take them to the kernels."""
    if request.param == "emulator":
        emulate(monkeypatch)
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


def run(
    return_lse=True, backend=None, is_causal=False, window=None, softcap=None, dropout_p=0.0, prompt_rows=0, **args
):
    """prefix_attention through csrc/cuda/: past the choice of backend, which on the CPU has other kernels."""
    query, scale = _with_positive_scale(args["query"], args.get("scale"))
    options = is_causal, scale, window, softcap, args.get("prefix_in_window", False), dropout_p, prompt_rows
    return native.prefix_attention(
        *(query, *(args[name] for name in NAMES[1:]), args["cu_seqlens"], args["prefix_index"], *options),
        *(args.get("relative_bias"), args.get("cu_seqlens_k")),
    )


def output(**args):
    return run(**args)[0]


@pytest.mark.parametrize("lengths, mask, prefix, features, heads, index, dtype", CASES)
def test_values_and_gradients(device, lengths, mask, prefix, features, heads, index, dtype):
    args = inputs(lengths, prefix, features, heads, index=index, device=device, dtype=dtype)
    check(in_layouts(args, "aligned"), run=run, **mask)


@pytest.mark.parametrize("lengths, prefix, features, heads, dtype, options", [
    ([9, 70], 4, 64, (2, 2), torch.bfloat16, {"softcap": 2.0}),
    ([63, 0, 2], 65, 80, (3, 1), torch.float16, {"softcap": 5.0, "scale": 3.0, "is_causal": True}),
    ([40, 30], 17, 16, (4, 2), torch.float16, {"softcap": 1.5, "scale": -0.7, "window": 9, "prefix_in_window": True}),
])  # fmt: skip
def test_softcap(device, lengths, prefix, features, heads, dtype, options):
    check(inputs(lengths, prefix, features, heads, device=device, dtype=dtype), run=run, **options)


@pytest.mark.parametrize("options", [
    {}, {"softcap": 1e-30}, {"softcap": 9e37}, {"scale": 1e38, "softcap": 1e-30}, {"scale": 1e-30, "softcap": 1e-30},
    {"dropout_p": 1e-12}, {"dropout_p": 1 - 1e-12}, {"dropout_p": 1 - 2**-53, "softcap": 1.0},
], ids=str)  # fmt: skip
def test_softcap_and_dropout_at_the_edges(device, options):
    args = inputs([40, 3], 5, 16, (2, 1), device=device, dtype=torch.float16)
    out, lse = run(**args, **options)
    grads = gradients(out, args, torch.ones_like(out))
    assert all(x.isfinite().all() for x in (out, lse, *grads))
    if options.get("softcap", 0) == 9e37 or options.get("dropout_p", 1) == 1e-12:  # as good as without
        torch.testing.assert_close(out, run(**args)[0])
    if options.get("softcap") == 1e-30:  # all weights alike
        torch.testing.assert_close(out, run(**args, scale=0.0)[0])
    if options.get("dropout_p", 0) > 0.5:
        assert not out.any() and not any(x.any() for x in grads)


@pytest.mark.parametrize("features, dtype, options", [
    (64, torch.bfloat16, {"dropout_p": 0.1, "is_causal": True}),
    (64, torch.float16, {"dropout_p": 0.9, "window": 5, "prefix_in_window": True}),
    (80, torch.bfloat16, {"dropout_p": 0.3, "softcap": 1.5, "is_causal": True, "window": 9, "scale": -0.7}),
], ids=str)  # fmt: skip
def test_dropout_given_its_mask(device, features, dtype, options):
    args = inputs([40, 0, 1, 33], 20, features, (4, 2), device=device, dtype=dtype)
    check_given_the_mask(args, run=output, **options)


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
    if "query" in trains:
        options |= dict(softcap=2.0, dropout_p=0.3)
    check_subset(args, NAMES, trains, options)


@pytest.mark.parametrize("trains", [c for n in (1, 2) for c in itertools.combinations(NAMES[:3], n)], ids="-".join)
def test_every_subset_of_requires_grad_with_prompt_rows(device, trains):
    args = with_prompt(inputs([20, 70, 0, 3], 0, 16, (2, 1), 1, None, device=device, dtype=torch.bfloat16), 20)
    check_subset(args, NAMES[:3], trains, dict(is_causal=True, prompt_rows=20, dropout_p=0.3 if trains[1:] else 0.0))


def check_subset(args, names, trains, options):
    torch.manual_seed(3)
    out, _ = run(**args, **options)
    whole = torch.autograd.grad(out, [args[name] for name in names], grad := torch.randn_like(out))
    args |= {name: args[name].detach().requires_grad_(name in trains) for name in NAMES}
    torch.manual_seed(3)
    run(**args, **options)[0].backward(grad)
    for name, gradient in zip(names, whole, strict=True):
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
    ({"softcap": -2.0}, "softcap must be positive, or 0 for none, got -2"),
    ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1"),
    ({"relative_bias": torch.zeros(6, 5)}, "relative_bias must be None on CUDA, .* got a tensor"),
    ({"cu_seqlens_k": torch.zeros(3, dtype=torch.int32)}, "cu_seqlens_k must be None on CUDA, .* got a tensor"),
])  # fmt: skip
def test_what_the_operator_refuses(device, change, match):
    shape = {"features": 16, "dtype": torch.float16}
    args = inputs([3, 4], **{name: change.get(name, x) for name, x in shape.items()}, device=device)
    with pytest.raises(RuntimeError, match=match):
        run(**args, **{name: x for name, x in change.items() if name not in shape})


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[384, 97, 1, 0, 130], [1000]], ids=str)
@pytest.mark.parametrize("prefix, features", [(32, 64), (257, 128), (1024, 64)])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_long(lengths, prefix, features, mask):
    check(inputs(lengths, prefix, features, (6, 2), device="cuda", dtype=torch.bfloat16), backend="native", **mask)


def with_prompt(args, prompt_rows):
    """The first segment is a prompt, which cu_seqlens does not count."""
    return args | {"cu_seqlens": args["cu_seqlens"][1:] - prompt_rows}


@pytest.mark.parametrize("prompt_rows, lengths, heads, mask, softcap", [
    (1, [5, 0, 66], (2, 1), {}, None), (70, [], (2, 2), {"window": 20}, None),
    (10, [30, 0, 65], (4, 2), {"window": 20}, None), (17, [1] * 40, (16, 16), {}, None),  # more than splits
    (65, [3, 40], (3, 1), {"window": 9, "prefix_in_window": True}, None),
    (20, [2, 70], (2, 1), {"window": 30, "prefix_in_window": True}, 1.5),
])  # fmt: skip
def test_prompt_rows(device, prompt_rows, lengths, heads, mask, softcap):
    """One launch each way; by the error of plain PyTorch, which takes two."""
    every = inputs([prompt_rows, *lengths], 0, 32, heads, 1, None, device=device, dtype=torch.bfloat16)
    args, names = with_prompt(every, prompt_rows), NAMES[:3]
    args["prefix_index"] = torch.zeros(len(lengths), dtype=torch.int32, device=device)  # may be given: the one there is
    options = True, 0.25, mask.get("window"), softcap, mask.get("prefix_in_window", False), 0.0
    results = [run(**args, **mask, is_causal=True, scale=0.25, softcap=softcap, prompt_rows=prompt_rows)]
    leaves = [[args[name] for name in names]]
    for dtype in torch.bfloat16, torch.float64:
        leaves.append([args[name].detach().to(dtype).requires_grad_() for name in names])
        results.append(_in_two_calls("reference", *leaves[-1], args["cu_seqlens"], prompt_rows, options))
    grad = torch.randn_like(results[0][0])
    got, plain, want = (
        (*result, *torch.autograd.grad(result[0], each, grad.to(each[0].dtype)))
        for result, each in zip(results, leaves, strict=True)
    )
    for name, x, plainly, exactly in zip(("output", "lse", *names), got, plain, want, strict=True):
        error, plain_error = ((y.double() - exactly).abs().max() for y in (x, plainly))
        assert error <= 2 * plain_error + torch.finfo(grad.dtype).eps * exactly.abs().max(), name


def test_the_mask_of_dropout_is_that_of_the_cpu(monkeypatch):
    args = inputs([70, 0, 30], 50, 128, (4, 2), dtype=torch.bfloat16)
    prompted = with_prompt(inputs([20, 70, 0, 30], 0, 128, (4, 2), 1, None, dtype=torch.bfloat16), 20)
    prompted |= {"prefix_key": None, "prefix_value": None, "prompt_rows": 20, "is_causal": True}
    unit = torch.eye(128, dtype=torch.bfloat16)[[*range(90), *range(20, 50)]]  # of each key a row sees, another
    prompted["value"] = unit[:, None].expand(prompted["key"].shape)

    def masks():
        torch.manual_seed(3)
        return prefix_attention(**prompted, dropout_p=0.4, backend="native") != 0, kept(args, 3, dropout_p=0.4)

    of_cpu = masks()
    emulate(monkeypatch)
    assert all(map(torch.equal, of_cpu, masks())) and 0.5 < of_cpu[0][-1, :, :50].double().mean() < 0.7


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
