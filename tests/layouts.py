"""Numbers in memory as users hand it over: slices, transposes and expansions, among what must not be read."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _poison(x: Tensor) -> float:
    return torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max


def _flat(x: Tensor, before: int, after: int) -> Tensor:
    """x, contiguous, within a longer storage."""
    return F.pad(x.flatten(), (before, after), value=_poison(x))[before : before + x.numel()].view(x.shape)


def _padded(x: Tensor, before: int = 1, after: int = 2) -> Tensor:
    """x within larger dimensions, `before` and `after` of the last."""
    pads = [*[(1, 2)] * (x.ndim - 1), (before, after)]
    whole = F.pad(x, [size for pair in reversed(pads) for size in pair], value=_poison(x))
    for dim, size in enumerate(x.shape):
        whole = whole.narrow(dim, pads[dim][0], size)
    return whole


def _sliced(x: Tensor) -> Tensor:
    """Every other one of the last dimension, from the second on."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), _poison(x))
    wide[..., 1::2] = x
    return wide[..., 1::2]


# Each takes a tensor of one dimension or more and returns one of its shape and, but for "expanded", of its values.
LAYOUTS = {
    "offset": lambda x: _flat(x, 3, 5),  # contiguous, but not where its storage begins, and not aligned
    "chunk": lambda x: _flat(x, x.numel(), x.numel()),  # the middle of three equal parts
    "sliced": _sliced,
    "padded": _padded,
    "aligned": lambda x: _padded(x, 16, 16),  # as padded, but rows may begin where vectors of 16 bytes do
    "second dimension first": lambda x: (
        _padded(x.transpose(0, 1).contiguous()).transpose(0, 1) if x.ndim > 1 else _sliced(x)
    ),
    "transposed": lambda x: _padded(x.mT.contiguous()).mT if x.ndim > 1 else _sliced(x),
    "first dimension last": lambda x: _padded(x.movedim(0, -1).contiguous()).movedim(-1, 0),
    "expanded": lambda x: _flat(x[:1].contiguous(), 3, 5).expand_as(x) if len(x) else x,
}


def in_layout(x: Tensor, layout: str) -> Tensor:
    """x in memory of another layout, a leaf that asks for a gradient if x does."""
    moved = LAYOUTS[layout](x.detach())
    assert moved.shape == x.shape and moved.dtype == x.dtype
    return moved.requires_grad_(x.requires_grad)
