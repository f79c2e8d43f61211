"""Prefix attention through csrc/: one fused kernel, forward and backward. Imported only where the library is loaded."""

import torch
from torch import Tensor

from fastprompt.ops._autograd import once_differentiable

_forward = torch.ops.fastprompt.prefix_attention.default
_backward = torch.ops.fastprompt.prefix_attention_backward.default
NO_WINDOW, NO_SOFTCAP = -1, 0.0
TENSORS = 10  # of the inputs


@torch.library.register_fake("fastprompt::prefix_attention")
def _(query: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    accumulate, rows = torch.promote_types(query.dtype, torch.float32), query.shape[:2]
    lse, peak_sum = (query.new_empty(shape, dtype=accumulate) for shape in (rows, (*rows, 2)))
    return query.new_empty(query.shape), lse, peak_sum


@torch.library.register_fake("fastprompt::prefix_attention_backward")
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, *others):
    inputs, needs = (query, key, value, prefix_key, prefix_value), others[-5:]
    return tuple(x.new_empty(x.shape if need else (0,)) for x, need in zip(inputs, needs, strict=True))


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors, ctx.options = inputs[:TENSORS], inputs[TENSORS:]
    out, lse, peak_sum = output
    ctx.mark_non_differentiable(lse, peak_sum)
    ctx.set_materialize_grads(False)  # nobody needs zeros for the log-sum-exp
    ctx.save_for_backward(*tensors[:5], out, peak_sum, *tensors[5:])


def _gradients(ctx, grad: Tensor | None, *_) -> tuple:
    needs, others = ctx.needs_input_grad[:5], [None] * (len(ctx.needs_input_grad) - 5)
    if grad is None:
        return *[None] * 5, *others
    grads = _backward(grad, *ctx.saved_tensors, *ctx.options, *needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *others


_differentiate = once_differentiable("prefix_attention", _gradients)
torch.library.register_autograd("fastprompt::prefix_attention", _differentiate, setup_context=_save)


class _PrefixAttention(torch.autograd.Function):
    """The same as the registered autograd, at less cost per call."""

    @staticmethod
    def forward(ctx, *inputs) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():  # not the registered autograd inside of this one
            output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_differentiate)


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    cu_seqlens: Tensor,
    prefix_index: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    prefix_in_window: bool,
    dropout_p: float,
    prompt_rows: int = 0,
    relative_bias: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    window, softcap = NO_WINDOW if window is None else window, softcap or NO_SOFTCAP
    seed = None
    if dropout_p > 0:  # a tensor, and drawn out of place: so torch.compile traces it and fakes stay fakes
        seed = torch.randint_like(cu_seqlens[:1], 2**62, dtype=torch.int64)
    if relative_bias is not None:
        relative_bias = relative_bias.to(torch.promote_types(query.dtype, torch.float32))
    run = _forward if torch.compiler.is_compiling() else _PrefixAttention.apply
    return run(
        *(query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index, seed, relative_bias, cu_seqlens_k),
        *(prompt_rows, is_causal, scale, window, prefix_in_window, softcap, dropout_p),
    )[:2]
