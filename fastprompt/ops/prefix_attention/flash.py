"""Prefix attention for long segments on a GPU: PyTorch's flash kernels for their own rows, Triton's for the prefix.

Softmax splits over disjoint sets of keys. The flash kernels attend to a segment's own rows; then the fused kernel, told
so by `own_rows`, begins with their output and log-sum-exp where else it begins with nothing, and adds the prefix, which
nobody copies. Backward, either part with the *merged* output and log-sum-exp gives the exact gradients: the flash
kernels leave the query's, and the fused one adds the prefix's part to it. Imported only where triton is there.

The flash kernels add the query's gradient up atomically, unless `torch.use_deterministic_algorithms` is on.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.ops import _triton
from fastprompt.ops._autograd import direct, once_differentiable, with_derivative

from . import triton_launches as launches

DTYPES = (torch.bfloat16, torch.float16)


def own_forward(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, options: launches.Options
) -> tuple[Tensor, Tensor]:
    """Output (T, H, D) and log-sum-exp (H, T) of segments that attend to their own rows."""
    is_causal, window = _seen(options)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(query, key, value, bounds, bounds, longest, longest, 0.0, is_causal, False), scale=options.scale, **window
    )
    return out, lse


def own_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    longest: int,
    options: launches.Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value by these keys and values; out and lse may be of more than them."""
    is_causal, window = _seen(options)
    state = query.new_empty(2, dtype=torch.uint64)  # of random numbers: without dropout nobody reads it
    return torch.ops.aten._flash_attention_backward(
        *(grad, query, key, value, out, lse, bounds, bounds, longest, longest, 0.0, is_causal, state, state),
        scale=options.scale,
        **window,
    )


def _seen(options: launches.Options) -> tuple[bool, dict[str, int]]:
    """is_causal and the window, as torch.nn.attention.varlen hands them over."""
    if options.reach is None:
        return options.is_causal, {}
    return False, {"window_size_left": options.reach, "window_size_right": 0 if options.is_causal else options.reach}


