"""alignment_loss as an operator of torch: opcheck, torch.compile, memory, what may be differentiated how often."""

import contextlib
import functools
import itertools

import pytest
import test_alignment
import torch
from layouts import LAYOUTS, in_layout
from test_alignment import NAMES, NORMALIZATIONS, REDUCTIONS, check, exact, finest, gradients, inputs
from torch._subclasses.fake_tensor import FakeTensorMode

from fastprompt import _native
from fastprompt.ops import alignment_loss

backend = test_alignment.backend  # the fixture


@pytest.mark.skipif(not _native.available("cpu"), reason="needs the native library")
@pytest.mark.parametrize(
    "optional, dtype, options",
    [
        (True, torch.float32, (0, 9, 0.7, 2)),  # l2, infonce+cosine, mean
        (True, torch.bfloat16, (1, 2, 0.05, 0)),  # layer, mse, none
        (False, torch.float32, (2, 5, 0.05, 1)),  # none, smooth_l1+cosine, sum
    ],
)
def test_opcheck(optional, dtype, options):
    args = inputs(5, 4, 3, bias=optional, row_weight=optional, dtype=dtype)
    if optional:
        args["row_weight"] = args["row_weight"].detach().float().requires_grad_()
    at_once = [x is not None and options[-1] != 0 for x in args.values()]
    # Gradients that come with the loss are outputs like it, but have no derivative: the other checks would ask for it.
    checks = {"test_utils": ("test_schema", "test_faketensor")} if any(at_once) else {}
    operator = torch.ops.fastprompt.alignment_loss.default
    torch.library.opcheck(operator, (*args.values(), None, *options, *at_once), **checks)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_no_second_derivative(backend, name, reduction):
    # Whatever the gradient of `name` is differentiated by, and however the loss's own gradient comes.
    if backend == "reference":
        pytest.skip("plain PyTorch")
    args = inputs(5, 4, 3, dtype=finest(backend))
    loss = alignment_loss(**args, distance="cosine+mse", reduction=reduction, backend=backend)
    for incoming in (torch.ones_like(loss), torch.rand_like(loss), torch.rand_like(loss).requires_grad_()):
        (grad,) = torch.autograd.grad(loss, args[name], incoming, create_graph=True)
        for x in (*args.values(), incoming):
            if x.requires_grad:
                with pytest.raises(RuntimeError, match="alignment_loss has no second derivative, but for backend"):
                    torch.autograd.grad(grad.square().sum(), x, retain_graph=True, allow_unused=True)
        with pytest.raises(RuntimeError, match="alignment_loss has no second derivative"):
            grad.sum().backward(retain_graph=True)
    (grad,) = torch.autograd.grad(loss.sum(), args[name])
    assert not grad.requires_grad


@pytest.mark.parametrize("distance", ["cosine", "infonce+smooth_l1"])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_second_derivative_of_the_reference(normalize, distance):
    args = inputs(4, 3, 5)
    with torch.no_grad():
        args["row_weight"] += 0.5  # at 0 the row is left out: a jump
    options = dict(normalize=normalize, distance=distance, reduction="none", temperature=0.7, backend="reference")

    def run(*values):
        return alignment_loss(**dict(zip(NAMES, values, strict=True)), **options)

    assert torch.autograd.gradgradcheck(run, tuple(args.values()))


def test_a_loss_that_is_scaled_and_differentiated_again(backend):
    args = inputs(5, 4, 3, dtype=finest(backend))
    loss = alignment_loss(**args, distance="infonce+mse", backend=backend)
    first, second = (torch.autograd.grad(loss * c, args["student"], retain_graph=True)[0] for c in (1.0, -2.5))
    torch.testing.assert_close(second, -2.5 * first)
    assert torch.equal(torch.autograd.grad(loss, args["student"])[0], first)  # what was handed out was not changed


