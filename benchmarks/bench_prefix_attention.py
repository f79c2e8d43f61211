"""prefix_attention, forward and backward, against what a user would write otherwise, on the CPU or a GPU.

    python -m pytest benchmarks/bench_prefix_attention.py --benchmark-enable --benchmark-json=prefix_attention.json

The rivals, each used as well as it can be, given the padded batch that training code has (no conversion is timed):
    concat    scaled_dot_product_attention on prefix (expanded) and text side by side; grouped heads by enable_gqa; no
              mask where none is needed, else one of the smallest shape that broadcasts
    by_length the same sentence by sentence, concatenated without padding or mask (ragged batches)
    peft      prefix expanded to the batch, concatenated, key and value heads repeated, dense mask
    merge     prefix and text apart through torch's flash kernels, merged by their log-sum-exp (our backend "cpu")
FlexAttention has no backward on the CPU; it runs where there is a GPU. There ours is Triton, and our CUDA C++
stands beside it as cuda_cpp.
A shape whose gradients are not those of float64 has no time.
"""

import statistics
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from timing import in_turns, matrix_rate, ratio

from fastprompt import _native
from fastprompt.ops import prefix_attention
from fastprompt.ops.prefix_attention import LARGEST_CUDA_HEAD

# (segments, longest, ragged, prefix, features, query heads, key/value heads, causal)
SHAPES = [
    (1, 64, False, 16, 64, 12, 12, False),
    (1, 384, False, 32, 64, 12, 12, False),
    (1, 384, False, 100, 128, 12, 4, True),
    (1, 128, False, 1024, 64, 9, 3, True),
    (1, 32, False, 1024, 256, 4, 1, True),
    (8, 32, False, 16, 64, 12, 12, False),
    (8, 64, True, 16, 64, 12, 12, False),
    (8, 64, True, 32, 64, 9, 3, True),
    (8, 64, False, 0, 64, 9, 3, True),
    (8, 128, True, 32, 128, 12, 4, True),
    (8, 128, True, 100, 256, 4, 1, True),
    (8, 128, False, 32, 64, 12, 12, False),
    (8, 384, True, 32, 64, 9, 3, True),
    (8, 384, False, 16, 64, 12, 12, False),
    (8, 384, False, 0, 128, 12, 4, True),
    (8, 32, True, 1024, 64, 12, 4, False),
    (8, 128, False, 1024, 128, 4, 4, True),
    (32, 32, True, 16, 64, 12, 12, False),
    (32, 32, False, 32, 64, 9, 3, True),
    (32, 32, True, 100, 256, 4, 1, True),
    (32, 64, True, 16, 64, 12, 12, False),
    (32, 64, False, 0, 64, 12, 12, False),
    (32, 64, True, 32, 128, 12, 4, True),
    (32, 64, False, 1024, 64, 9, 3, True),
    (32, 128, True, 32, 64, 9, 3, True),
    (32, 128, True, 16, 64, 12, 12, False),
    (32, 128, False, 100, 256, 4, 1, True),
    (32, 384, True, 16, 64, 9, 3, True),
]
NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]
TURNS = 7


