"""Each operator on each backend against its reference in float64, over what a caller may hand it.

`make test` gives all of them a minute, `make fuzz` as long as is asked for: --fuzz-seconds, and --seed fresh.
"""

import importlib.util
import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from harness import compare, fuzz, layouts, lengths, trained
from hypothesis import strategies as st
from layouts import in_layout
from torch import Tensor

from fastprompt import _native
from fastprompt.ops import (
    alignment_loss,
    linear_cross_entropy,
    pack_prompt,
    prefix_attention,
    segment_first,
    segment_last,
    segment_mean,
)
from fastprompt.ops.gated import gated
from fastprompt.ops.rms_norm import rms_norm
from fastprompt.ops.rotary import rotary

NATIVE = ["native"] if _native.available("cpu") else []
TRITON = []
if importlib.util.find_spec("triton"):
    from fastprompt.ops._triton import INTERPRETED

    TRITON = ["triton"] * INTERPRETED

WIDE, ALL = (
    (torch.float32, torch.float64, torch.bfloat16),
    (torch.float32, torch.float64, torch.bfloat16, torch.float16),
)
# What the backends compute in.
DTYPES = {"native": WIDE, "triton": (torch.float32, torch.bfloat16, torch.float16), "cpu": WIDE, "chunked": ALL}
HUGE = st.sampled_from([2**31 - 1, 2**31, 2**63 - 1])
CHECKS: dict[str, tuple[Callable, dict]] = {}


def operator(backends: list[str], **strategies):
    """Registers a check of an operator, once for each backend."""

    def register(check):
        for backend in backends:
            dtypes = st.sampled_from(strategies.get("dtypes", DTYPES)[backend])
            drawn = {name: strategy for name, strategy in strategies.items() if name != "dtypes"}
            drawn |= {"dtype": dtypes, "threads": st.integers(1, 3), "grad_layout": layouts}
            CHECKS[f"{check.__name__}-{backend}"] = partial(check, backend), drawn
        return check

    return register


@pytest.mark.parametrize("name", CHECKS)
def test_fuzz(name, request):
    seconds = float(request.config.option.fuzz_seconds) / len(CHECKS)
    check, strategies = CHECKS[name]
    count = fuzz(check, strategies, seconds, begin=torch.initial_seed() % 2**32)
    assert count > 0
    print(f"{name}: {count} inputs")


def bounds(lengths: list[int], layout: str | None) -> Tensor:
    return integers([0, *itertools.accumulate(lengths)], torch.int32, layout)


