import functools
import importlib.util
import itertools
import sys

import pytest
import torch
import torch.nn.functional as F

from fastprompt import _native
from fastprompt.ops import alignment_loss

if importlib.util.find_spec("triton"):
    from fastprompt.ops._triton import INTERPRETED

    TRITON_DEVICE = "cpu" if INTERPRETED else "cuda"
else:
    TRITON_DEVICE = None

BACKENDS = [None, "native", "triton", "reference"]  # every test runs on each of them
NORMALIZATIONS = ["l2", "layer", "none"]
DISTANCES = ["cosine", "mse", "smooth_l1", "infonce", "infonce+cosine", "cosine+mse+smooth_l1"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]
SHAPES = [(1, 63, 33), (5, 33, 63), (63, 80, 31), (97, 17, 128)]  # rows, student features, teacher features
NAMES = ("student", "teacher", "weight", "bias", "row_weight")
EPS = 1e-12  # a row of at most this norm counts as zero, under "l2" and in the cosine


def inputs(rows, student_dim, teacher_dim, *, bias=True, row_weight=True, dtype=torch.float64, device="cpu"):
    """Fresh random arguments, all of them asking for a gradient; every third row is of weight 0."""
    args = {
        "student": torch.randn(rows, student_dim),
        "teacher": torch.randn(rows, teacher_dim),
        "weight": torch.randn(teacher_dim, student_dim) / student_dim**0.5,
        "bias": torch.randn(teacher_dim) if bias else None,
        "row_weight": (torch.rand(rows) + 0.1) * (torch.arange(rows) % 3 != 2) if row_weight else None,
    }
    return {name: None if x is None else x.to(device, dtype).requires_grad_() for name, x in args.items()}


def exact(args):
    """The same numbers as float64 leaves on the CPU."""
    leaves = {name: x if x is None else x.detach().cpu().double() for name, x in args.items()}
    return {name: x if x is None else x.requires_grad_(args[name].requires_grad) for name, x in leaves.items()}


def normalized_row(x, normalize):
    if normalize == "layer":
        x = x - x.sum() / len(x)
        return x / (x.square().sum() / len(x) + 1e-5).sqrt()
    return of_unit_norm(x) if normalize == "l2" else x


def of_unit_norm(x):
    size = x.square().sum().sqrt()
    return x / size if size > EPS else torch.zeros_like(x)


def row_distance(name, a, b):
    if name == "cosine":
        return 1 - (of_unit_norm(a) * of_unit_norm(b)).sum()
    if name == "mse":
        return ((a - b) ** 2).mean()
    gap = (a - b).abs()
    return torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean()


def row_losses(student, teacher, weight, bias, normalize, distance, temperature):
    """The definition in float64, row by row."""
    offset = 0 if bias is None else bias
    u = [normalized_row(weight @ h + offset, normalize) for h in student]
    v = [normalized_row(t, normalize) for t in teacher]
    total = 0
    for name in distance.split("+"):
        if name == "infonce":
            similarity, partner = torch.stack(u) @ torch.stack(v).T / temperature, torch.arange(len(u))
            both = [F.cross_entropy(s, partner, reduction="none") for s in (similarity, similarity.T)]
            losses = sum(both) / 2
        else:
            losses = torch.stack([row_distance(name, a, b) for a, b in zip(u, v, strict=True)])
        total = total + losses
    return total


def plain_losses(student, teacher, weight, bias, normalize, distance, temperature):
    """What one writes in plain PyTorch, all in the dtype of the inputs."""
    u, v = F.linear(student, weight, bias), teacher
    if normalize == "l2":
        u, v = F.normalize(u, dim=-1), F.normalize(v, dim=-1)
    elif normalize == "layer":
        u, v = (F.layer_norm(x, x.shape[-1:]) for x in (u, v))
    similarity, partner = u @ v.T / temperature, torch.arange(len(u), device=u.device)
    losses = {
        "cosine": lambda: 1 - ((u * v).sum(-1) if normalize == "l2" else F.cosine_similarity(u, v)),
        "mse": lambda: F.mse_loss(u, v, reduction="none").mean(-1),
        "smooth_l1": lambda: F.smooth_l1_loss(u, v, reduction="none").mean(-1),
        "infonce": lambda: sum(F.cross_entropy(s, partner, reduction="none") for s in (similarity, similarity.T)) / 2,
    }
    return sum(losses[name]() for name in distance.split("+"))


