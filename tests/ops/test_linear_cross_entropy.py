import importlib
import itertools
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from layouts import LAYOUTS, in_layout
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastprompt.ops import _checks, linear_cross_entropy
from fastprompt.ops.linear_cross_entropy import chunked

operator = importlib.import_module("fastprompt.ops.linear_cross_entropy")  # not the function of that name
BACKENDS = [None, "chunked", "at once", "reference", "cut_cross_entropy"]
OPTIONS = [{}, {"label_smoothing": 0.1}, {"softcap": 3.0}, {"label_smoothing": 0.3, "softcap": 0.7}]
SHAPES = [(0, 4, 7), (1, 1, 1), (5, 33, 97), (63, 16, 250)]  # rows, features, vocabulary


class CutCrossEntropy(torch.autograd.Function):
    """In place of the package's function, which needs a GPU: like that, its gradient is a constant to autograd."""

    @staticmethod
    def forward(ctx, hidden, weight, target, softcap):
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            logits = F.linear(leaf, weight)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            ctx.found = leaf, F.cross_entropy(logits, target, reduction="none")
        return ctx.found[1].detach()

    @staticmethod
    def backward(ctx, grad):
        leaf, losses = ctx.found
        return torch.autograd.grad(losses, leaf, grad.detach(), retain_graph=True)[0].detach(), None, None, None


def stand_in(hidden, weight, target, softcap, reduction):
    assert len(target) and reduction == "none"
    return CutCrossEntropy.apply(hidden, weight, target, softcap)


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request, monkeypatch):
    if request.param == "cut_cross_entropy":
        if getattr(request.node, "callspec", None) and "label_smoothing" in request.node.callspec.params.get(
            "options", {}
        ):
            pytest.skip("cut_cross_entropy has no label smoothing")
        module = types.SimpleNamespace(linear_cross_entropy=stand_in)
        monkeypatch.setitem(sys.modules, "cut_cross_entropy", module)
        monkeypatch.delitem(sys.modules, "fastprompt.ops.linear_cross_entropy.cut", raising=False)
        monkeypatch.setattr(operator, "_choose", lambda backend, *_: backend)
    if request.param == "at once":  # as on a GPU: a few rows and the whole vocabulary
        own = chunked.piece
        monkeypatch.setattr(chunked, "LOGITS", 8 * 8 * 90)
        monkeypatch.setattr(chunked, "piece", lambda _, *rest: own("cuda", *rest))
        return "chunked"
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
    target[1] = -100
    for options in OPTIONS:
        if backend == "cut_cross_entropy" and "label_smoothing" in options:
            continue

        def run(h, options=options):
            return linear_cross_entropy(h, weight, target, **options, backend=backend)

        assert torch.autograd.gradcheck(run, hidden)
        if backend == "reference":
            assert torch.autograd.gradgradcheck(run, hidden)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
def test_rows_left_out(backend, device, ignore_index, options, monkeypatch):
    monkeypatch.setattr(chunked, "ROWS", 4)
    hidden, weight, target = inputs(11, 5, 9, device=device)
    target[[0, 4, 5, 6, 7, 10]] = ignore_index
    out = target == ignore_index
    hidden.data[out] = torch.nan
    got = linear_cross_entropy(hidden, weight, target, ignore_index=ignore_index, **options, backend=backend)
    kept = hidden.detach()[~out].requires_grad_()
    want = defined(kept, weight, target[~out], **options)
    torch.testing.assert_close(got, want)
    (grad,) = torch.autograd.grad(got * 1.5, hidden)
    assert not grad[out].any()
    torch.testing.assert_close(grad[~out], torch.autograd.grad(want * 1.5, kept)[0])
    with torch.no_grad():
        none = linear_cross_entropy(
            hidden, weight, torch.full_like(target, ignore_index), ignore_index=ignore_index, backend=backend
        )
        again = linear_cross_entropy(hidden, weight, target, ignore_index=ignore_index, **options, backend=backend)
    assert none == 0 and torch.equal(got, again)


