"""The CUDA C++ path of alignment_loss in tests/cuda_emulator. On a GPU test_alignment.py runs it as "native"."""

import pytest
import test_alignment as tests
import test_alignment_torch
import torch
from cuda_emulator import load_emulated
from layouts import LAYOUTS
from test_alignment import DISTANCES, DTYPES, NAMES, NORMALIZATIONS, REDUCTIONS, SHAPES, check, inputs

from fastprompt import _native
from fastprompt.ops import alignment_loss

if not _native.available("cpu"):
    pytest.skip(str(_native.why_not("cpu")), allow_module_level=True)

from fastprompt.ops.alignment import native  # noqa: E402


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setattr(native, "_forward", load_emulated().alignment_loss.default)
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN: what a kernel leaves out shows
    yield
    torch.use_deterministic_algorithms(was)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_values_and_gradients(normalize, distance):
    for n, reduction in enumerate(REDUCTIONS):
        args = inputs(7, 13, 9, bias=n != 1, row_weight=n != 2)
        check(args, "native", normalize=normalize, distance=distance, reduction=reduction, temperature=0.7)
        check(inputs(*SHAPES[n]), "native", normalize=normalize, distance=distance, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize, distance", list(zip(NORMALIZATIONS, DISTANCES[3:], strict=True)))
def test_error_budget(normalize, distance, dtype):
    tests.test_dtypes("native", "cpu", normalize, distance, SHAPES[2], dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_float16_gradients_under_a_loss_scale(reduction):
    test_alignment_torch.test_float16_gradients_under_a_loss_scale("native", "cpu", reduction)


def test_autocast_changes_nothing():
    test_alignment_torch.test_autocast_changes_nothing("native", "cpu")


@pytest.mark.parametrize("distance", DISTANCES)
def test_rows_left_out_and_rows_of_zero(distance):
    for normalize in NORMALIZATIONS:
        tests.test_rows_of_weight_0_are_left_out("native", "cpu", normalize, distance, torch.nan)
        tests.test_zero_rows("native", "cpu", normalize, distance, torch.float32)
        tests.test_all_weights_0("native", "cpu", normalize, distance)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_where_zero_begins(normalize, side):
    tests.test_where_zero_begins("native", "cpu", normalize, side)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    test_alignment_torch.test_layouts("native", "cpu", layout)


@pytest.mark.parametrize("wants", [(), *((name,) for name in NAMES), NAMES[:3], NAMES], ids="+".join)
def test_subsets_of_requires_grad(wants):
    tests.test_every_subset_of_requires_grad("native", "cpu", "infonce+mse", wants)


def test_without_gradients_and_the_same_bits_twice():
    args = inputs(97, 33, 63, dtype=torch.float32)
    losses = [alignment_loss(**args, distance="infonce+cosine", backend="native") for _ in range(2)]
    first, second = (torch.autograd.grad(loss, [args[name] for name in NAMES]) for loss in losses)
    assert torch.equal(*losses) and all(map(torch.equal, first, second))
    with torch.no_grad():
        assert torch.equal(alignment_loss(**args, distance="infonce+cosine", backend="native"), losses[0])