def expected(args, normalize="l2", distance="cosine", temperature=0.05, reduction="mean", losses=row_losses):
    """`losses` of the rows that count, alone; weighted and reduced."""
    student, teacher, weight, bias, row_weight = (args[name] for name in NAMES)
    shares = torch.ones(len(student), dtype=student.dtype, device=student.device) if row_weight is None else row_weight
    kept = shares.nonzero()[:, 0]
    if not len(kept):
        return shares * 0 if reduction == "none" else shares.sum() * 0
    counted = losses(student[kept], teacher[kept], weight, bias, normalize, distance, temperature) * shares[kept]
    if reduction == "none":
        return torch.zeros_like(shares).index_put((kept,), counted)
    return counted.sum() if reduction == "sum" else counted.sum() / shares[kept].sum()


def gradients(loss, args, grad):
    """By name, of the arguments that ask for one; of row_weight, those of the rows that count."""
    leaves = {name: x for name, x in args.items() if x is not None and x.requires_grad}
    found = torch.autograd.grad(loss, list(leaves.values()), grad.to(loss), allow_unused=True, materialize_grads=True)
    found = dict(zip(leaves, found, strict=True))
    if "row_weight" in found:
        assert not found["row_weight"][args["row_weight"] == 0].any()
        found["row_weight"] = found["row_weight"][args["row_weight"] != 0]
    return found


def steepness(true, normalize):
    """How large what is summed into a gradient can be though the sum is small: rounding errs by that size."""
    true = {name: x.detach() for name, x in true.items() if x is not None}
    rows = F.linear(true["student"], true["weight"], true.get("bias")), true["teacher"]
    sizes = torch.cat([x.std(-1, correction=0) if normalize == "layer" else x.norm(dim=-1) for x in rows])
    sizes = sizes[sizes > EPS].tolist()
    factors = torch.cat([true[name].norm(dim=-1) for name in ("student", "weight")]).tolist()
    return max([1, *factors]) * (max([1, *sizes]) if normalize == "none" else 1) / min([1, *sizes])


def check(args, backend, normalize="l2", **options):
    """Value and gradients of float64 arguments against the definition. Returns the gradients."""
    options["normalize"] = normalize
    want = expected(true := exact(args), **options)
    steep = steepness(true, normalize)
    grad = torch.randn_like(want)
    got = alignment_loss(**args, **options, backend=backend)
    found = gradients(got, args, grad)
    for name, want_value in (gradients(want, true, grad) | {"loss": want}).items():
        value = got if name == "loss" else found[name]
        near = {"rtol": 0, "atol": 64 * torch.finfo(got.dtype).eps * max(1, steep, want_value.abs().max().item())}
        named = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(value.detach().cpu().to(want), want_value.detach(), msg=named, **near)
    return found


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request):
    device = request.getfixturevalue("device") if "device" in request.fixturenames else "cpu"
    if request.param == "triton" and device != TRITON_DEVICE:
        pytest.skip("needs triton, and a CUDA device or TRITON_INTERPRET=1")
    if request.param == "native" and not _native.available(device):
        pytest.skip(f"no native library: {_native.why_not(device)}")
    return request.param


def finest(backend):
    """The dtype in which a backend is the most exact."""
    return torch.float32 if backend == "triton" else torch.float64


def skip_in_interpreter(backend, redundant):
    if backend == "triton" and TRITON_DEVICE == "cpu" and redundant:
        pytest.skip("slow in the interpreter, and other cases take the same path")


