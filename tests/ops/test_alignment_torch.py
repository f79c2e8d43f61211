"""alignment_loss as an operator of torch: opcheck, torch.compile, what may be differentiated how often."""

import pytest
import test_alignment
import torch
from test_alignment import finest, gradients, inputs

from fastprompt import _native
from fastprompt.ops import alignment_loss

backend = test_alignment.backend  # the fixture


@pytest.mark.skipif(not _native.available("cpu"), reason="needs the native library")
@pytest.mark.parametrize(
    "optional, dtype, options",
    [
        (True, torch.float32, (0, 9, 0.7, 2)),  # l2, infonce+cosine, mean
        (True, torch.bfloat16, (1, 2, 0.05, 0)),  # layer, mse, none
        (False, torch.float32, (2, 4, 0.05, 1)),  # none, smooth_l1, sum
    ],
)
def test_opcheck(optional, dtype, options):
    args = inputs(5, 4, 3, bias=optional, row_weight=optional, dtype=dtype)
    if optional:
        args["row_weight"] = args["row_weight"].detach().float().requires_grad_()
    at_once = [x is not None and options[-1] != 0 for x in args.values()]
    torch.library.opcheck(torch.ops.fastprompt.alignment_loss.default, (*args.values(), None, *options, *at_once))


def test_no_second_derivative(backend):
    if backend == "reference":
        pytest.skip("plain PyTorch")
    args = inputs(5, 4, 3, dtype=finest(backend))
    for reduction in "mean", "none":
        loss = alignment_loss(**args, reduction=reduction, backend=backend).sum()
        (grad,) = torch.autograd.grad(loss, args["student"], create_graph=True)
        with pytest.raises(RuntimeError, match="alignment_loss has no second derivative"):
            grad.sum().backward()


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
        options = {"normalize": normalize, "distance": "infonce+mse", "backend": backend}
        got, want = (run(**args, **options) for run in (compiled, alignment_loss))
        assert got.dtype == want.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(gradients(loss, args, torch.tensor(1.5)) for loss in (got, want)))
