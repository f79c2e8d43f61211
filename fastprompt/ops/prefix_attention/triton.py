"""Prefix attention through Triton: the operator and its autograd. Imported only where triton is there."""

import torch
from torch import Tensor

from fastprompt.ops import _triton
from fastprompt.ops._autograd import direct, once_differentiable, with_derivative

from . import triton_launches as launches


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    cu_seqlens: Tensor,
    prefix_index: Tensor | None,
    seed: Tensor | None,
    relative_bias: Tensor | None,
    cu_seqlens_k: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    prefix_in_window: bool,
    dropout_p: float,
    prompt_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = launches.Options(is_causal, scale, window, softcap, prefix_in_window, dropout_p, prompt_rows)
    tensors = launches.tensors_of(
        *(query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index, seed, prompt_rows),
        *(relative_bias, cu_seqlens_k),
    )
    out, lse, peak_sum, places = _outputs(tensors.query, prefix_index, window, prefix_in_window, relative_bias)
    launches.forward(tensors, options, out, lse, peak_sum, places)
    return out.to(query.dtype), lse, peak_sum, places


def _outputs(query: Tensor, *of_places) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out (T, H, D), log-sum-exp (T, H), peak and sum (T, H, 2), places, not yet filled."""
    lse, peak_sum = (query.new_empty((*query.shape[:2], *more), dtype=torch.float32) for more in ((), (2,)))
    return query.new_empty(query.shape), lse, peak_sum, launches.places_like(query, *of_places)


_prefix_attention = torch.library.custom_op("fastprompt::prefix_attention_triton", _forward, mutates_args=())


@_prefix_attention.register_fake
def _(query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index, seed, relative_bias, keys, *options):
    return _outputs(query, prefix_index, options[2], options[4], relative_bias)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    out: Tensor,
    peak_sum: Tensor,
    places: Tensor,
    cu_seqlens: Tensor,
    prefix_index: Tensor | None,
    seed: Tensor | None,
    relative_bias: Tensor | None,
    cu_seqlens_k: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    prefix_in_window: bool,
    dropout_p: float,
    prompt_rows: int,
    query_needs: bool,
    segments_need: bool,
    prefix_needs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five gradients; empty are the query's, the key's and value's and the prefix's, where not needed."""
    options = launches.Options(is_causal, scale, window, softcap, prefix_in_window, dropout_p, prompt_rows)
    tensors = launches.tensors_of(
        *(query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index, seed, prompt_rows),
        *(relative_bias, cu_seqlens_k),
    )
    inputs = *tensors[:3], *(_triton.readable(x) for x in (prefix_key, prefix_value))
    grads = launches.gradients(*inputs, query_needs, segments_need, prefix_needs)
    run = launches.Backward(tensors, options, grad, out, peak_sum, places)
    sums = launches.prefix_sums(run, segments_need if prompt_rows else prefix_needs)
    with torch.cuda.device_of(query):
        if len(query):
            run.query(grads[0]) if query_needs else run.delta_alone()
        if len(key) and segments_need:
            run.key_value(*grads[1:3], sums.of_prompt if prompt_rows else (None, None))
        if sums is not None:
            sums.fill(run, grads[1:3] if prompt_rows else grads[3:])
    return tuple(x.to(query.dtype) for x in grads)


_prefix_attention_backward = torch.library.custom_op(
    "fastprompt::prefix_attention_triton_backward", _backward, mutates_args=()
)
_run_backward = direct(torch.ops.fastprompt.prefix_attention_triton_backward.default, _backward)


@_prefix_attention_backward.register_fake
def _(grad, query, key, value, prefix_key, prefix_value, *rest):
    return launches.gradients(query, key, value, prefix_key, prefix_value, *rest[-3:])


def _setup_context(ctx, inputs, output) -> None:
    ctx.options = inputs[10:]
    out, lse, peak_sum, places = output
    ctx.mark_non_differentiable(lse, peak_sum, places)
    ctx.save_for_backward(*inputs[:5], out, peak_sum, places, *inputs[5:10])


_run = with_derivative(
    torch.ops.fastprompt.prefix_attention_triton.default,
    _setup_context,
    once_differentiable("prefix_attention", launches.differentiated_by(_run_backward)),
    _forward,
)


def why_not(query: Tensor) -> str | None:
    """What keeps these kernels from such a query; None if nothing does."""
    if query.shape[-1] > launches.LARGEST_HEAD:
        return f"takes heads of at most {launches.LARGEST_HEAD} features, got {query.shape[-1]}"
    return _triton.why_not(query)


def _in_products(relative_bias: Tensor, scale: float) -> Tensor:
    """What is added to products of queries and keys, before they are scaled. What is finite stays finite."""
    most = torch.finfo(torch.float32).max
    scaled = relative_bias.float() / scale
    return torch.where(relative_bias.isinf(), scaled, scaled.clamp(-most, most)).contiguous()


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
    """Output (T, H, D) and log-sum-exp (T, H), which is not differentiable; arguments as of ops.prefix_attention."""
    if reason := why_not(query):
        raise ValueError(f"backend 'triton' {reason}")
    cu_seqlens = cu_seqlens.contiguous()  # the kernels know no stride of these
    prefix_index = None if prefix_index is None or prompt_rows else prefix_index.contiguous()
    cu_seqlens_k = None if cu_seqlens_k is None else cu_seqlens_k.contiguous()
    if relative_bias is not None:
        relative_bias = _in_products(relative_bias, scale)
    seed = None
    if dropout_p > 0:  # drawn on the device, which nobody then waits for: a graph that is replayed draws anew
        seed = torch.randint_like(cu_seqlens[:1], 2**62, dtype=torch.int64)
    return _run(
        *(query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index, seed, relative_bias, cu_seqlens_k),
        *(is_causal, scale, window, softcap, prefix_in_window, dropout_p, prompt_rows),
    )[:2]