def integers(values: list[int], dtype: torch.dtype, layout: str | None) -> Tensor:
    """The numbers in memory of some layout; "expanded" would be other numbers."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor if layout in (None, "expanded") else in_layout(tensor, layout)


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


INDICES = st.sampled_from([None, torch.int32, torch.int64])


@operator(
    [*NATIVE, *TRITON, "cpu"],
    how=trained(("query", "key", "value", "prefix_key", "prefix_value")),
    segments=lengths,
    heads=st.sampled_from([(1, 1), (2, 2), (3, 1), (4, 2), (9, 3)]),
    features=st.one_of(st.integers(1, 20), st.sampled_from([32, 64, 80])),
    prefix=st.one_of(st.integers(0, 9), st.sampled_from([65, 130])),
    bank=st.integers(1, 3),
    index=INDICES,
    index_layout=layouts,
    is_causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(0, 12), HUGE),
    scale=st.one_of(st.none(), st.floats(-2, 2)),
    softcap=st.one_of(st.none(), st.floats(0.5, 50)),
    bias=st.one_of(st.none(), st.tuples(st.sampled_from([1, 3, 15, 101]), layouts)),
    keys=st.one_of(st.none(), lengths),
    in_window=st.booleans(),
    prompt_rows=st.integers(0, 9),
    size=st.sampled_from([1.0, 0.01, 5.0]),
)
def attention(
    backend, dtype, how, segments, heads, features, prefix, bank, index, index_layout, is_causal, window,
    scale, softcap, bias, keys, in_window, prompt_rows, size, **common,
):  # fmt: skip
    bias = bias if backend != "cpu" else None
    if keys is not None:  # with others it is refused
        keys, is_causal, window, bias = [*keys, *[0] * len(segments)][: len(segments)], False, None, None
    prompt_rows = prompt_rows if is_causal else 0
    size = min(size, 1.0) if backend == "cpu" else size  # it keeps a log-sum-exp rounded to the size of the scores
    rows, (heads, kv_heads) = sum(segments) + prompt_rows, heads
    own_rows = rows if keys is None else sum(keys)
    tensors = {"query": normal(rows, heads, features, dtype=dtype, scale=size)}
    tensors |= {name: normal(own_rows, kv_heads, features, dtype=dtype, scale=size) for name in ("key", "value")}
    options = {
        "cu_seqlens": bounds(segments, index_layout),
        "is_causal": is_causal,
        "window": max(1, window) if is_causal and window is not None else window,
        "scale": scale,
        "softcap": softcap if backend != "cpu" and bias is None else None,
        "prefix_in_window": in_window,
        "return_lse": True,
    }
    if bias is not None:
        columns, layout = bias
        table = normal(heads, columns, dtype=dtype, scale=3.0)
        options["relative_bias"] = table if layout is None else in_layout(table, layout)
    if keys is not None:
        options["cu_seqlens_k"] = bounds(keys, index_layout)
    if prompt_rows:
        options |= {"prompt_rows": prompt_rows, "prefix_key": None, "prefix_value": None}
    else:
        shape = bank, kv_heads, prefix, features
        tensors |= {name: normal(*shape, dtype=dtype, scale=size) for name in ("prefix_key", "prefix_value")}
        if index is not None:
            which = torch.randint(bank, (len(segments),)).tolist()
            options["prefix_index"] = integers(which, index, index_layout)
    how = {name: how[name] for name in tensors}
    run = partial(prefix_attention, **options)
    compare(partial(run, backend=backend), partial(run, backend="reference"), tensors, how, **common)


@operator(
    [*NATIVE, *TRITON],
    dtypes=DTYPES | {"native": ALL},
    how=trained(("student", "teacher", "weight", "bias", "row_weight")),
    rows=st.integers(1, 40),
    student=st.integers(1, 70),
    teacher=st.integers(1, 70),
    left_out=st.sampled_from(["none", "some", "all"]),
    with_bias=st.booleans(),
    with_weights=st.booleans(),
    normalize=st.sampled_from(["l2", "layer", "none"]),
    distances=st.sets(st.sampled_from(["cosine", "mse", "smooth_l1", "infonce"]), min_size=1),
    temperature=st.floats(0.1, 5),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
def alignment(
    backend, dtype, how, rows, student, teacher, left_out, with_bias, with_weights, normalize, distances,
    temperature, reduction, **common,
):  # fmt: skip
    tensors = {
        "student": normal(rows, student, dtype=dtype),
        "teacher": normal(rows, teacher, dtype=dtype),
        "weight": normal(teacher, student, dtype=dtype, scale=student**-0.5),
    }
    if with_bias:
        tensors["bias"] = normal(teacher, dtype=dtype)
    if with_weights:
        kept = {"none": torch.ones(rows), "some": torch.rand(rows) > 0.4, "all": torch.zeros(rows)}[left_out]
        tensors["row_weight"] = ((torch.rand(rows) + 0.1) * kept).to(dtype)
    how = {name: how[name] for name in tensors}
    options = {"distance": "+".join(sorted(distances)), "temperature": temperature, "reduction": reduction}
    run = partial(alignment_loss, normalize=normalize, **options)
    compare(partial(run, backend=backend), partial(run, backend="reference"), tensors, how, **common)


@operator(
    [*NATIVE],
    dtypes={"native": ALL},
    how=trained(("embedding", "prompt")),
    segments=lengths,
    vocabulary=st.integers(1, 50),
    features=st.integers(0, 40),
    prompt_rows=st.integers(0, 6),
    bank=st.integers(1, 3),
    index=INDICES,
    ids=st.sampled_from([torch.int32, torch.int64]),
    ids_layout=layouts,
    per_segment=st.booleans(),
    scale=st.sampled_from([1.0, 0.0, -3.5, 34.0]),
)
def packing(
    backend, dtype, how, segments, vocabulary, features, prompt_rows, bank, index, ids, ids_layout,
    per_segment, scale, **common,
):  # fmt: skip
    tensors = {
        "embedding": normal(vocabulary, features, dtype=dtype),
        "prompt": normal(bank, prompt_rows, features, dtype=dtype),
    }
    how |= {"embedding": (False, how["embedding"][1])}  # frozen, for this backend
    options = {
        "input_ids": integers(torch.randint(vocabulary, (sum(segments),)).tolist(), ids, ids_layout),
        "cu_seqlens": bounds(segments, ids_layout),
        "per_segment": per_segment,
        "scale": scale,
    }
    if index is not None:
        options["prompt_index"] = integers(torch.randint(bank, (len(segments),)).tolist(), index, ids_layout)
    run = partial(pack_prompt, **options)
    compare(partial(run, backend=backend), partial(run, backend="reference"), tensors, how, **common)


@operator(
    [*NATIVE, *TRITON],
    dtypes=DTYPES | {"native": ALL},
    how=trained(("hidden",)),
    pool=st.sampled_from([segment_mean, segment_first, segment_last]),
    segments=lengths,
    features=st.integers(0, 70),
    bounds_layout=layouts,
)
def pooling(backend, dtype, how, pool, segments, features, bounds_layout, **common):
    tensors = {"hidden": normal(sum(segments), features, dtype=dtype)}
    run = partial(pool, cu_seqlens=bounds(segments, bounds_layout))
    compare(partial(run, backend=backend), partial(run, backend="reference"), tensors, how, **common)


@operator(
    [*NATIVE, *TRITON],
    how=trained(("x", "weight")),
    shape=st.lists(st.integers(0, 9), max_size=3),
    features=st.integers(1, 70),
    eps=st.sampled_from([1e-6, 1e-12, 0.1]),
    offset=st.sampled_from([0.0, 1.0]),
    size=st.sampled_from([1.0, 1e-4, 1e4]),
)
def norm(backend, dtype, how, shape, features, eps, offset, size, **common):
    tensors = {"x": normal(*shape, features, dtype=dtype, scale=size), "weight": normal(features, dtype=dtype)}
    how |= {"weight": (False, how["weight"][1])}
    run = partial(rms_norm, eps=eps, offset=offset)
    compare(partial(run, backend=backend), partial(run, backend="reference"), tensors, how, **common)


@operator(
    [*NATIVE, *TRITON],
    how=trained(("query", "key", "cos", "sin")),
    rows=st.integers(0, 20),
    heads=st.integers(0, 4),
    kv_heads=st.integers(0, 3),
    half=st.integers(1, 20),
)
def rotation(backend, dtype, how, rows, heads, kv_heads, half, **common):
    angle = torch.randn(rows, half).repeat(1, 2) * 10
    tensors = {
        "query": normal(rows, heads, 2 * half, dtype=dtype),
        "key": normal(rows, kv_heads, 2 * half, dtype=dtype),
        "cos": angle.cos().to(dtype),
        "sin": angle.sin().to(dtype),
    }
    how |= {name: (False, how[name][1]) for name in ("cos", "sin")}
    compare(partial(rotary, backend=backend), partial(rotary, backend="reference"), tensors, how, **common)


@operator(
    [*NATIVE, *TRITON],
    how=trained(("gate", "up")),
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    activation=st.sampled_from(["silu", "gelu_tanh"]),
    size=st.sampled_from([1.0, 1e-4, 10.0, 60.0]),
)
def gate(backend, dtype, how, shape, activation, size, **common):
    tensors = {"gate": normal(*shape, dtype=dtype, scale=size), "up": normal(*shape, dtype=dtype)}
    run = partial(gated, activation=activation)
    compare(partial(run, backend=backend), partial(run, backend="reference"), tensors, how, **common)


@operator(
    ["chunked"],
    how=trained(("hidden", "weight")),
    rows=st.integers(0, 30),
    features=st.integers(1, 40),
    vocabulary=st.one_of(st.integers(1, 40), st.sampled_from([1024, 1025, 2100])),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    softcap=st.one_of(st.none(), st.floats(0.5, 50)),
    target_layout=layouts,
)
def cross_entropy(
    backend, dtype, how, rows, features, vocabulary, ignored, smoothing, softcap, target_layout, **common
):
    tensors = {
        "hidden": normal(rows, features, dtype=dtype),
        "weight": normal(vocabulary, features, dtype=dtype),
    }
    how |= {"weight": (False, how["weight"][1])}
    target = torch.randint(vocabulary, (rows,)).masked_fill(torch.rand(rows) < ignored, -100)
    target = integers(target.tolist(), torch.int64, target_layout)
    run = partial(linear_cross_entropy, target=target, label_smoothing=smoothing, softcap=softcap)
    compare(partial(run, backend=backend), partial(run, backend="reference"), tensors, how, **common)