@pytest.mark.parametrize("row_weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_values_and_gradients(backend, device, normalize, distance, bias, row_weight):
    skip_in_interpreter(backend, bias != row_weight)
    args = inputs(7, 13, 9, bias=bias, row_weight=row_weight, dtype=finest(backend), device=device)
    for reduction in REDUCTIONS:
        check(args, backend, normalize=normalize, distance=distance, reduction=reduction, temperature=0.7)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 5, 1), (5, 1, 1), (97, 1, 3)], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_shapes(backend, device, normalize, distance, shape):
    skip_in_interpreter(backend, "+" not in distance or shape in ((63, 80, 31), (97, 1, 3)))
    args = inputs(*shape, dtype=finest(backend), device=device)
    check(args, backend, normalize=normalize, distance=distance, temperature=0.7)


@pytest.mark.parametrize("temperature", [None, 1e-6, 0.05, 3, 2**63 - 1, sys.float_info.max])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_temperature(backend, device, normalize, temperature):
    args = inputs(7, 13, 9, dtype=finest(backend), device=device)
    options = {"distance": "infonce", "normalize": normalize}
    got = alignment_loss(**args, **options, temperature=temperature, backend=backend)
    want = expected(true := exact(args), **options, temperature=0.05 if temperature is None else temperature)
    torch.testing.assert_close(got.cpu(), want, check_dtype=False)
    found, true = (gradients(loss, x, torch.tensor(1.0)) for loss, x in ((got, args), (want, true)))
    for name, grad in found.items():
        if name == "row_weight":  # all losses are nearly the same at a high temperature, and their differences rounding
            continue
        size = true[name].abs().max().item()
        torch.testing.assert_close(grad.cpu(), true[name], check_dtype=False, rtol=0, atol=1e-4 * size + 1e-30)