class Batch:
    """One problem as packed rows and as the padded batch that the rivals get."""

    def __init__(self, shape, device: str, dtype: torch.dtype) -> None:
        segments, longest, ragged, self.prefix, dim, heads, kv_heads, self.causal = shape
        self.lengths = [longest - (n * 7919 % (longest // 2 + 1) if ragged and n else 0) for n in range(segments)]
        self.longest, rows = longest, sum(self.lengths)
        new = dict(device=device, dtype=dtype)
        self.query = torch.randn(rows, heads, dim, **new)
        self.key, self.value = torch.randn(2, rows, kv_heads, dim, **new)
        self.prefix_key, self.prefix_value = torch.randn(2, 1, kv_heads, self.prefix, dim, **new)
        self.grad = torch.randn_like(self.query)
        self.cu_seqlens = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=device)
        self.packed = [self.query, self.key, self.value, self.prefix_key, self.prefix_value]
        self.padded = [self.pad(x) for x in (self.query, self.key, self.value)] + [self.prefix_key, self.prefix_value]
        for tensor in self.packed + self.padded:
            tensor.requires_grad_()
        self.padded_grad = self.pad(self.grad)
        length = torch.tensor(self.lengths, device=device)
        valid = torch.arange(longest, device=device) < length[:, None]  # (B, L)
        seen = torch.cat([torch.ones(segments, self.prefix, dtype=torch.bool, device=device), valid], 1)[:, None, None]
        i = torch.arange(longest, device=device)[:, None]
        lower_right = torch.arange(-self.prefix, longest, device=device)[None] <= i  # (L, P + L)
        full_mask = (seen & lower_right if self.causal else seen).expand(segments, 1, longest, -1)
        self.peft_mask = torch.zeros(full_mask.shape, **new).masked_fill(~full_mask, torch.finfo(dtype).min)
        self.mask = None  # of the smallest shape that does
        if min(self.lengths) < longest:
            self.mask = self.peft_mask if self.causal else self.peft_mask[:, :, :1]
        elif self.causal and self.prefix:
            self.mask = torch.zeros(lower_right.shape, **new).masked_fill(~lower_right, -torch.inf)
        pairs = sum(n * self.prefix + (n * (n + 1) // 2 if self.causal else n * n) for n in self.lengths)
        self.flops = 14 * pairs * heads * dim  # two products forward, five backward

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """(T, H, D) -> (B, H, L, D) as a projection gives it: a view of (B, L, H, D)."""
        rows = x.detach().split(self.lengths)
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2).requires_grad_()

    def ours(self, backend=None):
        out = prefix_attention(*self.packed, self.cu_seqlens, is_causal=self.causal, backend=backend)
        return torch.autograd.grad(out, self.packed, self.grad)

    def concat(self):
        query, key, value, prefix_key, prefix_value = self.padded
        key, value = (
            torch.cat([p.expand(len(x), -1, -1, -1), x], 2) if self.prefix else x
            for p, x in ((prefix_key, key), (prefix_value, value))
        )
        out = F.scaled_dot_product_attention(
            *(query, key, value, self.mask),
            is_causal=self.causal and self.mask is None,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return torch.autograd.grad(out, self.padded, self.padded_grad, allow_unused=True)

    def by_length(self):
        outs, bounds = [], self.cu_seqlens.tolist()
        for begin, end in zip(bounds, bounds[1:], strict=False):
            query, key, value = (x[begin:end].transpose(0, 1)[None] for x in self.packed[:3])
            if self.prefix:
                key, value = (torch.cat([p, x], 2) for p, x in ((self.prefix_key, key), (self.prefix_value, value)))
            mask = None
            if self.causal and self.prefix:
                mask = query.new_zeros(end - begin, key.shape[2])
                mask.masked_fill_(torch.ones_like(mask, dtype=torch.bool).triu(self.prefix + 1), -torch.inf)
            out = F.scaled_dot_product_attention(
                *(query, key, value, mask),
                is_causal=self.causal and mask is None,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            outs.append(out[0].transpose(0, 1))
        return torch.autograd.grad(torch.cat(outs), self.packed, self.grad, allow_unused=True)

    def peft(self):
        query, key, value, prefix_key, prefix_value = self.padded
        group = query.shape[1] // key.shape[1]
        key, value = (
            torch.cat([p.expand(len(x), -1, -1, -1).contiguous(), x], 2).repeat_interleave(group, 1)
            for p, x in ((prefix_key, key), (prefix_value, value))
        )
        out = F.scaled_dot_product_attention(query, key, value, self.peft_mask)
        return torch.autograd.grad(out, self.padded, self.padded_grad, allow_unused=True)

    def flex(self):
        query, key, value, prefix_key, prefix_value = self.padded
        key, value = (
            torch.cat([p.expand(len(x), -1, -1, -1), x], 2) for p, x in ((prefix_key, key), (prefix_value, value))
        )
        out = self.flex_attention(query, key, value, block_mask=self.block_mask, enable_gqa=True)
        return torch.autograd.grad(out, self.padded, self.padded_grad, allow_unused=True)

    def prepare_flex(self) -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        length, prefix = torch.tensor(self.lengths, device=self.query.device), self.prefix

        def seen(b, h, i, j):
            own = (j >= prefix) & (j - prefix < length[b])
            return (j < prefix) | (own & (j - prefix <= i) if self.causal else own)

        sizes = len(self.lengths), None, self.longest, prefix + self.longest
        self.block_mask = create_block_mask(seen, *sizes, device=self.query.device)
        self.flex_attention = torch.compile(flex_attention)


def check(batch: Batch, ways) -> None:
    """Each way's prefix gradients against ours in float64, or the shape has no time."""
    exact = [x.detach().double().requires_grad_() for x in batch.packed]
    out = prefix_attention(*exact, batch.cu_seqlens, is_causal=batch.causal, backend="reference")
    expected = torch.autograd.grad(out, exact, batch.grad.double())[3:]
    tolerance = 1e-5 if batch.query.dtype == torch.float32 else 3e-2
    for name, way in ways.items():
        for got, want in zip(way()[3:], expected, strict=True):
            if batch.prefix:
                error = (got.double() - want).abs().max() / want.abs().max()
                assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-L{}-{}-P{}-D{}-H{}-{}-{}".format(*s))
def test_prefix_attention(benchmark, shape, device):
    torch.manual_seed(0)
    batch = Batch(shape, device, torch.float32 if device == "cpu" else torch.bfloat16)
    ways = {"ours": batch.ours, "concat": batch.concat, "peft": batch.peft}
    if min(batch.lengths) < batch.longest:
        ways["by_length"] = batch.by_length
    if device == "cpu":
        ways["merge"] = lambda: batch.ours("cpu")
    else:
        batch.prepare_flex()
        ways["flex"] = batch.flex
        if _native.available("cuda") and batch.query.shape[-1] <= LARGEST_CUDA_HEAD:
            ways["cuda_cpp"] = lambda: batch.ours("native")
    check(batch, ways)
    seconds = in_turns(ways, TURNS, device)
    ours = seconds.pop("ours")
    ratios = {name: ratio(theirs, ours) for name, theirs in seconds.items()}
    benchmark.extra_info |= {
        "ratios": ratios,
        "best_rival_over_ours": min(value for name, value in ratios.items() if name != "cuda_cpp"),
        "useful_gflops": batch.flops / statistics.median(ours) / 1e9,
        "matrix_gflops": matrix_rate(device, dtype=batch.query.dtype) / 1e9,
    }
    line = ", ".join(f"{name} {value:.2f}" for name, value in sorted(ratios.items(), key=lambda item: item[1]))
    info = benchmark.extra_info
    print(f"\n{line}; {info['useful_gflops']:.0f} useful GFLOP/s of {info['matrix_gflops']:.0f}")
    benchmark.pedantic(batch.ours, rounds=3)
