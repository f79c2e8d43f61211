"""rotary through csrc/. Imported only where the library is loaded."""

import torch
from torch import Tensor

from fastprompt.ops._autograd import with_derivative

_rotary = torch.ops.fastprompt.rotary.default


@torch.library.register_fake("fastprompt::rotary")
def _(query: Tensor, key: Tensor, *_) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *_, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx, grad_query: Tensor, grad_key: Tensor) -> tuple:
    return *_rotary(grad_query, grad_key, *ctx.saved_tensors, not ctx.inverse), None, None, None


_run = with_derivative(_rotary, _save, _differentiate)


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _run(query, key, cos, sin, False)
