"""The alignment loss through csrc/: loss and gradients in one pass. Imported only where the library is loaded."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastprompt.ops._autograd import once_differentiable

# The order gives the numbers of csrc/common/alignment_rows.h.
NORMALIZATIONS = ("l2", "layer", "none")
DISTANCES = {"cosine": 1, "mse": 2, "smooth_l1": 4, "infonce": 8}
REDUCTIONS = ("none", "sum", "mean")

_forward = torch.ops.fastprompt.alignment_loss.default


def _compute(*inputs) -> tuple[Tensor, ...]:
    with torch._C._DisableAutocast():  # CUDA's products are the library's, which autocast would have of other types
        return _forward(*inputs)


@torch.library.register_fake("fastprompt::alignment_loss")
def _(student, teacher, weight, bias, row_weight, row_grad, normalize, distances, temperature, reduction, *needs):
    accumulate = torch.promote_types(student.dtype, torch.float32)
    loss = student.new_empty(student.shape[:1] if reduction == 0 else (), dtype=accumulate)
    inputs = student, teacher, weight, bias
    grads = [x.new_empty(x.shape if need else (0,)) for x, need in zip(inputs[:3], needs[:3], strict=True)]
    grads.append(student.new_empty(bias.shape if bias is not None and needs[3] else (0,)))
    needed = row_weight is not None and needs[4]
    return loss, *grads, student.new_empty(student.shape[:1] if needed else (0,), dtype=accumulate)


def _save(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, _ = inputs[:6]
    ctx.options = inputs[6:10]
    ctx.set_materialize_grads(False)
    if _by_row(ctx):
        ctx.mark_non_differentiable(*output[1:])  # which are empty
    ctx.save_for_backward(*(tensors if _by_row(ctx) else output[1:]))


def _by_row(ctx) -> bool:
    return REDUCTIONS[ctx.options[-1]] == "none"


def _differentiate(ctx, grad: Tensor | None, *second: Tensor | None) -> tuple:
    """The gradients were found with the loss; under reduction "none" they wait for their rows' gradients."""
    if any(each is not None for each in second):  # somebody differentiates the gradients that came with the loss
        raise RuntimeError("alignment_loss has no second derivative, but for backend 'reference'")
    if grad is None:
        return (None,) * 15
    if _by_row(ctx):
        return _wanted(ctx, _compute(*ctx.saved_tensors, grad, *ctx.options, *ctx.needs_input_grad[:5])[1:])
    return _wanted(ctx, [x * grad for x in ctx.saved_tensors])


def _differentiate_at_hand(ctx, grad: Tensor | None, *second: Tensor | None) -> tuple:
    """The same, where the incoming gradient has a value for which nobody waits."""
    at_hand = type(grad) is Tensor and grad.device.type == "cpu" and not _by_row(ctx)  # no subclass: it may be a fake
    if at_hand and grad.item() == 1:  # as from loss.backward(): spares a pass
        return tuple(x if x is None else x.detach() for x in _wanted(ctx, ctx.saved_tensors))
    return _differentiate(ctx, grad, *second)


def _wanted(ctx, grads: Sequence[Tensor]) -> tuple:
    needs = ctx.needs_input_grad[:5]
    return *(x if need else None for x, need in zip(grads, needs, strict=True)), *[None] * 10


torch.library.register_autograd(
    "fastprompt::alignment_loss", once_differentiable("alignment_loss", _differentiate), setup_context=_save
)


class _AlignmentLoss(torch.autograd.Function):
    """The same as the registered autograd, at less cost per call."""

    @staticmethod
    def forward(ctx, *inputs) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():  # not the registered autograd inside of this one
            output = _compute(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(once_differentiable("alignment_loss", _differentiate_at_hand))


def alignment_loss(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_weight: Tensor | None,
    normalize: str,
    distance: str,
    temperature: float,
    reduction: str,
) -> Tensor:
    if row_weight is not None:
        row_weight = row_weight.to(torch.promote_types(student.dtype, torch.float32))
    tensors = student, teacher, weight, bias, row_weight
    wants = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if wants and student.dtype == torch.float16 and reduction != "none":
        # Gradients found with the loss have not met a loss scale yet, and vanish in float16. By row they wait for it.
        losses = alignment_loss(*tensors, normalize, distance, temperature, "none")
        if reduction == "sum":
            return losses.sum()
        if row_weight is None:
            return losses.mean()
        total = torch.where(row_weight == 0, 0.0, row_weight).sum()  # a weight of 0 has no gradient
        return losses.sum() / torch.where(total == 0, 1.0, total)
    at_once = torch.is_grad_enabled() and reduction != "none"
    needs = [at_once and x is not None and x.requires_grad for x in tensors]
    run = _forward if torch.compiler.is_compiling() else _AlignmentLoss.apply
    distances = sum(DISTANCES[name] for name in distance.split("+"))
    options = NORMALIZATIONS.index(normalize), distances, temperature, REDUCTIONS.index(reduction)
    return run(*tensors, None, *options, *needs)[0]
