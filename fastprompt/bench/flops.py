"""FLOPs of what ran: PyTorch's counter, and the formulas that it lacks.

Counted are the products of matrices, two FLOPs a multiplication and addition, as they are done: with the padding where
there is padding. Softmax, norms, activations, gathers and the optimizer are not. Of the operators that the counter does
not know:

- attention on the CPU, PyTorch's: two products forward and five backward, of all queries with all keys, hidden or not.
- fastprompt's attention: the same of the pairs of rows that see each other, segment by segment and with the prefix, but
  of the backward's five only those that the gradients asked for take: scores always, their gradient for query or key,
  and one for each of query, key and value. 14 * pairs * heads * dim for all, forward and backward.
- fastprompt's alignment loss, which finds its gradients with the loss: the projection, its gradients to student and
  weight, and for infonce the similarities and their gradients to student and teacher.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fastprompt import _native


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of one call of `run`, forward and backward, on the CPU. See the module for what is counted.

    Raises:
        RuntimeError: the native library is not there, whose operators are those that have formulas.
        NotImplementedError: fastprompt's attention ran causally or in a window, which has no formula here.
    """
    if not _native.available("cpu"):
        raise RuntimeError(f"FLOPs are counted with the native library: {_native.why_not('cpu')}")
    with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        run()
    return counter.get_total_flops()


def _formulas() -> dict:
    """Operator -> FLOPs of a call with its arguments."""
    aten, own = torch.ops.aten, torch.ops.fastprompt
    with_values = {
        own.prefix_attention: _attention,
        own.prefix_attention_backward: _attention_backward,
        own.alignment_loss: _alignment,
    }
    for formula in with_values.values():
        formula._get_raw = True  # PyTorch's mark of those that are handed tensors, not shapes
    return with_values | {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
        ),
    }


def _attention(query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index, *options, out_val=None) -> int:
    own, prefix = _products(query, prefix_key, cu_seqlens, *options)
    return 2 * (own + prefix)


def _attention_backward(
    grad, query, key, value, prefix_key, prefix_value, out, lse, cu_seqlens, prefix_index, *options, out_val=None
) -> int:
    *options, for_query, for_key, for_value, for_prefix_key, for_prefix_value = options
    own, prefix = _products(query, prefix_key, cu_seqlens, *options)

    def done(key: bool, value: bool) -> int:
        return for_query + key + value and 1 + (for_query or key) + for_query + key + value

    return own * done(for_key, for_value) + prefix * done(for_prefix_key, for_prefix_value)


def _products(
    query: Tensor,
    prefix_key: Tensor,
    cu_seqlens: Tensor,
    prompt_rows: int,
    is_causal: bool,
    scale: float,
    window: int,
    prefix_in_window: bool,
) -> tuple[int, int]:
    """FLOPs of one product of the rows with those of their segments, and of one with the prefix."""
    if prompt_rows or is_causal or window >= 0:
        raise NotImplementedError("FLOPs of causal attention and of attention in a window are not counted")
    rows, heads, features = query.shape
    pairs = int(cu_seqlens.diff().long().square().sum())
    return 2 * pairs * heads * features, 2 * rows * prefix_key.shape[2] * heads * features


def _alignment(
    student,
    teacher,
    weight,
    bias,
    row_weight,
    row_grad,
    normalize,
    distances,
    temperature,
    reduction,
    for_student,
    for_teacher,
    for_weight,
    *others,
    out_val=None,
) -> int:
    from fastprompt.ops.alignment.native import DISTANCES

    projection, similarity = 2 * len(student) * weight.numel(), 2 * len(student) ** 2 * len(weight)
    infonce = bool(distances & DISTANCES["infonce"])
    down = for_student or for_weight  # the loss's gradient to what was projected
    return projection * (1 + for_student + for_weight) + infonce * similarity * (1 + down + for_teacher)
