"""What is special about the fused kernel: prompt rows in the same call, division of the work, instruction sets."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from fastprompt import _native
from fastprompt.ops import prefix_attention

pytestmark = pytest.mark.skipif(not _native.available("cpu"), reason=str(_native.why_not("cpu")))
BACKENDS = ["native", "cpu", "reference"]


def bounds(lengths) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def plain(query, key, value, own, window, prompt_rows, scale=None, in_window=False):
    """Rows `own` (prompt, then a segment) of one head group, causal: the definition, with the prompt as plain keys."""
    group = query.shape[1] // key.shape[1]
    q, k, v = query[own], key[own].repeat_interleave(group, 1), value[own].repeat_interleave(group, 1)
    score = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    i, j = torch.arange(len(q))[:, None], torch.arange(len(q))[None]
    seen = j <= i
    if window is not None:
        inside = i - j < window
        of_prompt = (j < prompt_rows) & (i >= prompt_rows)
        seen = seen & (inside if in_window else inside | of_prompt)
    return torch.einsum("hij,jhd->ihd", score.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("window", "in_window"), [(None, False), (4, False), (4, True), (30, True)])
@pytest.mark.parametrize("lengths", [[3, 0, 9, 1], [63], []], ids=str)
@pytest.mark.parametrize(("heads", "prompt_rows", "features"), [((6, 2), 5, 24), ((2, 2), 33, 64)])
def test_prompt_rows(backend, lengths, window, in_window, heads, prompt_rows, features):
    rows = prompt_rows + sum(lengths)
    query, key, value = (torch.randn(rows, h, features, dtype=torch.float64) for h in (heads[0], heads[1], heads[1]))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    front = list(range(prompt_rows))
    parts = [plain(*leaves, front, window, prompt_rows)]
    begin = prompt_rows
    for length in lengths:
        own = front + list(range(begin, begin + length))
        parts.append(plain(*leaves, own, window, prompt_rows, in_window=in_window)[prompt_rows:])
        begin += length
    want = torch.cat(parts)
    options = dict(is_causal=True, window=window, prefix_in_window=in_window, prompt_rows=prompt_rows)
    got = prefix_attention(*leaves, None, None, bounds(lengths), **options, backend=backend)
    grad = torch.randn_like(want)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trains", [c for n in range(1, 4) for c in itertools.combinations(range(3), n)], ids=str)
def test_prompt_rows_with_every_subset_of_requires_grad(backend, trains):
    tensors = [torch.randn(20, h, 16, dtype=torch.float64) for h in (4, 2, 2)]
    options = dict(is_causal=True, prompt_rows=6)
    whole = [x.clone().requires_grad_() for x in tensors]
    out = prefix_attention(*whole, None, None, bounds([9, 5]), **options, backend="reference")
    grad = torch.randn_like(out)
    want = torch.autograd.grad(out, whole, grad)
    leaves = [x.clone().requires_grad_(n in trains) for n, x in enumerate(tensors)]
    prefix_attention(*leaves, None, None, bounds([9, 5]), **options, backend=backend).backward(grad)
    for n, leaf in enumerate(leaves):
        if n in trains:
            torch.testing.assert_close(leaf.grad, want[n])
        else:
            assert leaf.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_causal": False}, "prompt_rows needs is_causal"),
        ({"prompt_rows": 8}, r"prompt_rows must be in \[1, 7\], the number of rows, got 8"),
        ({"prompt_rows": -1}, r"prompt_rows must be in \[1, 7\], .* got -1"),
        ({"prefix_key": torch.randn(1, 2, 4, 8)}, "prefix_key and prefix_value must be None with prompt_rows"),
        ({"cu_seqlens": bounds([7])}, "cu_seqlens must end at 4, .* got 7"),
        ({"prompt_rows": 0}, "prefix_key and prefix_value must be given, or prompt_rows"),
    ],
)
def test_bad_prompt_rows(change, message):
    rows = {name: torch.randn(7, 2, 8) for name in ("query", "key", "value")}
    arguments = rows | {"prefix_key": None, "prefix_value": None, "cu_seqlens": bounds([4])}
    with pytest.raises(ValueError, match=message):
        prefix_attention(**(arguments | {"is_causal": True, "prompt_rows": 3} | change))


@pytest.mark.parametrize("shape", [(3, 0, 8), (3, 2, 0)], ids=str)
def test_no_heads_or_features(shape):
    rows, prefix = torch.randn(3, *shape), torch.randn(2, 1, *shape)
    with pytest.raises(ValueError, match=r"query must be \(T, H, D\) with H and D at least 1"):
        prefix_attention(*rows, *prefix, bounds([3]))


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("lengths", [[201], [90, 0, 133, 2], [5] * 11], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 3])
def test_division_among_threads(threads, lengths, kv_heads):
    """Long segments and the prefix are shared by several threads; the sums are of a fixed order."""
    torch.manual_seed(0)
    rows, features, was = sum(lengths), 20, torch.get_num_threads()
    leaves = [torch.randn(rows, h, features, dtype=torch.float64) for h in (2 * kv_heads, kv_heads, kv_heads)]
    leaves += [torch.randn(2, kv_heads, 150, features, dtype=torch.float64) for _ in range(2)]
    index = torch.arange(len(lengths)) % 2
    for is_causal in (False, True):
        results = []
        try:
            for backend, count in (("reference", was), ("native", threads), ("native", threads)):
                torch.set_num_threads(count)
                leaves = [x.detach().requires_grad_() for x in leaves]
                options = dict(prefix_index=index, is_causal=is_causal, backend=backend)
                out = prefix_attention(*leaves, bounds(lengths), **options)
                results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        finally:
            torch.set_num_threads(was)
        torch.testing.assert_close(results[1], results[0])
        assert all(torch.equal(a, b) for a, b in zip(results[1], results[2], strict=True))


PROGRAM = """
import sys, torch
from fastprompt.ops import prefix_attention
torch.manual_seed(0)
leaves = [torch.randn(97, h, 72) for h in (6, 2, 2)] + [torch.randn(1, 2, 37, 72) for _ in range(2)]
leaves = [x.requires_grad_() for x in leaves]
cu_seqlens = torch.tensor([0, 60, 60, 97], dtype=torch.int32)
results = []
keys = {"cu_seqlens_k": torch.tensor([0, 7, 60, 97], dtype=torch.int32)}
causal = {"is_causal": True}
for options in causal, causal | {"softcap": 2.0}, causal | {"relative_bias": torch.randn(6, 51)}, keys:
    out = prefix_attention(*leaves, cu_seqlens, **options, backend=sys.argv[1])
    results += [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
masks = []  # what dropout keeps: every key's value is a unit vector of its own
for threads in (1, 2, 3) if sys.argv[1] == "native" else ():
    torch.set_num_threads(threads)
    for dtype in torch.float32, torch.float64, torch.bfloat16:
        torch.manual_seed(1)
        rows, unit = torch.randn(2, 97, 4, 120).to(dtype), torch.eye(120, dtype=dtype)[:, None].expand(-1, 2, -1)
        own = torch.cat([unit[40:100], unit[40:77]])
        prefix = torch.zeros(1, 2, 40, 120, dtype=dtype), unit[:40].transpose(0, 1)[None]
        masks.append(prefix_attention(rows[0], rows[1, :, :2], own, *prefix, cu_seqlens, dropout_p=0.4) != 0)
torch.save((results, masks), sys.argv[2])
"""


def test_every_instruction_set_there_is(tmp_path):
    """Each in a process of its own, since the choice is read from the environment. avx512 takes what the CPU has."""
    results = {}
    for name in ("reference", "portable", "avx2", "avx512"):
        file = tmp_path / name
        backend = "reference" if name == "reference" else "native"
        environment = os.environ | {"FASTPROMPT_CPU": name}
        subprocess.run([sys.executable, "-c", PROGRAM, backend, str(file)], check=True, env=environment)
        results[name] = torch.load(file)
    for name in ("portable", "avx2", "avx512"):
        torch.testing.assert_close(results[name][0], results["reference"][0], rtol=1e-4, atol=1e-4)
    first, *others = itertools.chain(*(results[name][1] for name in ("portable", "avx2", "avx512")))
    assert 0.59 < first[:60, :, :100].double().mean() < 0.61
    assert all(torch.equal(first, other) for other in others)  # whatever the vectors, the threads and the dtype


def test_nan_is_not_hidden():
    rows, prefix = torch.randn(3, 40, 2, 16), torch.randn(2, 1, 2, 20, 16)
    rows[1, 7, 1, 3] = torch.nan  # a key
    out = prefix_attention(*rows, *prefix, bounds([20, 20]))
    assert out[:20, 1].isnan().all() and out[20:].isfinite().all() and out[:, 0].isfinite().all()


def test_compile_with_prompt_rows():
    torch.compiler.reset()
    compiled = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
    leaves = [torch.randn(20, h, 16).requires_grad_() for h in (4, 2, 2)]
    options = dict(is_causal=True, prompt_rows=6)
    results = [run(*leaves, None, None, bounds([9, 5]), **options) for run in (compiled, prefix_attention)]
    assert torch.equal(*results)
    grad = torch.randn_like(results[0])
    assert all(map(torch.equal, *(torch.autograd.grad(out, leaves, grad) for out in results)))
    arguments = *(x.detach().requires_grad_() for x in leaves), *torch.randn(2, 1, 2, 0, 16), bounds([9, 5]), None
    operator = torch.ops.fastprompt.prefix_attention.default
    torch.library.opcheck(operator, (*arguments, None, None, None, 6, True, 0.25, -1, False, 0.0, 0.0))
    torch.library.opcheck(operator, (*arguments, torch.tensor([3]), None, None, 6, True, 0.25, -1, False, 2.0, 0.4))
