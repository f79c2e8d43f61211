import itertools

import pytest
import torch
import torch.nn.functional as F

from fastprompt.ops import linear_cross_entropy
from fastprompt.ops.linear_cross_entropy import chunked

BACKENDS = [None, "chunked", "reference"]
OPTIONS = [{}, {"label_smoothing": 0.1}, {"softcap": 3.0}, {"label_smoothing": 0.3, "softcap": 0.7}]
SHAPES = [(0, 4, 7), (1, 1, 1), (5, 33, 97), (63, 16, 250)]  # rows, features, vocabulary


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request):
    return request.param


def inputs(rows, features, vocabulary, dtype=torch.float64, device="cpu"):
    hidden = torch.randn(rows, features, device=device).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, features, device=device).to(dtype)
    return hidden, weight, torch.randint(vocabulary, (rows,), device=device)


def defined(hidden, weight, target, label_smoothing=0.0, softcap=None):
    """The definition, row by row: -sum of the smoothed target times the log-probabilities."""
    total = hidden.sum() * 0
    for h, t in zip(hidden, target, strict=True):
        logits = weight @ h
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        wanted = torch.full_like(logits, label_smoothing / len(logits))
        wanted[t] += 1 - label_smoothing
        total = total - (wanted * logits.log_softmax(0)).sum()
    return total


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(backend, device, monkeypatch, shape, options):
    monkeypatch.setattr(chunked, "ROWS", 7)  # several pieces, the last ones short
    monkeypatch.setattr(chunked, "VOCABULARY", 40)
    hidden, weight, target = inputs(*shape, device=device)
    got = linear_cross_entropy(hidden, weight, target, **options, backend=backend)
    want = defined(hidden, weight, target, **options)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(loss * 1.5, hidden)[0] for loss in (got, want)]
    torch.testing.assert_close(*grads)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, target, **options, backend=backend), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_error_budget(backend, device, options, dtype):
    hidden, weight, target = inputs(97, 64, 333, dtype, device)
    exact = hidden.detach().double().requires_grad_()
    want = defined(exact, weight.double(), target, **options)
    plain = F.linear(hidden, weight)
    if "softcap" in options:
        plain = options["softcap"] * torch.tanh(plain / options["softcap"])
    smoothing = options.get("label_smoothing", 0.0)
    plain = F.cross_entropy(plain, target, reduction="sum", label_smoothing=smoothing)
    got = linear_cross_entropy(hidden, weight, target, **options, backend=backend)
    assert got.dtype == torch.float32
    (want_grad,) = torch.autograd.grad(want, exact)
    for name, value, stock, true in (
        ("loss", got, plain, want),
        ("gradient", torch.autograd.grad(got, hidden)[0], torch.autograd.grad(plain, hidden)[0], want_grad),
    ):
        budget = 2 * (stock.double() - true).abs().max() + torch.finfo(dtype).eps * true.abs().max()
        assert (value.double() - true).abs().max() <= budget, name


def test_gradcheck(backend):
    hidden, weight, target = inputs(3, 4, 5)
    for options in OPTIONS:
        assert torch.autograd.gradcheck(
            lambda h, options=options: linear_cross_entropy(h, weight, target, **options, backend=backend), hidden
        )


def test_no_logits_beyond_a_chunk(monkeypatch):
    """And no product but the two of each chunk: none for the frozen weight."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            storage = isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr()
            new = storage and storage != weight.untyped_storage().data_ptr()
            seen.append((function.overloadpacket, out.numel() if new else 0))
            return out

    monkeypatch.setattr(chunked, "VOCABULARY", 400)
    hidden, weight, target = inputs(10, 6, 1000, torch.float32)
    with Watch():
        linear_cross_entropy(hidden, weight, target).backward()
    assert max(size for _, size in seen) <= 10 * 400
    assert sum(function == torch.ops.aten.mm for function, _ in seen) == 2 * 3


def test_no_second_derivative():
    hidden, weight, target = inputs(3, 4, 5)
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, target), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


GOOD = dict(zip(("hidden", "weight", "target"), inputs(3, 4, 5, torch.float32), strict=True))


@pytest.mark.parametrize(
    "change, match",
    [
        ({"weight": torch.ones(5, 3)}, r"hidden \(R, E\) and weight \(V, E\) must agree, got \(3, 4\), \(5, 3\)"),
        ({"target": torch.zeros(4, dtype=torch.long)}, r"target must be \(3,\) torch.int64, one a row, got \(4,\)"),
        ({"target": torch.zeros(3)}, r"target must be .*, got \(3,\) torch.float32"),
        ({"weight": torch.ones(5, 4).double()}, "must be of one floating dtype, got torch.float32 and torch.float64"),
        ({"weight": torch.ones(5, 4, device="meta")}, "weight must be on cpu, where hidden is, got meta"),
        ({"weight": torch.ones(5, 4).requires_grad_()}, "weight must be frozen"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"softcap": 0.0}, "softcap must be positive, got 0.0"),
        ({"backend": "liger"}, r"backend must be None or one of \(.*\), got 'liger'"),
        ({"backend": "cut_cross_entropy"}, "needs that package, a GPU, .*, got cpu, torch.float32, 0.0"),
    ],
)
def test_bad_input(change, match):
    with pytest.raises(ValueError, match=match):
        linear_cross_entropy(**GOOD | change)


def test_subsets_of_requires_grad(backend):
    hidden, weight, target = inputs(3, 4, 5)
    for wants, on in itertools.product((False, True), repeat=2):
        with torch.set_grad_enabled(on):
            loss = linear_cross_entropy(hidden.detach().requires_grad_(wants), weight, target, backend=backend)
        assert loss.requires_grad == (wants and on)
