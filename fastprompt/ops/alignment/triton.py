"""The alignment loss through Triton: the operator, its autograd, and the launches. Imported only where triton is there.

The large products are torch.mm's, what lies between them is one kernel. Where gradients are wanted they are computed in
the forward, while z is at hand, and backward scales them. Two cases wait for the incoming gradient and compute them in
backward: reduction "none", where it differs by row, and float16, whose small numbers a loss scale must reach in time.

All launches follow from shapes; no value on the device is read on the host.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.ops._autograd import direct, once_differentiable, with_derivative
from fastprompt.ops._triton import block_of, cdiv, precision, readable, why_not

from . import triton_infonce, triton_kernels

__all__ = ["alignment_loss", "why_not"]

# Rows are taken in chunks whose z (and similarities, for "infonce") take so much: the cache of an H100 (50 MB) or A100
# (40 MB) holds them until they are read again, and a chunk's product still fills the GPU.
CHUNK_BYTES = 2**25
CHUNK_MULTIPLE = 128
PROGRAMS = 256  # of sums_kernel, about: where rows are few, several programs divide their features
MERGED_ROWS = 128


def configuration(rows: int, columns: int, depth: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and launch options of a kernel that multiplies.

    Args:
        rows, columns: how many a tile can typically fill: larger ones would compute on padding.
        depth: over how many features the products go.
    """
    # What keeps all in registers. float32 products run on the plain cores and hold twice the bytes.
    most_rows, depth_block, stages = (64, 16, 2) if dtype == torch.float32 else (128, 64, 3)
    tile_rows = min(most_rows, block_of(rows))
    return dict(
        ROWS=tile_rows,
        COLUMNS=min(64, block_of(columns)),
        DEPTH_BLOCK=min(depth_block, block_of(depth)),
        num_warps=8 if tile_rows >= 64 else 4,
        num_stages=stages,
    )


