"""prefix_attention at its limits: options and scores of any size, second derivatives, tensors without values."""

import itertools

import numpy as np
import pytest
import torch
from test_prefix_attention import NAMES, expected, gradients, inputs, mapped, randn, sums
from torch._subclasses.fake_tensor import FakeTensorMode

from fastprompt import _native
from fastprompt.ops import prefix_attention
from fastprompt.ops.prefix_attention import HAS_TRITON, LARGEST

if HAS_TRITON:
    from fastprompt.ops._triton import INTERPRETED
FUSED = ["native"] * _native.available("cpu") + ["triton"] * (HAS_TRITON and INTERPRETED)
BACKENDS = [*FUSED, "cpu", "reference"]


def results(args, grad=None, **options):
    """Output, log-sum-exp and gradients."""
    out, lse = prefix_attention(**args, **options, return_lse=True)
    return out, lse, *gradients(out, args, torch.ones_like(out) if grad is None else grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal, prefix_in_window", [(True, True), (False, True), (False, False)])
def test_a_window_of_any_size(backend, is_causal, prefix_in_window):
    args = inputs([1, 3], features=2, heads=(1, 1), dtype=torch.float32)
    options = dict(is_causal=is_causal, prefix_in_window=prefix_in_window, backend=backend)
    want = results(args, **options)
    for window in np.int64(LARGEST - 1), 2**31, *[2**31 - 1, 2**63 - 1, 2**63, 2**70] * (backend != "triton"):
        torch.testing.assert_close(results(args, window=window, **options), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_and_softcaps_of_any_size(backend):
    """What float32 cannot hold, or no longer to full precision, counts as what means the same."""
    args = inputs([1, 3], features=2, heads=(1, 1), dtype=torch.float32)
    for scale in -0.0, -1e-45, 1e-29, np.float32(-0.7), 1e30:
        got, want = results(args, scale=scale, backend=backend), results(args, scale=scale, backend="reference")
        assert all(x.isfinite().all() for x in got)
        torch.testing.assert_close(got[:2], want[:2])
    if backend != "cpu":
        for softcap in 1e-45, 1e-29, 1e30, torch.inf:
            alike = dict(scale=0.0) if softcap < 1 else {}
            got, want = results(args, softcap=softcap, backend=backend), results(args, **alike, backend="reference")
            assert all(x.isfinite().all() for x in got)
            torch.testing.assert_close(got[:2], want[:2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_prefix_index_of_prompt_rows(backend, dtype):
    """It can only name the one prefix there is; what lies behind it is not read."""
    leaves = [torch.randn(9, heads, 16).requires_grad_() for heads in (2, 1, 1)]
    options = dict(cu_seqlens=torch.tensor([0, 4, 5], dtype=torch.int32), prompt_rows=4, is_causal=True)
    options |= dict(prefix_key=None, prefix_value=None, backend=backend)
    index = torch.tensor([0, 0, 7], dtype=dtype)[:2]
    outs = [prefix_attention(*leaves, **options, prefix_index=each) for each in (None, index)]
    grads = [torch.autograd.grad(out, leaves, torch.ones_like(out)) for out in outs]
    assert torch.equal(*outs) and all(map(torch.equal, *grads))


HUGE = dict(query=(2**31, 1, 1), key=(2**31, 1, 1), value=(2**31, 1, 1), prefix_key=(1, 1, 0, 1))
HUGE_PREFIX = dict(query=(4, 1, 1), key=(4, 1, 1), value=(4, 1, 1), prefix_key=(1, 1, 2**31, 1))


@pytest.mark.parametrize("shapes, match", [(HUGE, "query must have at most"), (HUGE_PREFIX, "prefix_key must be of")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_that_32_bits_do_not_count(backend, shapes, match):
    shapes = shapes | {"prefix_value": shapes["prefix_key"]}
    args = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=match):
        prefix_attention(**args, cu_seqlens=torch.zeros(1, dtype=torch.int32), backend=backend)


NO_INTEGERS = (True, 0.5, 2.0, "3", torch.tensor(3), np.float64(3))
NO_NUMBERS = (True, "0.5", torch.tensor(0.5), 1j, [0.5])
REALS = ("scale", "softcap", "dropout_p")
WRONG = [
    *((name, x, TypeError, "must be an integer") for name in ("window", "prompt_rows") for x in NO_INTEGERS),
    *((name, x, TypeError, "must be a number") for name in REALS for x in NO_NUMBERS),
    *(("prompt_rows", x, ValueError, r"must be in \[1, 12\], the number of rows") for x in (-1, 13, 2**31, 2**70)),
    *(("window", x, ValueError, "must be at least 1") for x in (0, -1, -(2**63), -(2**70))),
    *(
        ("scale", x, ValueError, "must be at most 1e[+]38, positive or negative")
        for x in (torch.nan, -torch.inf, 1e300)
    ),
    *(("softcap", x, ValueError, "must be positive") for x in (0, -0.0, torch.nan, -torch.inf)),
    *(("dropout_p", x, ValueError, r"must be in \[0, 1\)") for x in (torch.nan, torch.inf, 1, 1e30, -1e-45)),
]


@pytest.mark.parametrize("name, value, error, match", WRONG)
def test_options_that_mean_nothing(name, value, error, match):
    args = inputs([3, 0, 9])
    if name == "prompt_rows":
        args |= dict(prefix_key=None, prefix_value=None, prefix_index=None)
    for backend in [None, *BACKENDS]:
        with pytest.raises(error, match=f"{name} {match}, got "):
            prefix_attention(**args, is_causal=True, backend=backend, **{name: value})


def test_dropout_of_nothing():
    args = inputs([3, 0, 9])
    for dropout_p in 0, -0.0, np.float32(0):
        assert torch.equal(prefix_attention(**args, dropout_p=dropout_p), prefix_attention(**args))


# "cpu" is not here: PyTorch's flash kernels know of the scores but their log-sum-exp, which is rounded to their size.
@pytest.mark.parametrize("backend", [*FUSED, "reference"])
@pytest.mark.parametrize("size", [1.0, 1e2, 1e4, 1e6, 1e9, 1e30])
def test_scores_of_any_size(backend, size):
    args = with_scores(inputs([7, 9], prefix=5, features=16, heads=(4, 2), dtype=torch.float32), size)
    check_without_slack(args, prefix_attention, is_causal=size in (1e4, 1e9), backend=backend)


def with_scores(args, size):
    """Scores of about that size, and equal ones: in a segment, in a prefix and in both."""
    args = mapped(args, lambda x: x.clone())
    for name in "query", "key", "prefix_key":
        args[name].data *= size**0.5
    args["key"].data[1::2] = args["key"].data[:-1:2]
    args["prefix_key"].data[:, :, 1] = args["prefix_key"].data[:, :, 0]
    args["prefix_key"].data[:, :, 2] = args["key"].data[0]
    return args


def check_without_slack(args, run, is_causal, **options):
    """Twice plain PyTorch's error and eps times the greatest sum of terms, none of it for the rounding of scores."""
    exact, grad = mapped(args, torch.Tensor.double), torch.randn_like(args["query"])
    want, plain, got = (
        (out, *gradients(out, each, grad.to(out.dtype)))
        for out, each in (
            (expected(exact, is_causal=is_causal)[0], exact),
            (expected(args, is_causal=is_causal)[0], args),
            (run(**args, is_causal=is_causal, return_lse=True, **options)[0], args),
        )
    )
    magnitudes = list(sums(exact, grad.double(), is_causal=is_causal))
    eps = torch.finfo(grad.dtype).eps
    for name, x, y, z, terms in zip(
        ("output", *NAMES), got, plain, want, (magnitudes[0], *magnitudes[2:]), strict=True
    ):
        error, plain_error = ((each.double() - z).abs().max() for each in (x, y))
        assert error <= 2 * plain_error + eps * terms.max(), name


def ways_to_a_second_derivative(out, leaves, grad):
    """Functions that each ask for one, of any of the leaves and of the incoming gradient."""
    for again in [*leaves, grad]:
        for allow_unused in False, True:

            def run(again=again, allow_unused=allow_unused):
                first = torch.autograd.grad(out, leaves, grad, create_graph=True)
                return torch.autograd.grad(sum(x.square().sum() for x in first), again, allow_unused=allow_unused)

            yield run
    for leaf in leaves:  # the gradient of one alone

        def run(leaf=leaf):
            (first,) = torch.autograd.grad(out, leaf, grad, create_graph=True)
            first.square().sum().backward()

        yield run

    def run():
        out.backward(grad, create_graph=True)
        leaves[0].grad.square().sum().backward()

    yield run


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"] + ["registered"])
def test_second_derivatives_are_refused(backend, monkeypatch):
    if backend == "registered":  # what torch.compile sees
        from fastprompt.ops.prefix_attention import native

        monkeypatch.setattr(native._PrefixAttention, "apply", native._forward)
    args = inputs([2, 3], features=4, heads=(2, 1), dtype=torch.float32)
    leaves = [args[name] for name in NAMES]
    args["backend"] = "native" if backend == "registered" else backend
    grad = torch.randn_like(args["query"]).requires_grad_()
    once = torch.autograd.grad(prefix_attention(**args), leaves, grad)
    for n in range(17 if backend != "triton" else 2):  # the interpreter takes its time
        *_, way = itertools.islice(ways_to_a_second_derivative(prefix_attention(**args), leaves, grad), n + 1)
        with pytest.raises(RuntimeError, match="prefix_attention has no second derivative, but for backend 'ref"):
            way()
    again = torch.autograd.grad(prefix_attention(**args), leaves, grad, create_graph=True)
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("options", [{}, dict(is_causal=True, window=2, prefix_in_window=True, softcap=1.5)])
@pytest.mark.parametrize("prompt_rows", [0, 2])
def test_second_derivatives_of_the_reference(options, prompt_rows):
    args = inputs([2, 1], prefix=2, features=2, heads=(2, 1), bank=2)
    names = NAMES
    if prompt_rows:
        names, rows = NAMES[:3], {name: randn(prompt_rows + 3, *args[name].shape[1:]) for name in NAMES[:3]}
        args |= rows | dict.fromkeys((*NAMES[3:], "prefix_index"))
        options = options | dict(is_causal=True, prompt_rows=prompt_rows)

    def run(*tensors):
        return prefix_attention(**args | dict(zip(names, tensors, strict=True)), **options, backend="reference")

    assert torch.autograd.gradgradcheck(run, [args[name].detach().requires_grad_() for name in names])


WITHOUT_VALUES = [
    {},
    dict(is_causal=True, window=2),
    dict(is_causal=True, prompt_rows=2),
    dict(softcap=2.0, dropout_p=0.5),
]


@pytest.mark.parametrize("where", ["fake", "meta"])
@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("options", WITHOUT_VALUES, ids=str)
def test_tensors_without_values(where, backend, options):
    if where == "meta" and backend in ("native", "cpu"):
        pytest.skip("they need tensors on a device of theirs")
    if "softcap" in options and backend == "cpu":
        pytest.skip("no softcap")
    args, dtype = inputs([3, 0, 9], dtype=torch.bfloat16), torch.bfloat16
    if "prompt_rows" in options:
        args |= dict.fromkeys((*NAMES[3:], "prefix_index"))
        args["cu_seqlens"] = torch.tensor([0, 1, 10], dtype=torch.int32)
    mode = FakeTensorMode()
    move = mode.from_tensor if where == "fake" else lambda x: x.detach().to("meta").requires_grad_(x.requires_grad)
    fakes = {name: move(x) if isinstance(x, torch.Tensor) else x for name, x in args.items()}
    leaves = [fakes[name] for name in NAMES if fakes[name] is not None]
    out, lse = prefix_attention(**fakes, **options, return_lse=True, backend=backend)
    assert (out.shape, out.dtype, out.device) == (args["query"].shape, dtype, fakes["query"].device)
    assert (lse.shape, lse.dtype) == (out.shape[:2], torch.float32)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in leaves]
