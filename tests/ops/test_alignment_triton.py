"""What is special to the Triton backend of alignment_loss; test_alignment.py holds it to the definition."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

triton = pytest.importorskip("triton")
if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from test_alignment import NAMES, TRITON_DEVICE, check, inputs  # noqa: E402

from fastprompt.ops import alignment_loss  # noqa: E402
from fastprompt.ops.alignment import triton as backend  # noqa: E402

DISTANCE = "cosine+mse+infonce"


def arguments(*shape, wants=NAMES, dtype=torch.float32, **kind):
    args = inputs(*shape, dtype=dtype, device=TRITON_DEVICE, **kind)
    return {name: x if x is None else x.detach().requires_grad_(name in wants) for name, x in args.items()}


def shapes_of(events, name):
    return [event.input_shapes for event in events if event.name == name]


def profiled(run):
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as profiler:
        run()
    return profiler.events()


@pytest.mark.parametrize("distance, reduction", [("cosine", "mean"), (DISTANCE, "none")])
def test_several_chunks(monkeypatch, distance, reduction):
    monkeypatch.setattr(backend, "CHUNK_BYTES", 1)
    args = arguments(2 * backend.CHUNK_MULTIPLE + 5, 6, 7)
    check(args, "triton", distance=distance, reduction=reduction, temperature=0.7)


def test_bfloat16_sums_over_chunks_are_float32(monkeypatch):
    rows = 4 * backend.CHUNK_MULTIPLE
    args = arguments(rows, 1, 1, row_weight=False, dtype=torch.bfloat16)
    with torch.no_grad():  # loss t^2 at z = 0: each chunk's gradient of W and b is 1/4, but one row's of the first is 2
        args["student"].fill_(1), args["weight"].fill_(0), args["bias"].fill_(0)
        args["teacher"].fill_(-0.5), args["teacher"][0].fill_(-1)
    run = {"normalize": "none", "distance": "mse", "reduction": "sum", "backend": "triton"}
    monkeypatch.setattr(backend, "CHUNK_BYTES", 1)
    alignment_loss(**args, **run).backward()
    for name in ("weight", "bias"):
        assert args[name].grad.item() == torch.tensor(rows + 1.0).bfloat16().item()


@pytest.mark.parametrize("normalize", ["l2", "layer", "none"])
def test_rows_longer_than_a_block(normalize):
    # 2048 features are a block of the row kernel, 64 a tile of the sums, and 37 are left.
    for wants in NAMES, ():
        args = arguments(3, 5, 2048 + 37, wants=wants)
        if wants:
            check(args, "triton", normalize=normalize, distance="cosine+smooth_l1")
        got, want = (
            alignment_loss(**args, normalize=normalize, backend=name).detach() for name in ("triton", "reference")
        )
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", ["l2", "layer"])
def test_means_far_from_zero(normalize):
    args = arguments(5, 4, 700, wants=())
    args["bias"] += 300
    args["teacher"] -= 1000
    exact = {name: x.double() for name, x in args.items()}
    want = alignment_loss(**exact, normalize=normalize, reduction="none", backend="reference")
    plain, got = (
        alignment_loss(**args, normalize=normalize, reduction="none", backend=name) for name in ("reference", "triton")
    )
    budget = 2 * (plain - want).abs().max() + torch.finfo(torch.float32).eps * want.abs().max()
    assert (got - want).abs().max() <= budget


def test_infonce_over_several_tiles():
    rows = 128 + 7
    config = backend.configuration(rows, rows, 6, torch.float32)
    assert rows > 2 * config["ROWS"] and rows > 2 * config["COLUMNS"]
    check(arguments(rows, 6, 5), "triton", distance="infonce", temperature=0.7)


@pytest.mark.parametrize("normalize", ["l2", "none"])
def test_no_projection_in_memory(normalize):
    rows, features = 150, 130
    args = arguments(rows, 5, features)
    with torch.no_grad():
        events = profiled(lambda: alignment_loss(**args, normalize=normalize, backend="triton"))
    allocated = sum(max(0, event.self_cpu_memory_usage + event.self_device_memory_usage) for event in events)
    assert 0 < allocated < rows * features * 4 / 2
    assert not {"aten::mm", "aten::addmm", "aten::linear"} & {event.name for event in events}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wants, products", [(NAMES, 2), (("weight",), 1), (("student",), 1), (("bias",), 0)], ids=str)
def test_no_product_that_nobody_asked_for(wants, products, reduction):
    rows, student_dim, teacher_dim = 7, 5, 3
    args = arguments(rows, student_dim, teacher_dim, bias=True, wants=wants)
    run = {"distance": "cosine", "reduction": reduction, "backend": "triton"}
    events = profiled(lambda: alignment_loss(**args, **run).sum().backward())
    found = [shapes[:2] for shapes in shapes_of(events, "aten::mm")]
    assert len(found) == products
    assert ([[teacher_dim, rows], [rows, student_dim]] in found) == ("weight" in wants)
    assert ([[rows, teacher_dim], [teacher_dim, student_dim]] in found) == ("student" in wants)
    assert len(shapes_of(events, "aten::addmm")) == 1  # z, once


def test_backward_scales_what_forward_computed():
    args = arguments(5, 4, 3)
    loss = alignment_loss(**args, distance=DISTANCE, backend="triton")
    leaves = list(args.values())
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    fourfold = torch.autograd.grad(loss * 4, leaves)
    assert all(torch.equal(4 * a, b) for a, b in zip(once, fourfold, strict=True))


@pytest.mark.parametrize(
    "names, needs",
    [
        (("l2", "cosine", 0.05, "mean"), [False] * 5),
        (("layer", "infonce+mse", 0.7, "none"), [False] * 5),
        (("layer", "infonce+mse", 0.7, "sum"), [True, False, True, False, True]),
    ],
    ids=str,
)
def test_opcheck(names, needs):
    args = arguments(5, 4, 3).values()
    # Gradients are outputs like the loss, but have no derivative: the other checks would ask for it.
    checks = {"test_utils": ("test_schema", "test_faketensor")} if any(needs) else {}
    torch.library.opcheck(backend._alignment_loss, (*args, None, *names, needs), **checks)


def test_what_is_refused():
    args = inputs(5, 4, 3, device=TRITON_DEVICE)
    with pytest.raises(ValueError, match="backend 'triton' computes in float32, bfloat16 or float16, got .*float64"):
        alignment_loss(**args, backend="triton")
