"""What alignment_loss refuses, whatever the backend."""

import copy
from functools import partial

import pytest
import torch
from test_alignment import BACKENDS, NAMES, inputs

from fastprompt.nn import AlignmentLoss
from fastprompt.ops import alignment_loss


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize(
    "change, match",
    [
        ({"student": torch.ones(5)}, r"student, .* must have two dimensions, got shapes \(5,\), \(5, 4\), \(4, 3\)"),
        ({"teacher": torch.ones(1, 5, 4)}, r"must have two dimensions, got shapes \(5, 3\), \(1, 5, 4\), \(4, 3\)"),
        (
            {"student": torch.ones(5, 3, dtype=torch.int64)},
            "student must be of one of .*torch.float64.*got torch.int64",
        ),
        ({"student": torch.ones(5, 3).to(torch.float8_e5m2)}, "student must be of one of .*, got torch.float8_e5m2"),
        ({"row_weight": torch.ones(5) * 1j}, "row_weight must be real, got torch.complex64"),
        ({"teacher": torch.ones(6, 4)}, r"teacher must have shape \(5, 4\) .*, got \(6, 4\)"),
        ({"weight": torch.ones(3, 4)}, r"weight must have shape \(4, 3\) .*, got \(3, 4\)"),
        ({"bias": torch.ones(3)}, r"bias must have shape \(4,\) .*, got \(3,\)"),
        ({"row_weight": torch.ones(5, 1)}, r"row_weight must have shape \(5,\) .*, got \(5, 1\)"),
        ({"teacher": torch.ones(5, 4).half()}, "teacher must be torch.float32, as student is, got torch.float16"),
        ({"bias": torch.ones(4).bfloat16()}, "bias must be torch.float32, as student is, got torch.bfloat16"),
        ({"bias": torch.ones(4, device="meta")}, "bias must be on cpu, where student is, got meta"),
        ({"row_weight": torch.ones(5, device="meta")}, "row_weight must be on cpu, where student is, got meta"),
        (
            {"student": torch.ones(0, 3), "teacher": torch.ones(0, 4), "row_weight": None},
            r"student must have at least one row and feature, got shape \(0, 3\)",
        ),
        (
            {"student": torch.ones(5, 0), "weight": torch.ones(4, 0)},
            r"student must have at least one .* shape \(5, 0\)",
        ),
        (
            {"teacher": torch.ones(5, 0), "weight": torch.ones(0, 3), "bias": None},
            r"teacher must have at least one row and feature, got shape \(5, 0\)",
        ),
        ({"normalize": "l1"}, r"normalize must be one of \('l2', 'layer', 'none'\), got 'l1'"),
        ({"distance": "euclid"}, r"distance must be one of \('cosine', 'mse', .*\), or different .*, got 'euclid'"),
        ({"distance": ""}, "distance must be one of .* got ''"),
        ({"distance": "mse+"}, r"distance must be one of .* got 'mse\+'"),
        ({"distance": "mse+cosine+mse"}, r"distance must be .* different ones joined by '\+', got 'mse\+cosine\+mse'"),
        ({"reduction": "max"}, r"reduction must be one of \('mean', 'sum', 'none'\), got 'max'"),
        ({"distance": ["mse"]}, r"distance must be one of .* got \['mse'\]"),
        *(
            ({"temperature": number}, f"temperature must be at least 1e-06 and finite, got {number}")
            for number in (0, -0.5, 1e-45, 9e-7, float("inf"), float("nan"), 10**400)
        ),
        ({"backend": "gpu"}, r"backend must be None or one of .*, got 'gpu'"),
    ],
)
def test_bad_input(backend, change, match):
    args = inputs(5, 3, 4, dtype=torch.float32) | {"backend": backend}
    kept = copy.deepcopy({name: value for name, value in args.items() if name not in change})
    with pytest.raises(ValueError, match=match):
        alignment_loss(**kept, **change)


@pytest.mark.parametrize("temperature", [True, "0.1", 1j, torch.tensor(0.1)], ids=str)
def test_a_temperature_of_another_type(temperature):
    args = inputs(5, 3, 4, dtype=torch.float32)
    for run in partial(alignment_loss, **args), partial(AlignmentLoss, 3, 4):
        with pytest.raises(TypeError, match="temperature must be a number or None, got "):
            run(temperature=temperature)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_tensor(name):
    with pytest.raises(TypeError, match=f"{name} must be a tensor.*, got list"):
        alignment_loss(**inputs(5, 3, 4, dtype=torch.float32) | {name: [1.0]})