@pytest.mark.parametrize("dynamic, dtype", [(False, None), (True, torch.bfloat16)])
def test_compile(backend, device, dtype, dynamic):
    dtype = dtype or finest(backend)
    torch.compiler.reset()
    compiled = torch.compile(alignment_loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape, normalize in ((5, 6, 4), "l2"), ((9, 3, 7), "layer"):
        args = inputs(*shape, dtype=dtype, device=device)
        options = {"normalize": normalize, "distance": "infonce+mse", "backend": backend, "temperature": 1 / shape[0]}
        got, want = (run(**args, **options) for run in (compiled, alignment_loss))
        assert got.dtype == want.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(gradients(loss, args, torch.tensor(1.5)) for loss in (got, want)))


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize(
    "distance, reduction", [("cosine", "mean"), ("infonce+mse", "sum"), ("cosine+infonce", "none")]
)
@pytest.mark.parametrize("device", ["fake", "meta"])
def test_tensors_without_values(backend, device, distance, reduction, optional):
    if (backend, device) == ("native", "meta"):
        pytest.skip("runs on the device of its library alone")
    with FakeTensorMode() if device == "fake" else contextlib.nullcontext():
        where = "cpu" if device == "fake" else device
        args = inputs(5, 4, 3, bias=optional, row_weight=optional, dtype=torch.bfloat16, device=where)
        loss = alignment_loss(**args, distance=distance, reduction=reduction, backend=backend)
        loss.sum().backward()
    assert loss.dtype == torch.float32 and loss.shape == ((5,) if reduction == "none" else ())
    for x in args.values():
        assert x is None or (x.grad.shape, x.grad.dtype, x.grad.device) == (x.shape, x.dtype, x.device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, device, layout):
    args = inputs(7, 13, 9, dtype=finest(backend), device=device)
    args["grad"] = torch.randn_like(args["row_weight"])
    moved = {name: in_layout(x, layout) for name, x in args.items()}
    copies = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in moved.items()}
    copies = {name: x.requires_grad_(moved[name].requires_grad) for name, x in copies.items()}
    grads = [x.pop("grad") for x in (moved, copies)]
    for distance, reduction in ("cosine", "mean"), ("cosine+mse+infonce", "none"):
        run = functools.partial(alignment_loss, distance=distance, reduction=reduction, backend=backend)
        got, want = losses = [run(**x) for x in (moved, copies)]
        torch.testing.assert_close(got, want)
        incoming = grads if reduction == "none" else [torch.tensor(0.7, device=device)] * 2
        both = [gradients(*each) for each in zip(losses, (moved, copies), incoming, strict=True)]
        torch.testing.assert_close(*both)
        with torch.no_grad():
            torch.testing.assert_close(run(**moved), want)


def test_outputs_are_written_whole(backend, device):
    # New memory is filled with NaN in this mode: what a kernel leaves out shows.
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(8, device=device).isnan().all()
        for distance, reduction in itertools.product(("cosine", "infonce"), REDUCTIONS):
            args = inputs(63, 17, 33, dtype=finest(backend), device=device)
            check(args, backend, distance=distance, reduction=reduction)
    finally:
        torch.use_deterministic_algorithms(was)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_float16_gradients_under_a_loss_scale(backend, device, reduction):
    scale = 2.0**16 if reduction == "mean" else 2.0**12  # d loss / dz is below float16's least number without
    for row_weight in False, True:
        args = inputs(16, 8, 1024, row_weight=row_weight, dtype=torch.float16, device=device)
        with torch.no_grad():
            args["teacher"] /= 512
            args["weight"] /= 512
            args["bias"] /= 512
        true = exact(args)
        run = dict(normalize="none", distance="mse", reduction=reduction)
        got, want = (
            torch.autograd.grad((alignment_loss(**each, **run, backend=name) * scale).sum(), list(each.values())[:3])
            for each, name in ((args, backend), (true, "reference"))
        )
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x.cpu().double(), y, rtol=0.02, atol=0.02 * y.abs().max().item())


def test_autocast_changes_nothing(backend, device):
    """Where the formula is not PyTorch's own: products of other types than the tensors' would not fit."""
    if backend == "reference":
        pytest.skip("plain PyTorch")
    args, results = inputs(7, 6, 5, dtype=torch.float32, device=device), []
    for reduction, inside in itertools.product(["mean", "none"], [False, True]):
        with torch.autocast(device, torch.bfloat16, enabled=inside):
            loss = alignment_loss(**args, distance="infonce+mse", reduction=reduction, backend=backend)
            results.append([loss, *torch.autograd.grad(loss.sum(), list(args.values()))])
    assert all(map(torch.equal, *results[:2])) and all(map(torch.equal, *results[2:]))