@pytest.mark.parametrize("bad", [-1, 9, -101, 2**63 - 1])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_targets_out_of_range(backend, bad, options, monkeypatch):
    hidden, weight, target = inputs(5, 4, 9)
    target[2:4] = torch.tensor([-100, bad])
    expected = r"target must be in \[0, 9\), or -100 for none"
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(IndexError, match=f"{expected}, got {bad}"):
            linear_cross_entropy(hidden, weight, target, **options, backend=backend)
    # As on a GPU, where values are not read: the device asserts.
    monkeypatch.setattr(_checks, "_is_readable", lambda _: False)
    with pytest.raises(RuntimeError, match=expected):
        linear_cross_entropy(hidden, weight, target, **options, backend=backend)


def test_compiled_reference_checks_targets_too():
    hidden, weight, target = inputs(5, 4, 9)
    target[1] = -100
    torch.compiler.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(hidden, weight, target, backend="reference"), defined(hidden[target >= 0], weight, target[target >= 0])
    )
    with pytest.raises(RuntimeError, match=r"target must be in \[0, 9\)"):
        compiled(hidden, weight, target + 9, backend="reference")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, device, layout):
    hidden, weight, target = (in_layout(x, layout) for x in inputs(6, 5, 9, device=device))
    outer = in_layout(torch.randn(1, device=device, dtype=torch.float64), layout)[0]
    loss = linear_cross_entropy(hidden, weight, target, backend=backend)
    plain = hidden.detach().clone().requires_grad_()
    want = defined(plain, weight.contiguous(), target.contiguous())
    torch.testing.assert_close(loss, want)
    grads = torch.autograd.grad(loss, hidden, outer), torch.autograd.grad(want, plain, outer.clone())
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_without_values(backend, kind):
    hidden, weight, target = inputs(6, 5, 9, torch.bfloat16)
    mode = FakeTensorMode()
    convert = mode.from_tensor if kind == "fake" else lambda x: x.detach().to("meta").requires_grad_(x.requires_grad)
    hidden, weight, target = (convert(x) for x in (hidden, weight, target))
    with mode if kind == "fake" else torch.device("cpu"):
        loss = linear_cross_entropy(hidden, weight, target, softcap=2.0, backend=backend)
        (grad,) = torch.autograd.grad(loss, hidden)
    assert loss.shape == () and loss.dtype == torch.float32
    assert grad.shape == hidden.shape and grad.dtype == torch.bfloat16


def test_no_logits_beyond_a_chunk(monkeypatch):
    """And no product but the two of each chunk: none for the frozen weight."""
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


class Launches(TorchDispatchMode):
    """Counts what is computed: views and new memory are none of it."""

    FREE = "t view slice unsqueeze squeeze split detach empty new_empty alias expand permute promote_types".split()

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ not in self.FREE
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options, most", [({}, 10), ({"softcap": 30.0}, 15), ({"label_smoothing": 0.1}, 15)], ids=str)
def test_launches_on_a_gpu(options, most):
    """Of Gemma's vocabulary, as counted without one: those of a piece, and a few before and after."""
    weight = torch.empty(262144, 640, dtype=torch.bfloat16, device="meta")
    counts = []
    for rows in (512, 1024):
        hidden = torch.empty(rows, 640, dtype=torch.bfloat16, device="meta", requires_grad=True)
        target = torch.empty(rows, dtype=torch.int64, device="meta")
        with Launches() as launches:
            linear_cross_entropy(hidden, weight, target, **options).backward()
        counts.append(launches.count)
    assert counts[1] - counts[0] <= most + 2  # and the two pieces are joined
    assert counts[0] <= most + 8


