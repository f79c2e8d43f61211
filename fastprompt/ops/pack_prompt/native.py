"""pack_prompt through csrc/: what torch needs to know beside the kernels. Imported only where the library is loaded."""

import torch
from torch import Tensor

from fastprompt.ops._autograd import with_derivative

pack_prompt_backward = torch.ops.fastprompt.pack_prompt_backward.default


@torch.library.register_fake("fastprompt::pack_prompt")
def _(
    embedding: Tensor,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    prompt: Tensor,
    prompt_index: Tensor | None,
    per_segment: bool,
    scale: float,
) -> Tensor:
    entries = cu_seqlens.shape[0] - 1 if per_segment else prompt.shape[0]
    return embedding.new_empty(entries * prompt.shape[1] + input_ids.shape[0], embedding.shape[1])


@torch.library.register_fake("fastprompt::pack_prompt_backward")
def _(grad: Tensor, cu_seqlens: Tensor, prompt_index: Tensor | None, bank_size: int, prompt_rows: int) -> Tensor:
    return grad.new_empty(bank_size, prompt_rows, grad.shape[1])


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    _, _, cu_seqlens, prompt, prompt_index, ctx.per_segment, _ = inputs
    ctx.save_for_backward(cu_seqlens, prompt_index)
    ctx.prompt_shape = prompt.shape


def _backward(ctx, grad: Tensor) -> tuple:
    cu_seqlens, prompt_index = ctx.saved_tensors
    bank_size, prompt_rows, width = ctx.prompt_shape
    if not ctx.needs_input_grad[3]:
        grad_prompt = None
    elif ctx.per_segment:
        grad_prompt = pack_prompt_backward(grad, cu_seqlens, prompt_index, bank_size, prompt_rows)
    else:
        grad_prompt = grad[: bank_size * prompt_rows].reshape(bank_size, prompt_rows, width)
    return None, None, None, grad_prompt, None, None, None


def _save_backward(ctx, inputs: tuple, output: Tensor) -> None:
    grad, cu_seqlens, prompt_index, _, prompt_rows = inputs
    ctx.save_for_backward(cu_seqlens, prompt_index)
    ctx.tokens = grad.shape[0] - (cu_seqlens.shape[0] - 1) * prompt_rows


def _double_backward(ctx, grad_prompt: Tensor) -> tuple:
    # The rows that were summed get the sum's gradient, the token rows zero: a packing with zero embeddings.
    cu_seqlens, prompt_index = ctx.saved_tensors
    zeros = grad_prompt.new_zeros(1, grad_prompt.shape[-1])
    ids = torch.zeros(ctx.tokens, dtype=torch.int32, device=zeros.device)
    return pack_prompt(zeros, ids, cu_seqlens, grad_prompt, prompt_index, True, 1.0), None, None, None, None


pack_prompt = with_derivative(torch.ops.fastprompt.pack_prompt.default, _save, _backward)
torch.library.register_autograd("fastprompt::pack_prompt_backward", _double_backward, setup_context=_save_backward)
