"""The host's part of the Triton operators: what a call dispatches, and what it compiles."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton")
if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from fastprompt.ops import alignment_loss, prefix_attention, segment_mean  # noqa: E402
from fastprompt.ops._triton import INTERPRETED  # noqa: E402
from fastprompt.ops.alignment import triton as alignment  # noqa: E402
from fastprompt.ops.prefix_attention import triton as attention  # noqa: E402
from fastprompt.ops.segment_pool import triton as pool  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"


def randn(*shape):
    return torch.nn.Parameter(torch.randn(shape, device=DEVICE))


BOUNDS = torch.tensor([0, 1, 3], dtype=torch.int32, device=DEVICE)
ROWS, BANK, WIDE = (3, 1, 16), (1, 1, 2, 16), (3, 16)
CALLS = {
    "prefix_attention": (
        [ROWS, ROWS, ROWS, BANK, BANK],
        lambda *tensors: prefix_attention(*tensors, BOUNDS, backend="triton"),
    ),
    "alignment_loss": ([WIDE, WIDE, (16, 16)], lambda *tensors: alignment_loss(*tensors, backend="triton")),
    "segment_pool": ([WIDE], lambda hidden: segment_mean(hidden, BOUNDS, backend="triton")),
}


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.seen.add(operator.name())
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_the_operator_is_dispatched_only_to_who_watches(name):
    shapes, call = CALLS[name]
    tensors = [randn(*shape) for shape in shapes]

    def step():
        return torch.autograd.grad(call(*tensors).sum(), tensors)

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        alone = step()
    ran = [event.name for event in profiler.events() if event.name.startswith("fastprompt::")]
    assert sorted(ran) == [f"fastprompt::{name}_triton", f"fastprompt::{name}_tritonBackward"]  # the Function alone
    with Watch() as watch:
        watched = step()
    assert f"fastprompt::{name}_triton" in watch.seen
    assert all(map(torch.equal, alone, watched))


# Tiles have up to three sizes by the mean segment's length, and four by the rows of an alignment; "infonce" pairs six.
# Attention is called with and without a prompt and a window, and with a bias; the alignment with and without weights of
# rows.
VARIANTS = {
    **dict.fromkeys(["forward_kernel", "query_kernel", "key_value_kernel", "prefix_kernel"], 3 * 5),
    **dict.fromkeys(["delta_kernel", "sum_splits_kernel"], 1),
    "sums_kernel": 4,
    "row_kernel": 3,
    "cosine_kernel": 1,
    "normalize_kernel": 2,
    "infonce_kernel": 6 * 2,
    "similarity_gradient_kernel": 6 * 2,
    "pool_kernel": 1,
    "spread_kernel": 1,
}


def test_what_200_random_batches_compile():
    script = Path(__file__).with_name("aot_variants.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == VARIANTS.keys()
    assert {name: count for name, count in found.items() if count > VARIANTS[name]} == {}


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def attend(tokens=2**17, segments=2**17, entries=1, prefix=4, dtype=torch.bfloat16):
    rows, bank = empty(tokens, 8, 128, dtype=dtype), empty(entries, 8, prefix, 128, dtype=dtype)
    bounds, index = empty(segments + 1, dtype=torch.int32), None if entries == 1 else empty(segments, dtype=torch.int64)
    tensors, options = (rows, rows, rows, bank, bank), (False, 0.125, None, None, False, 0.0, 0)
    others = bounds, index, None, None, None
    out, _, *saved = attention._forward(*tensors, *others, *options)
    attention._backward(rows, *tensors, out, *saved, *others, *options, True, True, True)


def align(distance, rows):
    rows, weight = empty(rows, 384), empty(384, 384)
    needs = [distance != "cosine"] * 3 + [False] * 2
    alignment._compute(rows, rows, weight, None, None, None, "l2", distance, 0.05, "mean", needs)


LARGE = {
    "tokens": lambda: attend(tokens=2**22, segments=4),
    "segments": attend,
    "entries": lambda: attend(entries=2**14),
    "prefix": lambda: attend(prefix=2**23, dtype=torch.float32),
    "cosine": lambda: align("cosine", 2**22),
    "infonce": lambda: align("infonce", 2**15),
    "pool": lambda: pool._pool(empty(2**22, 384), empty(2**21 + 1, dtype=torch.int32), 0),
    "spread": lambda: pool._spread(empty(2**21, 384), empty(2**21 + 1, dtype=torch.int32), 2**22, 0),
}


@pytest.mark.parametrize("name", LARGE)
def test_grids_of_large_inputs(name, monkeypatch):
    """CUDA takes up to 2**31 - 1 programs on x, and 65535 on y and on z."""
    grids = []

    def stub(kernel, grid):
        grids.append(grid)
        return lambda *args, **kwargs: None

    monkeypatch.setattr(type(attention.launches.prefix_kernels.prefix_kernel), "__getitem__", stub)
    LARGE[name]()
    assert grids and all(grid[0] < 2**31 and max(grid[1:], default=1) < 2**16 for grid in grids), grids