def test_pieces():
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    for rows, vocabulary, dtype, count in (
        (440, 49152, half, 1), (512, 262144, half, 1), (513, 262144, single, 2), (8192, 262144, half, 16),
        (8192, 128256, half, 8), (512, 262144, double, 2), (0, 10, half, 1), (3, 2**28, half, 3),
    ):  # fmt: skip
        each, words = chunked.piece("cuda", rows, vocabulary, dtype)
        assert words == vocabulary and max(1, -(-rows // each)) == count
        assert each * words * (8 if dtype == double else 4) <= 2**29 or each == 1
        assert chunked.piece("cpu", rows, vocabulary, dtype) == (1024, 1024)


def test_float16_is_scaled_before_it_is_rounded(monkeypatch):
    """Rows that the model is sure of, under a loss scale, on a GPU: no less exact than plain PyTorch."""
    hidden, weight, _ = inputs(40, 128, 200, torch.float32)
    target, weight = torch.arange(40), weight * 0.05
    weight[target] = 20 * hidden.detach() / hidden.detach().square().sum(1, keepdim=True)
    hidden, weight, scale = hidden.detach().half().requires_grad_(), weight.half(), 2.0**15
    exact = hidden.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(defined(exact, weight.double(), target) * scale, exact)
    plain = F.cross_entropy(F.linear(hidden, weight).float(), target, reduction="sum")
    (plain,) = torch.autograd.grad(plain * scale, hidden)
    monkeypatch.setattr(chunked, "VOCABULARY", 200)
    (got,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, target, backend="chunked") * scale, hidden)
    error, budget = ((x.double() - want).norm() for x in (got, plain))
    assert error <= 1.1 * budget


def test_no_second_derivative(backend):
    if backend == "reference":
        return  # test_gradcheck
    hidden, weight, target = inputs(3, 4, 5)
    outer = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, target, backend=backend)
    (grad,) = torch.autograd.grad(loss, hidden, outer, create_graph=True)
    for unused in (False, True):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(grad.sum(), hidden, allow_unused=unused, retain_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward(retain_graph=True)
    (of_outer,) = torch.autograd.grad(grad.sum(), outer)  # linear in it: that derivative is there
    torch.testing.assert_close(of_outer * 1.5, grad.sum())


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
        ({"weight": torch.ones(0, 4)}, r"weight must have a row for each of V >= 1 words, got \(0, 4\)"),
        *(
            ({"label_smoothing": bad}, r"label_smoothing must be in \[0, 1\], got ")
            for bad in (1.5, -1e-9, 2, torch.nan, torch.inf, 2**2000, True, "0.1", None)
        ),
        *(
            ({"softcap": bad}, "softcap must be positive, of torch.float32's range, got ")
            for bad in (0, -1.0, 1e-50, 1e39, torch.nan, torch.inf, 2**2000, True, "30")
        ),
        *(
            ({"ignore_index": bad}, "ignore_index must be an integer of 64 bits, got ")
            for bad in (2**63, -(2**63) - 1, -100.0, torch.nan, True, "-100", None)
        ),
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


class SubnormalFactors(TorchDispatchMode):
    """Counts numbers below the normal ones that go into products of matrices."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default:
            small = [(x != 0) & (x.abs() < torch.finfo(x.dtype).tiny) for x in args]
            self.count += sum(int(x.sum()) for x in small)
        return function(*args, **(kwargs or {}))


def test_no_product_of_numbers_that_a_cpu_is_slow_with():
    """Logits as far apart as T5's: a step of mT5's shape took six times as long."""
    hidden = (20 * torch.randn(5, 8)).requires_grad_()
    weight, target = torch.randn(3000, 8), torch.randint(3000, (5,))
    logits = hidden.detach() @ weight.T
    assert ((logits - logits.amax(1, keepdim=True)).exp() < torch.finfo(torch.float32).tiny).any()
    with SubnormalFactors() as found:
        linear_cross_entropy(hidden, weight, target, backend="chunked").backward()
    assert not found.count