def _aligned(x: Tensor) -> Tensor:
    """As the flash kernels read: 16 bytes at a time."""
    if x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and all(step * x.itemsize % 16 == 0 for step in x.stride()[:-1]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _own_bounds(cu_seqlens: Tensor, prompt_rows: int) -> Tensor:
    """With the prompt's rows as the first segment."""
    return F.pad(cu_seqlens + prompt_rows, (1, 0)) if prompt_rows else cu_seqlens


def _longest(max_seqlen: int, prompt_rows: int) -> int:
    return max(max_seqlen, prompt_rows, 2)  # at 1 the kernels take all segments to be of one row, and none empty


def _forward(
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
    prefix_in_window: bool,
    prompt_rows: int,
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor]:
    options = launches.Options(is_causal, scale, window, None, prefix_in_window, 0.0, prompt_rows)
    tensors = launches.tensors_of(
        query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index, None, prompt_rows
    )
    out, lse, places = _outputs(query, prefix_index, window, prefix_in_window)
    if len(query) == 0:
        return out, lse, places
    own = (_aligned(x) for x in tensors[:3])
    out, lse = own_forward(*own, _own_bounds(cu_seqlens, prompt_rows), _longest(max_seqlen, prompt_rows), options)
    out = out.contiguous()  # it lies as query does
    if tensors.prefix_key.shape[2]:
        launches.forward(tensors, options, out, lse, None, places, len(query))
    return out.to(query.dtype), lse, places


def _outputs(query: Tensor, *of_places) -> tuple[Tensor, Tensor, Tensor]:
    """out (T, H, D), log-sum-exp (H, T), places."""
    lse = query.new_empty(query.shape[:2][::-1], dtype=torch.float32)
    return query.new_empty(query.shape), lse, launches.places_like(query, *of_places)


_prefix_attention = torch.library.custom_op("fastprompt::prefix_attention_flash", _forward, mutates_args=())


@_prefix_attention.register_fake
def _(query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index, c, s, window, prefix_in_window, p, m):
    return _outputs(query, prefix_index, window, prefix_in_window)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    out: Tensor,
    lse: Tensor,
    places: Tensor,
    cu_seqlens: Tensor,
    prefix_index: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int | None,
    prefix_in_window: bool,
    prompt_rows: int,
    max_seqlen: int,
    query_needs: bool,
    segments_need: bool,
    prefix_needs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five gradients; empty are the query's, the key's and value's and the prefix's, where not needed."""
    options = launches.Options(is_causal, scale, window, None, prefix_in_window, 0.0, prompt_rows)
    tensors = launches.tensors_of(
        query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index, None, prompt_rows
    )
    inputs = *tensors[:3], *(_triton.readable(x) for x in (prefix_key, prefix_value))
    run = launches.Backward(tensors, options, grad, out, lse, places, len(query))
    sums = launches.prefix_sums(run, segments_need if prompt_rows else prefix_needs)
    alone = len(query) == 0  # then there is no flash kernel that makes them
    grads = list(launches.gradients(*inputs, query_needs and alone, segments_need and alone, prefix_needs))
    with torch.cuda.device_of(query):
        if not alone and (query_needs or segments_need):
            own = (_aligned(x) for x in (run.grad, *tensors[:3], run.out))
            bounds, longest = _own_bounds(cu_seqlens, prompt_rows), _longest(max_seqlen, prompt_rows)
            found = [x.contiguous() for x in own_backward(*own, lse, bounds, longest, options)]
            needs = query_needs, segments_need, segments_need
            grads[:3] = [x if need else x.new_empty(0) for x, need in zip(found, needs, strict=True)]
        if not alone and query_needs and run.prefix:
            run.query(grads[0])
        elif not alone and sums is not None:
            run.delta_alone()
        if sums is not None:
            if prompt_rows:
                for part, whole in zip(sums.of_prompt, grads[1:3], strict=True):
                    part.copy_(whole[:prompt_rows].flatten())
            sums.fill(run, grads[1:3] if prompt_rows else grads[3:])
    return tuple(x.to(query.dtype) for x in grads)


_prefix_attention_backward = torch.library.custom_op(
    "fastprompt::prefix_attention_flash_backward", _backward, mutates_args=()
)
_run_backward = direct(torch.ops.fastprompt.prefix_attention_flash_backward.default, _backward)


@_prefix_attention_backward.register_fake
def _(grad, query, key, value, prefix_key, prefix_value, *rest):
    return launches.gradients(query, key, value, prefix_key, prefix_value, *rest[-3:])


def _setup_context(ctx, inputs, output) -> None:
    ctx.options = inputs[7:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:5], *output, *inputs[5:7])


_run = with_derivative(
    torch.ops.fastprompt.prefix_attention_flash.default,
    _setup_context,
    once_differentiable("prefix_attention", launches.differentiated_by(_run_backward)),
    _forward,
)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def why_not(query: Tensor) -> str | None:
    """What keeps these kernels from such a query; None if nothing does."""
    features = query.shape[-1]
    if query.dtype not in DTYPES:
        return f"computes in bfloat16 or float16, got {query.dtype}"
    if features % 8 or features > launches.LARGEST_HEAD:
        return f"needs D to be a multiple of 8 up to {launches.LARGEST_HEAD}, got {features}"
    if query.device.type != "cuda" or torch.version.cuda is None or _capability(query.device) < (8, 0):
        return f"needs tensors on an NVIDIA GPU of compute capability 8.0 or more, got {query.device}"
    return None


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
    prefix_in_window: bool,
    prompt_rows: int = 0,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (T, H, D) and log-sum-exp (T, H), which is not differentiable; arguments as of ops.prefix_attention.

    Without `max_seqlen` all T rows stand for it: B times the thread blocks, of which all but a B-th have nothing to do.
    """
    cu_seqlens = cu_seqlens.contiguous()  # the kernels know no stride of these
    prefix_index = None if prefix_index is None or prompt_rows else prefix_index.contiguous()
    longest = query.shape[0] if max_seqlen is None else max_seqlen
    out, lse, _ = _run(
        *(query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index),
        *(is_causal, scale, window, prefix_in_window, prompt_rows, longest),
    )
    return out, lse.T