def row_configuration(features: int) -> dict[str, int]:
    """The same of a kernel that goes over rows: 8 features a thread, several rows a program where they are short."""
    block = min(2048, block_of(features))
    return dict(ROWS=max(1, 1024 // block), BLOCK=block, num_warps=max(4, block // 256))


def _compute(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_weight: Tensor | None,
    grad: Tensor | None,
    normalize: str,
    distance: str,
    temperature: float,
    reduction: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss and the gradients of the five inputs, both times `grad` (None: 1); empty are those not needed."""
    inputs = student, teacher, weight, bias, row_weight
    tensors = [None if x is None else readable(x) for x in inputs[:4]]
    row_weight = None if row_weight is None else row_weight.float().contiguous()
    share, scale, total = _shares(row_weight, grad, len(student), reduction)
    counted = row_weight, share, scale
    losses = student.new_empty(len(student), dtype=torch.float32)
    grads = [None] * 5
    with torch.cuda.device_of(student), torch._C._DisableAutocast():  # whose products are of other types
        if distance == "cosine" and normalize != "layer" and not any(needs[:4]):
            _cosine_losses(losses, *tensors, *counted)
        else:
            grads[:4] = _losses_and_gradients(losses, *tensors, *counted, normalize, distance, temperature, needs)
    loss = losses if reduction == "none" else losses.sum()
    if needs[4]:
        grads[4] = losses / row_weight
        if total is not None:
            grads[4] -= (loss / total).masked_fill(total == 0, 0.0)
        grads[4].masked_fill_(row_weight == 0, 0.0)
    empty = _gradients(student, inputs, [False] * 5)
    return loss, *(e if g is None else g.to(e.dtype) for g, e in zip(grads, empty, strict=True))


def _gradients(student: Tensor, inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    given = [student if x is None else x for x in inputs]
    return [x.new_empty(x.shape if need else (0,)) for x, need in zip(given, needs, strict=True)]


_alignment_loss = torch.library.custom_op("fastprompt::alignment_loss_triton", _compute, mutates_args=())
_run = direct(torch.ops.fastprompt.alignment_loss_triton.default, _compute)


@_alignment_loss.register_fake
def _(student, teacher, weight, bias, row_weight, grad, normalize, distance, temperature, reduction, needs):
    loss = student.new_empty(student.shape[:1] if reduction == "none" else (), dtype=torch.float32)
    return loss, *_gradients(student, (student, teacher, weight, bias, row_weight), needs)


def _shares(
    row_weight: Tensor | None, grad: Tensor | None, rows: int, reduction: str
) -> tuple[Tensor | None, float, Tensor | None]:
    """By what the rows' losses are multiplied: (N,), or None and one number; and the sum of the weights of a mean."""
    share, scale, total = row_weight, 1.0, None
    if reduction == "mean" and row_weight is None:
        scale = 1 / rows
    elif reduction == "mean":
        total = row_weight.sum()
        share = row_weight / torch.where(total == 0, 1.0, total)
    if grad is not None:
        share = (grad * (scale if share is None else share)).expand(rows).contiguous()
    return share, scale, total


def _cosine_losses(
    losses: Tensor,
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_weight: Tensor | None,
    share: Tensor | None,
    scale: float,
) -> None:
    """Fill `losses` from sums of z^2, t^2 and z t alone: z is never in memory.

    The same for "l2" and "none". Not for "layer", nor for mse, whose sums about the mean and between the rows cancel in
    these.
    """
    (rows, features), depth = teacher.shape, student.shape[1]
    config = configuration(rows, features, depth, student.dtype)
    tiles, columns = cdiv(rows, config["ROWS"]), config["COLUMNS"]
    splits = max(1, min(cdiv(features, columns), PROGRAMS // tiles))
    features_per_split = cdiv(cdiv(features, splits), columns) * columns
    splits = cdiv(features, features_per_split)
    sums = losses.new_empty(splits, 3, rows)
    triton_kernels.sums_kernel[(tiles, splits)](
        *(student, teacher, weight, bias, row_weight, sums),
        *((student.stride(0), teacher.stride(0), weight.stride(0)), rows, features_per_split),
        STUDENT_FEATURES=depth,
        FEATURES=features,
        PRECISION=precision(),
        **config,
    )
    triton_kernels.cosine_kernel[(cdiv(rows, MERGED_ROWS),)](
        *(sums, row_weight, share, losses, rows, scale, splits),
        ROWS=MERGED_ROWS,
    )


def _losses_and_gradients(
    losses: Tensor,
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_weight: Tensor | None,
    share: Tensor | None,
    scale: float,
    normalize: str,
    distance: str,
    temperature: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Fill `losses` and return the gradients of student, teacher, weight and bias."""
    student_needs, teacher_needs, weight_needs, bias_needs, _ = needs
    z_needs = student_needs or weight_needs or bias_needs
    (rows, features), names = teacher.shape, distance.split("+")
    config, width, infonce = row_configuration(features), features, None
    if "infonce" in names:
        whole_z, width = F.linear(student, weight, bias), 2 * features + rows
        unit, peaks, totals, infonce = _infonce(whole_z, teacher, row_weight, normalize, temperature)
    grad_student = torch.empty_like(student) if student_needs else None
    grad_teacher = torch.empty_like(teacher) if teacher_needs else None
    grad_weight = grad_bias = None
    chunk = CHUNK_BYTES // max(1, width * student.element_size()) // CHUNK_MULTIPLE * CHUNK_MULTIPLE
    for first in range(0, rows, max(CHUNK_MULTIPLE, chunk)):
        end = min(first + max(CHUNK_MULTIPLE, chunk), rows)
        part, grad_u, grad_v = slice(first, end), None, None
        z = F.linear(student[part], weight, bias) if infonce is None else whole_z[part]
        if infonce is not None:
            options = unit, peaks, totals, row_weight, share, scale, temperature, first, end
            grad_u = _infonce_gradient(0, *options) if z_needs else None
            grad_v = _infonce_gradient(1, *options) if teacher_needs else None
        triton_kernels.row_kernel[(cdiv(end - first, config["ROWS"]),)](
            *(z, teacher, row_weight, share, infonce, grad_u, grad_v, losses, grad_teacher),
            *(teacher.stride(0), first, end, rows, scale),
            FEATURES=features,
            NORMALIZE=normalize,
            COSINE="cosine" in names,
            MSE="mse" in names,
            SMOOTH_L1="smooth_l1" in names,
            GRAD_Z=z_needs,
            **config,
        )
        if student_needs:
            torch.mm(z, weight, out=grad_student[part])
        if weight_needs:
            hidden = student[part]
            if row_weight is not None:  # 0 times what may be no number
                hidden = hidden.masked_fill((row_weight[part] == 0)[:, None], 0.0)
            grad_weight = _add(grad_weight, z.T @ hidden)
        if bias_needs:
            grad_bias = _add(grad_bias, z.sum(0, dtype=torch.float32))
    return grad_student, grad_teacher, grad_weight, grad_bias


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    """total + part, in float32."""
    return part if total is None else total.float().add_(part)


def _infonce(
    z: Tensor, teacher: Tensor, row_weight: Tensor | None, normalize: str, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The normalised rows (2, N, Dt) of both sides, and what infonce_kernel finds."""
    rows, features = z.shape
    unit = z.new_empty(2, rows, features)
    peaks, totals, losses = torch.empty((3, 2, rows), dtype=torch.float32, device=z.device)
    config = row_configuration(features)
    triton_kernels.normalize_kernel[(cdiv(rows, config["ROWS"]),)](
        *(z, teacher, row_weight, unit, teacher.stride(0), rows),
        FEATURES=features,
        NORMALIZE=normalize,
        **config,
    )
    # Programs for the whole GPU come before large tiles.
    config = configuration(rows // 32, rows // 2, features, z.dtype)
    triton_infonce.infonce_kernel[(cdiv(rows, config["ROWS"]), 2)](
        *(unit, row_weight, peaks, totals, losses, rows, 1 / temperature),
        FEATURES=features,
        PRECISION=precision(),
        **config,
    )
    return unit, peaks, totals, losses


def _infonce_gradient(
    side: int,
    unit: Tensor,
    peaks: Tensor,
    totals: Tensor,
    row_weight: Tensor | None,
    share: Tensor | None,
    scale: float,
    temperature: float,
    first: int,
    end: int,
) -> Tensor:
    """The gradient (end - first, Dt) of the normalised rows first..end of one side."""
    _, rows, features = unit.shape
    grad = unit.new_empty(end - first, cdiv(rows, 16) * 16)[
        :, :rows
    ]  # rows that begin where 16 bytes are stored at once
    config = configuration(end - first, rows, features, unit.dtype)
    grid = cdiv(rows, config["COLUMNS"]), cdiv(end - first, config["ROWS"])
    triton_infonce.similarity_gradient_kernel[grid](
        *(unit, row_weight, share, peaks, totals, grad, side, first, end, rows, grad.stride(0), 1 / temperature, scale),
        FEATURES=features,
        PRECISION=precision(),
        **config,
    )
    return grad @ unit[1 - side]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.normalize, ctx.distance, ctx.temperature, ctx.reduction, needs = inputs
    ctx.set_materialize_grads(False)
    ctx.in_forward = any(needs)
    if not ctx.in_forward:
        ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*(output[1:] if ctx.in_forward else tensors[:5]))


def _backward(ctx, grad, *second):
    if any(each is not None for each in second):  # somebody differentiates the gradients that came with the loss
        raise RuntimeError("alignment_loss has no second derivative, but for backend 'reference'")
    if grad is None:
        return (None,) * 11
    needs = list(ctx.needs_input_grad[:5])
    if ctx.in_forward:
        grads = [grad * g if need else None for g, need in zip(ctx.saved_tensors, needs, strict=True)]
    else:
        options = ctx.normalize, ctx.distance, ctx.temperature, ctx.reduction
        _, *found = _run(*ctx.saved_tensors, grad, *options, needs)
        grads = [g if need else None for g, need in zip(found, needs, strict=True)]
    return *grads, *[None] * 6


_differentiable = with_derivative(
    torch.ops.fastprompt.alignment_loss_triton.default,
    _setup_context,
    once_differentiable("alignment_loss", _backward),
    _compute,
)


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
    """Arguments and result as of ops.alignment_loss."""
    inputs = student, teacher, weight, bias, row_weight
    in_forward = torch.is_grad_enabled() and reduction != "none" and student.dtype != torch.float16
    needs = [in_forward and x is not None and x.requires_grad for x in inputs]
    return _differentiable(*inputs, None, normalize, distance, temperature, reduction, needs)[0]
