"""Pooling of packed segments through csrc/. Imported only where the library is loaded."""

import torch
from torch import Tensor

from ._autograd import differentiable


@torch.library.register_fake("fastprompt::segment_pool")
def _(hidden: Tensor, cu_seqlens: Tensor, take: int) -> Tensor:
    return hidden.new_empty(cu_seqlens.shape[0] - 1, hidden.shape[1])


@torch.library.register_fake("fastprompt::segment_pool_backward")
def _(grad: Tensor, cu_seqlens: Tensor, rows: int, take: int) -> Tensor:
    return grad.new_empty(rows, grad.shape[1])


segment_pool = differentiable(
    torch.ops.fastprompt.segment_pool.default, torch.ops.fastprompt.segment_pool_backward.default
)
