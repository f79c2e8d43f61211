"""Attention and the alignment loss: all backends of ours and the rivals, checked, timed in turns, with their kernels.

The rivals of attention, each as well as it can be used on the prefix beside every sentence:
    varlen    torch's varlen_attn on packed rows, prefix and sentence copied side by side
    flash     scaled_dot_product_attention through its flash kernel on the padded batch; causal by causal_lower_right,
              no mask; sentences that see both ways and differ in length one by one
    cudnn     the same through cuDNN, which takes a prefix with causal rows as a mask only
    flex      FlexAttention, as in the benchmark; on three shapes, as each compiles
    peft      what PEFT does: expand, concatenate, repeat heads, dense mask
Those of the alignment loss are the benchmark's.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt import _native
from fastprompt.bench import alignment
from fastprompt.bench.attention import Batch, Shape
from fastprompt.bench.case import OURS, Case, Work, dtype_of
from fastprompt.bench.run import measure
from fastprompt.ops import alignment_loss, prefix_attention
from fastprompt.ops.prefix_attention import LARGEST_CUDA_HEAD

from . import kernels
from .records import DEVICE

SHAPES = [  # the first are the benchmark's; the last three are Llama 3's at 8k and 32k tokens
    Shape(1, 64, False, 16, 64, 12, 12, False),
    Shape(32, 32, True, 16, 64, 12, 12, False),
    Shape(8, 64, True, 32, 64, 9, 3, True),
    Shape(8, 128, True, 32, 128, 12, 4, True),
    Shape(8, 128, True, 100, 256, 4, 1, True),
    Shape(8, 384, False, 16, 64, 12, 12, False),
    Shape(8, 384, True, 32, 64, 9, 3, True),
    Shape(8, 384, False, 0, 128, 12, 4, True),
    Shape(32, 64, False, 1024, 64, 9, 3, True),
    Shape(16, 512, True, 32, 128, 24, 8, True),
    Shape(2, 4096, False, 32, 128, 24, 8, True),
    Shape(8, 4096, True, 32, 64, 32, 8, True),
]
FLEX = (SHAPES[5], SHAPES[6], SHAPES[10])
ALIGNMENT = [("infonce+cosine", 64, 384), ("cosine", 4096, 768), ("infonce", 1024, 384), ("infonce", 8192, 768)]
if DEVICE == "cpu":
    SHAPES, FLEX = [Shape(2, 8, True, 3, 16, 2, 1, True), Shape(2, 5, True, 4, 16, 1, 1, False)], ()
    ALIGNMENT = [("infonce+cosine", 24, 32)]
LONG = 128  # rows from which both the fused kernel and flash kernels with it beside them run, whichever is chosen
PREPARED: dict[Shape, tuple] = {}  # for FlexAttention
BUDGET = 1.0 if DEVICE == "cuda" else 0.1  # seconds of timing in turns, beyond the fewest turns there must be


def cases() -> dict[str, Callable[[], dict]]:
    return {case.label: functools.partial(compared, case) for case in problems()}


def problems() -> list[Case]:
    def attention(shape):
        return Case("attention", shape.label, {}, lambda *new: Rivals(shape, *new).work())

    def loss(distance, rows, size):
        make = functools.partial(_alignment, distance, rows, size)
        return Case("alignment", f"{distance}-N{rows}-D{size}", {}, make)

    return [*map(attention, SHAPES), *(loss(*each) for each in ALIGNMENT)]


def once(case: Case) -> dict:
    """Run every way, so that what compiles is there afterwards."""
    errors = {}
    for name, way in case.make(DEVICE, dtype_of(DEVICE), 0).ways.items():
        try:
            way()
        except Exception as error:  # it will be recorded where it is timed
            errors[name] = str(error)[:200]
    return {"errors": errors}


def compared(case: Case) -> dict:
    record = measure(case, DEVICE, budget=BUDGET, memory=False)
    if OURS in record["wrong"]:
        raise AssertionError(f"ours is wrong: {record['wrong']}")
    work = case.make(DEVICE, dtype_of(DEVICE), 0)
    record["kernels"] = {name: kernels.brief(kernels.profiled(work.ways[name], 2)) for name in record["ways"]}
    record["says"] = _says(record)
    record["failed"] = record.pop("missing")
    return {name: record[name] for name in ("ways", "kernels", "failed", "wrong", "sets", "floor_seconds", "says")}


def _says(record: dict) -> str:
    seconds = {name: way["seconds"]["median"] for name, way in record["ways"].items()}
    others = sorted((name for name in seconds if name != OURS), key=seconds.get)
    ratios = ", ".join(f"{name} {seconds[name] / seconds[OURS]:.2f}x" for name in others)
    failed = "".join(f"; {name} failed" for name in [*record["wrong"], *record["missing"]])
    return f"{seconds[OURS] * 1e6:.0f} us, {record['floor_seconds'] / seconds[OURS]:.0%} of floor; {ratios}{failed}"


class Rivals(Batch):
    """The benchmark's batch with a GPU's rivals."""

    def work(self) -> Work:
        ways = {OURS: self.ours, "peft": self.peft}
        if DEVICE == "cuda":
            ways |= {"varlen": self.varlen, "flash": self.flash, "cudnn": self.cudnn}
            if self.shape in FLEX:
                self._prepare_flex()
                ways["flex"] = self.flex
            if self.longest >= LONG:
                ways |= {f"{name} (ours)": functools.partial(self.ours, name) for name in ("triton", "flash")}
            if _native.available("cuda") and self.shape.dim <= LARGEST_CUDA_HEAD:
                ways["native (ours)"] = lambda: self.ours("native")
        else:
            ways["triton (ours)"] = lambda: self.ours("triton")
        read = sum(x.nbytes for x in (*self.packed, self.grad))
        return Work(ways, self.exact, self.shape.flops, self.shape.elements, read)

    def _prepare_flex(self) -> None:
        """Once a shape: its mask is the same for every set of inputs, and a new one would be compiled anew."""
        if self.shape not in PREPARED:
            super()._prepare_flex()
            PREPARED[self.shape] = self.block_mask, self.flex_attention
        self.block_mask, self.flex_attention = PREPARED[self.shape]

    @property
    def one_by_one(self) -> bool:
        """Whether padding would be seen, so that sentences run one after the other."""
        return not self.causal and min(self.lengths) < self.longest

    def exact(self, way: str) -> Sequence[Tensor]:
        packed = self._exact
        if way in ("peft", "flex", "cudnn") or (way == "flash" and not self.one_by_one):
            return [self._pad(x) for x in packed[:3]] + packed[3:]
        return packed

    @functools.cached_property
    def _exact(self) -> list[Tensor]:
        """By head of the keys: all at once would not fit the memory in float64."""
        group = self.shape.heads // self.shape.kv_heads
        parts = []
        for head in range(self.shape.kv_heads):
            query, own = slice(head * group, (head + 1) * group), slice(head, head + 1)
            cut = [self.packed[0][:, query], *(x[:, own] for x in self.packed[1:])]
            leaves = [x.detach().double().requires_grad_() for x in cut]
            out = prefix_attention(*leaves, self.cu_seqlens, is_causal=self.causal, backend="reference")
            parts.append(self._gradients(out, leaves, self.grad[:, query].double()))
        return [torch.cat(each, 1) for each in zip(*parts, strict=True)]

    def varlen(self) -> list[Tensor]:
        from torch.nn.attention.varlen import varlen_attn

        key, value, steps = *self.packed[1:3], 0
        if self.prefix:
            segments = zip(*(x.split(self.lengths) for x in self.packed[1:3]), strict=True)
            front = [x[0].transpose(0, 1) for x in self.packed[3:]]  # (P, H, D)
            sides = zip(front, zip(*segments, strict=True), strict=True)
            key, value = (torch.cat([row for x in side for row in (p, x)]) for p, side in sides)
            steps = self.prefix * self._counted
        bounds = self.cu_seqlens, self.cu_seqlens + steps
        window = (-1, 0) if self.causal else (-1, -1)
        longest = self.longest, self.prefix + self.longest
        out = varlen_attn(self.packed[0], key, value, *bounds, *longest, window_size=window, **_gqa())
        return self._gradients(out, self.packed, self.grad)

    @functools.cached_property
    def _counted(self) -> Tensor:
        return torch.arange(len(self.lengths) + 1, dtype=torch.int32, device=self.grad.device)

    def flash(self) -> list[Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            if self.one_by_one:
                return self.by_length()
            out = self._padded_attention(lower_right=True)
        return self._gradients(out, self.padded, self.padded_grad)

    def cudnn(self) -> list[Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = self._padded_attention(lower_right=False)
        return self._gradients(out, self.padded, self.padded_grad)

    def _padded_attention(self, lower_right: bool) -> Tensor:
        """Padding follows the rows, so that causal ones do not see it."""
        from torch.nn.attention.bias import causal_lower_right

        query, *beside = self.padded[0], *self._beside(*self.padded[1:3])
        if self.causal and not self.prefix:
            return F.scaled_dot_product_attention(query, *beside, is_causal=True, enable_gqa=self.grouped)
        mask = self.mask
        if lower_right and self.causal:
            mask = causal_lower_right(query.shape[2], beside[0].shape[2])
        return F.scaled_dot_product_attention(query, *beside, mask, enable_gqa=self.grouped)


def _gqa() -> dict:
    """What newer versions of varlen_attn want to be told of grouped heads."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _alignment(distance: str, rows: int, size: int, device: str, dtype: torch.dtype, seed: int) -> Work:
    """The benchmark's rivals, and each backend of ours."""
    torch.manual_seed(seed)
    student = torch.randn(rows, size, device=device, dtype=dtype, requires_grad=True)
    teacher = torch.randn(rows, size, device=device, dtype=dtype)
    weight = (torch.randn(size, size, device=device) / size**0.5).to(dtype).requires_grad_()
    tensors = student, teacher, weight

    def step(loss, tensors=tensors) -> list[Tensor]:
        return list(torch.autograd.grad(loss(*tensors, distance), (tensors[0], tensors[2])))

    def ours(student, teacher, weight, distance, backend=None):
        return alignment_loss(
            student, teacher, weight, distance=distance, temperature=alignment.TEMPERATURE, backend=backend
        )

    @functools.cache
    def exact() -> list[Tensor]:
        return step(alignment.eager, [x.detach().double().requires_grad_(x.requires_grad) for x in tensors])

    ways = {OURS: lambda: step(ours), "eager": lambda: step(alignment.eager)}
    for backend in ("triton", "native"):
        ways[f"{backend} (ours)"] = functools.partial(step, functools.partial(ours, backend=backend))
    if DEVICE == "cuda":
        compiled = alignment._compiled()
        ways["compiled"] = lambda: step(compiled)
    flops = 6 * rows * size**2 + ("infonce" in distance) * 4 * rows**2 * size
    return Work(ways, lambda way: exact(), flops, 3 * rows * size + 2 * size**2, sum(x.nbytes for x in tensors))