@pytest.mark.skipif(not _native.available("cpu"), reason="no native library")
def test_more_similarities_than_are_kept():
    """Of 4100 rows in float64 some are compared again for the gradients, and all of them in several blocks."""
    args = inputs(4100, 3, 2, dtype=torch.float64)
    for x in (args["student"], args["row_weight"]):
        x.requires_grad_(False)
    with torch.no_grad():
        args["row_weight"] += 0.1  # all of them count
    results = {}
    for backend in "native", "reference":
        loss = alignment_loss(**args, distance="infonce+mse", temperature=0.7, backend=backend)
        results[backend] = [loss, *gradients(loss, args, torch.tensor(2.0)).values()]
    assert len(results["native"]) == 4  # teacher, weight, bias
    for got, want in zip(*results.values(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11 * want.abs().max().item())
    with torch.no_grad():
        loss = alignment_loss(**args, distance="infonce+mse", temperature=0.7, backend="native")
    torch.testing.assert_close(loss, results["reference"][0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_dtypes(backend, device, normalize, distance, shape, dtype):
    skip_in_interpreter(backend, "+" not in distance or shape[0] != 5)
    options = {"normalize": normalize, "distance": distance, "temperature": 0.7, "reduction": "none"}
    values = {name: ([], [], []) for name in ("loss", *NAMES)}
    for _ in range(1 + 12 // shape[0]):  # the error of a few rows is a matter of luck
        args = inputs(*shape, dtype=dtype, device=device)
        plain_args = {name: x.detach().requires_grad_() for name, x in args.items()}
        true, got = exact(args), alignment_loss(**args, **options, backend=backend)
        plain, want = expected(plain_args, **options, losses=plain_losses), expected(true, **options)
        grad = torch.randn(shape[0]).to(dtype)
        for i, (loss, leaves) in enumerate(((got, args), (plain, plain_args), (want, true))):
            for name, value in (gradients(loss, leaves, grad) | {"loss": loss.detach()}).items():
                values[name][i].append(value.cpu().double().flatten())

    def size(x):  # in float32 both round alike, and the larger of their single worst entries is luck
        return x.square().mean().sqrt() if dtype == torch.float32 else x.abs().max()

    for name, three in values.items():
        found, found_plain, true_value = (torch.cat(x) for x in three)
        budget = 2 * size(found_plain - true_value) + torch.finfo(dtype).eps * true_value.abs().max()
        assert size(found - true_value) <= budget, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
def test_output_dtype(backend, device, distance, dtype):
    skip_in_interpreter(backend, "+" not in distance)
    args = inputs(97, 4, 3, dtype=dtype, device=device)
    run = functools.partial(alignment_loss, **args, distance=distance, backend=backend)
    rows, total, mean = (run(reduction=reduction) for reduction in ("none", "sum", "mean"))
    assert {loss.dtype for loss in (rows, total, mean)} == {torch.float32}
    assert rows.shape == (97,) and total.shape == mean.shape == ()
    torch.testing.assert_close(total, rows.sum())  # in float32, however few bits the inputs have
    torch.testing.assert_close(mean, rows.sum() / args["row_weight"].float().sum())
    mean.backward()
    assert {args[name].grad.dtype for name in NAMES} == {dtype}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "normalize, distance, up",
    [
        ("l2", "cosine+mse+infonce", True),
        ("l2", "cosine+mse+infonce", False),
        ("layer", "cosine", True),
        ("none", "cosine", True),
        ("none", "cosine", False),
    ],
)
def test_large_and_small_rows(backend, device, normalize, distance, up, dtype):
    # A power of two costs no bits, and is taken out again. The squares leave float16's range.
    args = inputs(5, 16, 32, bias=False, dtype=dtype, device=device)
    if normalize == "layer":  # whose eps counts for rows of small variance
        args |= {name: args[name].detach() * 2.0**4 for name in ("student", "teacher")}
    options = {"normalize": normalize, "distance": distance, "reduction": "none", "backend": backend}
    want = alignment_loss(**args, **options)
    power = (9 if up else -5) if dtype == torch.float16 else (40 if up else -25)
    scaled = {name: (args[name].detach() * 2.0**power).requires_grad_() for name in ("student", "teacher")}
    got = alignment_loss(**args | scaled, **options)
    torch.testing.assert_close(got, want)
    assert all(grad.isfinite().all() for grad in gradients(got, scaled, torch.ones(5)).values())


@pytest.mark.parametrize("wants", [s for n in range(6) for s in itertools.combinations(NAMES, n)], ids="+".join)
@pytest.mark.parametrize("distance", ["cosine", "infonce+mse"])
def test_every_subset_of_requires_grad(backend, device, distance, wants):
    skip_in_interpreter(backend, distance != "cosine" and len(wants) not in (0, 1, 5))
    args = inputs(7, 5, 6, dtype=finest(backend), device=device)
    args = {name: x.detach().requires_grad_(name in wants) for name, x in args.items()}
    if wants:
        assert tuple(check(args, backend, distance=distance)) == wants
    loss = alignment_loss(**args, distance=distance, backend=backend)
    assert loss.requires_grad == bool(wants)
    if wants:
        loss.backward()
    assert tuple(name for name in NAMES if args[name].grad is not None) == wants
    with torch.no_grad():
        torch.testing.assert_close(alignment_loss(**args, distance=distance, backend=backend), loss.detach())


@pytest.mark.parametrize("dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_zero_rows(backend, device, normalize, distance, dtype):
    skip_in_interpreter(backend, dtype is not None and "+" not in distance)
    exactly, dtype = dtype is None, dtype or finest(backend)
    args = inputs(7, 13, 9, bias=False, row_weight=False, dtype=dtype, device=device)
    zero = {"student": [1, 3], "teacher": [1, 4, 5]}
    with torch.no_grad():
        for name, rows in zero.items():
            args[name][rows] = 0
        if normalize == "layer":
            args["teacher"][5] = 0.1  # 0 without its mean, however it is rounded
    options = {"normalize": normalize, "distance": distance, "temperature": 0.7}
    if exactly:
        check(args, backend, **options)
    loss = alignment_loss(**args, **options, backend=backend)
    for name, grad in gradients(loss, args, torch.tensor(1.0)).items():
        assert grad.isfinite().all()
        if name in zero and (normalize == "l2" or distance == "cosine"):
            assert not grad[zero[name]].any()
        if name in zero:
            assert grad[[0, 2, 6]].any(dim=1).all()  # and the others have one


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_where_zero_begins(backend, device, normalize, side):
    args = inputs(4, 6, 6, bias=False, row_weight=False, dtype=finest(backend), device=device)
    sizes = torch.tensor([0.5, 0.99, 1.01, 2.0], dtype=torch.float64, device=device) * EPS
    with torch.no_grad():
        args["weight"].copy_(torch.eye(6))
        row = args[side]
        if normalize == "layer":
            row -= row.mean(1, keepdim=True)
            sizes *= 1e-5**0.5  # what the variance of so small rows is raised to
        row *= (sizes / row.norm(dim=1))[:, None]
    options = {"normalize": normalize, "reduction": "none"}
    loss = alignment_loss(**args, **options, backend=backend)
    torch.testing.assert_close(loss.cpu(), expected(exact(args), **options), check_dtype=False)
    assert (loss[:2] == 1).all() and (loss[2:] != 1).all()
    grad = gradients(loss, args, torch.ones(4))[side]
    assert not grad[:2].any() and grad[2:].any(dim=1).all()


@pytest.mark.parametrize("garbage", [0.0, 1e30, torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_rows_of_weight_0_are_left_out(backend, device, normalize, distance, garbage):
    skip_in_interpreter(backend, garbage == garbage)  # all but NaN
    args, out = inputs(9, 13, 9, dtype=finest(backend), device=device), [2, 5, 8]
    with torch.no_grad():
        args["student"][out[:2]], args["teacher"][out[1:]] = garbage, garbage
    assert not args["row_weight"][out].any()
    for reduction in REDUCTIONS:
        found = check(args, backend, normalize=normalize, distance=distance, reduction=reduction, temperature=0.7)
        assert not any(found[name][out].any() for name in ("student", "teacher"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
def test_row_weight_of_another_dtype(backend, device, distance, dtype):
    skip_in_interpreter(backend, "+" not in distance)
    args = inputs(7, 13, 9, dtype=finest(backend), device=device)
    args["row_weight"] = args["row_weight"].detach().mul(10).ceil().to(dtype)
    for reduction in REDUCTIONS:
        check(args, backend, distance=distance, reduction=reduction, temperature=0.7)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_all_weights_0(backend, device, normalize, distance):
    skip_in_interpreter(backend, "+" not in distance)
    args = inputs(5, 6, 4, dtype=finest(backend), device=device)
    with torch.no_grad():
        args["row_weight"].zero_()
    for reduction in REDUCTIONS:
        loss = alignment_loss(**args, normalize=normalize, distance=distance, reduction=reduction, backend=backend)
        assert torch.equal(loss, torch.zeros_like(loss))
        assert not any(grad.any() for grad in gradients(loss, args, torch.ones_like(loss)).values())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("distance", ["cosine", "mse", "smooth_l1", "infonce"])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_gradcheck(backend, device, normalize, distance, reduction):
    if backend == "triton":
        pytest.skip("needs float64")
    args = inputs(4, 3, 5, dtype=finest(backend), device=device)
    with torch.no_grad():
        args["row_weight"] += 0.5  # at 0 the row is left out: a jump
    options = dict(normalize=normalize, distance=distance, reduction=reduction, temperature=0.7, backend=backend)

    def run(*values):
        return alignment_loss(**dict(zip(NAMES, values, strict=True)), **options)

    assert torch.autograd.gradcheck(run, tuple(args.values()))
