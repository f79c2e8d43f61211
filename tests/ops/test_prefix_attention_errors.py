"""What prefix_attention refuses, whatever the backend."""

import pytest
import torch
from test_prefix_attention import NAMES, inputs, int32, randn

from fastprompt import ops
from fastprompt.ops import prefix_attention

WRONG_SHAPES = [
    ("query", (7, 8)), ("key", (7, 8)), ("key", (7, 2, 9)), ("value", (7, 1, 8)), ("value", (14, 8)),
    ("prefix_key", (2, 4, 8)), ("prefix_key", (3, 1, 4, 8)), ("prefix_value", (3, 2, 5, 8)), ("prefix_value", (8,)),
]  # fmt: skip
MOVED = [(n, inputs([3, 4])[n].to(to)) for n in NAMES[1:] for to in (torch.float16, "meta")]
WRONG_OPTIONS = [("window", -1), ("softcap", 0.0), ("dropout_p", -0.1), ("dropout_p", 1.0), ("backend", "flashing")]
WRONG_VALUES = [
    ({"cu_seqlens": int32([0, 3, 6])}, ValueError, "cu_seqlens must end at 7, .* got 6"),
    ({"cu_seqlens": int32([0, 8, 7])}, ValueError, "cu_seqlens must not decrease, got 7 after 8 at index 2"),
    ({"prefix_index": int32([0, 3])}, IndexError, r"prefix_index must be in \[0, 3\), got 3"),
    ({"prefix_index": int32([0, -1])}, IndexError, r"prefix_index must be in \[0, 3\), got -1"),
]


def test_compiled_checks_values_too():
    torch.compiler.reset()
    compiled = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
    for change, error, match in WRONG_VALUES:
        with pytest.raises(error, match=match):
            compiled(**inputs([3, 4]) | change)


@pytest.mark.parametrize(
    "change, error, match",
    [
        *WRONG_VALUES,
        *(({n: x}, ValueError, f"{n} must be torch.float64 on cpu, .* {x.dtype} on {x.device}") for n, x in MOVED),
        *(({n: randn(s)}, ValueError, rf"{n} .*got .*\({str(s)[1:-1]}\)") for n, s in WRONG_SHAPES),
        *(({n: x}, ValueError, rf"{n} must be .*got '?{x}") for n, x in WRONG_OPTIONS),
        *(
            ({n: 0.5}, ValueError, f"'cpu' needs no softcap and no dropout on cpu, got .*{n}=0.5")
            for n in ("softcap", "dropout_p")
        ),
        ({"window": 0, "is_causal": True}, ValueError, "window must be at least 1, got 0"),
        ({"query": randn(7, 6, 8).int()}, ValueError, "query must be .* floating point, got .* torch.int32"),
        ({"query": randn(7, 5, 8)}, ValueError, "query's heads must be a multiple of key's, got 5 and 2"),
        ({n: randn(0, 2, 4, 8) for n in NAMES[3:]}, ValueError, "prefix_key must hold .* got a bank of none"),
        ({"cu_seqlens": [0, 3, 7]}, TypeError, "cu_seqlens must be a tensor, got list"),
        ({"cu_seqlens": torch.tensor([0, 3, 7])}, TypeError, "cu_seqlens must be torch.int32, got torch.int64"),
        ({"cu_seqlens": int32([0, 3, 7]).to("meta")}, ValueError, "cu_seqlens must be on cpu, .* got meta"),
        ({"prefix_index": torch.tensor([0])}, ValueError, r"prefix_index must be \(2,\), .* got \(1,\)"),
        ({"prefix_index": randn(2)}, TypeError, "prefix_index must be torch.int32 or .* got torch.float64"),
        ({"prefix_index": int32([0, 1]).to("meta")}, ValueError, "prefix_index must be on cpu, .* got meta"),
    ],
)
def test_bad_input(change, error, match):
    for backend in ["cpu"] if "'cpu'" in match else [None, "reference"]:
        with pytest.raises(error, match=match):
            prefix_attention(**inputs([3, 4]) | {"backend": backend} | change)


def test_rows_of_no_segment_are_found_by_shape_alone():
    """On a device whose values are not read as well: kernels would leave the outputs as they were."""
    none, rows = torch.zeros(1, dtype=torch.int32, device="meta"), torch.empty(7, 8, device="meta")
    query, prefix = rows.unsqueeze(1), torch.empty(1, 1, 2, 8, device="meta")
    for run in (
        lambda: ops.prefix_attention(query, query, query, prefix, prefix, none),
        lambda: ops.pack_prompt(rows, torch.zeros(7, dtype=torch.int64, device="meta"), none, prefix[0]),
        lambda: ops.segment_mean(rows, none),
    ):
        with pytest.raises(ValueError, match="cu_seqlens must end at 7, the number of packed rows, got the bounds of"):
            run()
