"""What alignment_loss refuses, whatever the backend."""

import copy

import pytest
import torch
from test_alignment import BACKENDS, inputs

from fastprompt.ops import alignment_loss


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize(
    "change, match",
    [
        ({"student": torch.ones(5)}, r"student, .* must have two dimensions, got shapes \(5,\), \(5, 4\), \(4, 3\)"),
        ({"teacher": torch.ones(1, 5, 4)}, r"must have two dimensions, got shapes \(5, 3\), \(1, 5, 4\), \(4, 3\)"),
        ({"student": torch.ones(5, 3, dtype=torch.int64)}, "student must be floating point, got torch.int64"),
        ({"teacher": torch.ones(6, 4)}, r"teacher must have shape \(5, 4\) .*, got \(6, 4\)"),
        ({"weight": torch.ones(3, 4)}, r"weight must have shape \(4, 3\) .*, got \(3, 4\)"),
        ({"bias": torch.ones(3)}, r"bias must have shape \(4,\) .*, got \(3,\)"),
        ({"row_weight": torch.ones(5, 1)}, r"row_weight must have shape \(5,\) .*, got \(5, 1\)"),
        ({"teacher": torch.ones(5, 4).half()}, "teacher must be torch.float32, as student is, got torch.float16"),
        ({"bias": torch.ones(4).bfloat16()}, "bias must be torch.float32, as student is, got torch.bfloat16"),
        ({"bias": torch.ones(4, device="meta")}, "bias must be on cpu, where student is, got meta"),
        ({"row_weight": torch.ones(5, device="meta")}, "row_weight must be on cpu, where student is, got meta"),
        ({"student": torch.ones(0, 3), "teacher": torch.ones(0, 4), "row_weight": None}, "must have at least one row"),
        ({"normalize": "l1"}, r"normalize must be one of \('l2', 'layer', 'none'\), got 'l1'"),
        ({"distance": "euclid"}, r"distance must be one of \('cosine', 'mse', .*\), or different .*, got 'euclid'"),
        ({"distance": ""}, "distance must be one of .* got ''"),
        ({"distance": "mse+"}, r"distance must be one of .* got 'mse\+'"),
        ({"distance": "mse+cosine+mse"}, r"distance must be .* different ones joined by '\+', got 'mse\+cosine\+mse'"),
        ({"reduction": "max"}, r"reduction must be one of \('mean', 'sum', 'none'\), got 'max'"),
        ({"temperature": 0}, "temperature must be positive, got 0.0"),
        ({"temperature": -0.5}, "temperature must be positive, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be positive, got nan"),
        ({"backend": "gpu"}, r"backend must be None or one of .*, got 'gpu'"),
    ],
)
def test_bad_input(backend, change, match):
    args = inputs(5, 3, 4, dtype=torch.float32) | {"backend": backend}
    kept = copy.deepcopy({name: value for name, value in args.items() if name not in change})
    with pytest.raises(ValueError, match=match):
        alignment_loss(**kept, **change)
