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


def _attention(*arguments, out_val: object) -> int:
    query, _, _, prefix_key, _, *others = arguments
    own, prefix = _product(query, prefix_key, *others)
    return 2 * (own + prefix)


def _attention_backward(*arguments, out_val: object) -> int:
    _, query, _, _, prefix_key, _, _, _, *others = arguments[:-5]
    for_query, for_key, for_value, for_prefix_key, for_prefix_value = arguments[-5:]
    own, prefix = _product(query, prefix_key, *others)

    def products(for_key: bool, for_value: bool) -> int:
        wanted = for_query + for_key + for_value
        return 1 + (for_query or for_key) + wanted if wanted else 0

    return own * products(for_key, for_value) + prefix * products(for_prefix_key, for_prefix_value)


def _product(query: Tensor, prefix_key: Tensor, cu_seqlens: Tensor, *others) -> tuple[int, int]:
    """FLOPs of one product of the rows with the keys of their segments, and of one with the prefix."""
    _, _, _, cu_seqlens_k, prompt_rows, is_causal, _, window, _, _, _ = others
    if prompt_rows or is_causal or window >= 0:
        raise NotImplementedError("FLOPs of causal attention and of attention in a window are not counted")
    rows, heads, features = query.shape
    keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    pairs = int((cu_seqlens.diff().long() * keys.diff()).sum())
    return 2 * pairs * heads * features, 2 * rows * prefix_key.shape[2] * heads * features


def _alignment(*arguments, out_val: object) -> int:
    from fastprompt.ops.alignment.native import DISTANCES  # here: it needs the library

    student, _, weight, _, _, _, _, distances, *_ = arguments
    for_student, for_teacher, for_weight, _, _ = arguments[-5:]
    projection, similarity = 2 * len(student) * weight.numel(), 2 * len(student) ** 2 * len(weight)
    if not distances & DISTANCES["infonce"]:
        similarity = 0
    through = for_student or for_weight  # the gradient of what was projected
    return projection * (1 + for_student + for_weight) + similarity * (1 + through + for_teacher)
