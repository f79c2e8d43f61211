"""prefix_attention, forward and backward.

The rivals, each used as well as it can be, given the padded batch that training code has (no conversion is timed):
    concat      scaled_dot_product_attention on prefix (expanded) and text side by side; grouped heads by enable_gqa; no
                mask where none is needed, else one of the smallest shape that broadcasts
    by_length   the same sentence by sentence, concatenated without padding or mask (ragged batches)
    peft        prefix expanded to the batch, concatenated, key and value heads repeated, dense mask
    flex        FlexAttention, compiled, with a block mask, on concatenated keys (GPU: it has no backward on the CPU)
    flash_attn  flash_attn_varlen_func on packed rows, prefix and segment concatenated segment by segment (GPU)
Backends of ours that stand beside it:
    merge (ours)     prefix and text apart through torch's flash kernels, merged by their log-sum-exp (CPU)
    cuda_cpp (ours)  CUDA C++; ours on a GPU is Triton
"""

import functools
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt import _native
from fastprompt.ops import prefix_attention
from fastprompt.ops.prefix_attention import LARGEST_CUDA_HEAD

from .case import OURS, Case, Work


class Shape(NamedTuple):
    segments: int
    longest: int
    ragged: bool
    prefix: int
    dim: int
    heads: int
    kv_heads: int
    causal: bool

    @property
    def lengths(self) -> list[int]:
        spread = self.longest // 2 + 1
        return [self.longest - (n * 7919 % spread if self.ragged and n else 0) for n in range(self.segments)]

    @property
    def flops(self) -> int:
        """Of the visible pairs: two products forward, five backward."""
        own = (n * (n + 1) // 2 if self.causal else n * n for n in self.lengths)
        return 14 * (sum(own) + sum(self.lengths) * self.prefix) * self.heads * self.dim

    @property
    def elements(self) -> int:
        """Query, key, value, output and the gradient of each."""
        rows = sum(self.lengths)
        return 4 * self.dim * (rows * self.heads + (rows + self.prefix) * self.kv_heads)

    @property
    def label(self) -> str:
        kind = f"{'ragged' if self.ragged else 'full'}-{'causal' if self.causal else 'both'}"
        return f"B{self.segments}-L{self.longest}-P{self.prefix}-D{self.dim}-H{self.heads}:{self.kv_heads}-{kind}"


SHAPES = [
    Shape(1, 64, False, 16, 64, 12, 12, False),
    Shape(1, 384, False, 32, 64, 12, 12, False),
    Shape(1, 384, False, 100, 128, 12, 4, True),
    Shape(1, 128, False, 1024, 64, 9, 3, True),
    Shape(1, 32, False, 1024, 256, 4, 1, True),
    Shape(8, 32, False, 16, 64, 12, 12, False),
    Shape(8, 64, True, 16, 64, 12, 12, False),
    Shape(8, 64, True, 32, 64, 9, 3, True),
    Shape(8, 64, False, 0, 64, 9, 3, True),
    Shape(8, 128, True, 32, 128, 12, 4, True),
    Shape(8, 128, True, 100, 256, 4, 1, True),
    Shape(8, 128, False, 32, 64, 12, 12, False),
    Shape(8, 384, True, 32, 64, 9, 3, True),
    Shape(8, 384, False, 16, 64, 12, 12, False),
    Shape(8, 384, False, 0, 128, 12, 4, True),
    Shape(8, 32, True, 1024, 64, 12, 4, False),
    Shape(8, 128, False, 1024, 128, 4, 4, True),
    Shape(32, 32, True, 16, 64, 12, 12, False),
    Shape(32, 32, False, 32, 64, 9, 3, True),
    Shape(32, 32, True, 100, 256, 4, 1, True),
    Shape(32, 64, True, 16, 64, 12, 12, False),
    Shape(32, 64, False, 0, 64, 12, 12, False),
    Shape(32, 64, True, 32, 128, 12, 4, True),
    Shape(32, 64, False, 1024, 64, 9, 3, True),
    Shape(32, 128, True, 32, 64, 9, 3, True),
    Shape(32, 128, True, 16, 64, 12, 12, False),
    Shape(32, 128, False, 100, 256, 4, 1, True),
    Shape(32, 384, True, 16, 64, 9, 3, True),
]
QUICK = [SHAPES[0], SHAPES[7], SHAPES[11]]
GROWING = Shape(8, 128, True, 32, 64, 9, 3, True)
SWEEPS = {
    "B": [GROWING._replace(segments=n) for n in (1, 2, 4, 8, 16, 32, 64)],
    "L": [GROWING._replace(longest=n) for n in (32, 64, 128, 256, 512, 1024)],
    "P": [GROWING._replace(prefix=n) for n in (16, 64, 256, 1024, 4096)],
}


def cases() -> list[Case]:
    plain = [_case(shape, quick=shape in QUICK) for shape in SHAPES]
    return plain + [_case(shape, sweep=axis) for axis, shapes in SWEEPS.items() for shape in shapes]


def _case(shape: Shape, quick: bool = False, sweep: str | None = None) -> Case:
    return Case(
        group="attention",
        label=shape.label + (f"-grow-{sweep}" if sweep else ""),
        sizes={"B": shape.segments, "L": shape.longest, "P": shape.prefix, "D": shape.dim, "H": shape.heads},
        make=lambda device, dtype, seed: Batch(shape, device, dtype, seed).work(),
        quick=quick,
        sweep=sweep,
        memory=(OURS, "concat", "peft") if sweep else (),
    )


class Batch:
    """One problem as packed rows and as the padded batch that the rivals get."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype, seed: int) -> None:
        self.shape = shape
        segments, longest, _, self.prefix, dim, heads, kv_heads, self.causal = shape
        self.lengths, self.longest, self.grouped = shape.lengths, longest, heads != kv_heads
        rows, new = sum(self.lengths), {"device": device, "dtype": dtype}
        torch.manual_seed(seed)
        query, grad = torch.randn(2, rows, heads, dim, **new)
        key, value = torch.randn(2, rows, kv_heads, dim, **new)
        prefix = [x.requires_grad_() for x in torch.randn(2, 1, kv_heads, self.prefix, dim, **new)]
        self.grad, self.padded_grad = grad, self._pad(grad)
        self.cu_seqlens = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=device)
        self.packed = [x.requires_grad_() for x in (query, key, value)] + prefix
        self.padded = [self._pad(x.detach()).requires_grad_() for x in (query, key, value)] + prefix
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

    def work(self) -> Work:
        ways = {OURS: self.ours, "concat": self.concat, "peft": self.peft}
        missing = {}
        if min(self.lengths) < self.longest:
            ways["by_length"] = self.by_length
        if self.grad.device.type == "cpu":
            ways["merge (ours)"] = lambda: self.ours("cpu")
            missing["flex"] = "FlexAttention has no backward on the CPU"
            missing["flash_attn"] = "it is for GPUs"
        else:
            self._prepare_flex()
            ways["flex"] = self.flex
            if not find_spec("flash_attn"):
                missing["flash_attn"] = "the package flash-attn is not installed"
            elif self.causal or not self.grouped:
                ways["flash_attn"] = self.flash_attn
            if _native.available("cuda") and self.grad.shape[-1] <= LARGEST_CUDA_HEAD:
                ways["cuda_cpp (ours)"] = lambda: self.ours("native")
        read = sum(x.nbytes for x in (*self.packed, self.grad))
        return Work(ways, self.exact, self.shape.flops, self.shape.elements, read, missing)

    def _pad(self, x: Tensor) -> Tensor:
        """(T, H, D) -> (B, H, L, D) as a projection gives it: a view of (B, L, H, D)."""
        return torch.nn.utils.rnn.pad_sequence(x.split(self.lengths), batch_first=True).transpose(1, 2)

    def exact(self, way: str) -> Sequence[Tensor]:
        packed = self._exact
        if way in ("concat", "peft", "flex"):
            return [self._pad(x) for x in packed[:3]] + packed[3:]
        return packed

    @functools.cached_property
    def _exact(self) -> list[Tensor]:
        exact = [x.detach().double().requires_grad_() for x in self.packed]
        out = prefix_attention(*exact, self.cu_seqlens, is_causal=self.causal, backend="reference")
        return self._gradients(out, exact, self.grad.double())

    def _gradients(self, out: Tensor, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(out, leaves if self.prefix else leaves[:3], grad))

    def ours(self, backend: str | None = None) -> list[Tensor]:
        out = prefix_attention(
            *self.packed, self.cu_seqlens, is_causal=self.causal, max_seqlen=self.longest, backend=backend
        )
        return self._gradients(out, self.packed, self.grad)

    def _beside(self, key: Tensor, value: Tensor) -> list[Tensor]:
        """Keys and values (B, H, L, D) with the prefix in front of them."""
        if not self.prefix:
            return [key, value]
        pairs = zip(self.packed[3:], (key, value), strict=True)
        return [torch.cat([p.expand(len(x), -1, -1, -1), x], 2) for p, x in pairs]

    def concat(self) -> list[Tensor]:
        query, key, value = self.padded[:3]
        out = F.scaled_dot_product_attention(
            *(query, *self._beside(key, value), self.mask),
            is_causal=self.causal and self.mask is None,
            enable_gqa=self.grouped,
        )
        return self._gradients(out, self.padded, self.padded_grad)

    def by_length(self) -> list[Tensor]:
        outs = []
        for query, key, value in zip(*(x.split(self.lengths) for x in self.packed[:3]), strict=True):
            query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
            key, value = self._beside(key, value)
            mask = None
            if self.causal and self.prefix:
                mask = query.new_zeros(query.shape[2], key.shape[2])
                mask.masked_fill_(torch.ones_like(mask, dtype=torch.bool).triu(self.prefix + 1), -torch.inf)
            out = F.scaled_dot_product_attention(
                query, key, value, mask, is_causal=self.causal and mask is None, enable_gqa=self.grouped
            )
            outs.append(out[0].transpose(0, 1))
        return self._gradients(torch.cat(outs), self.packed, self.grad)

    def peft(self) -> list[Tensor]:
        query, key, value = self.padded[:3]
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, 1) for x in self._beside(key, value))
        out = F.scaled_dot_product_attention(query, key, value, self.peft_mask)
        return self._gradients(out, self.padded, self.padded_grad)

    def flex(self) -> list[Tensor]:
        query, key, value = self.padded[:3]
        keys, values = self._beside(key, value)
        out = self.flex_attention(query, keys, values, block_mask=self.block_mask, enable_gqa=True)
        return self._gradients(out, self.padded, self.padded_grad)

    def _prepare_flex(self) -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        length, prefix = torch.tensor(self.lengths, device=self.grad.device), self.prefix

        def seen(b, h, i, j):
            own = (j >= prefix) & (j - prefix < length[b])
            return (j < prefix) | (own & (j - prefix <= i) if self.causal else own)

        sizes = len(self.lengths), None, self.longest, prefix + self.longest
        self.block_mask = create_block_mask(seen, *sizes, device=self.grad.device)
        self.flex_attention = torch.compile(flex_attention)

    def flash_attn(self) -> list[Tensor]:
        from flash_attn import flash_attn_varlen_func

        segments = zip(*(x.split(self.lengths) for x in self.packed[1:3]), strict=True)
        front = [x[0].transpose(0, 1) for x in self.packed[3:]]  # (P, H, D)
        key, value = (
            torch.cat([row for x in side for row in (p, x)])
            for p, side in zip(front, zip(*segments, strict=True), strict=True)
        )
        steps = self.prefix * torch.arange(len(self.lengths) + 1, dtype=torch.int32, device=key.device)
        longest = self.longest, self.prefix + self.longest
        bounds = self.cu_seqlens, self.cu_seqlens + steps
        out = flash_attn_varlen_func(self.packed[0], key, value, *bounds, *longest, causal=self.causal)
        return self._gradients(out, self.packed, self.grad)
