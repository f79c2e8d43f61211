"""AlignmentLoss: the loss with its projection."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt.ops.alignment import NORMALIZATIONS, alignment_loss, check_distance, check_temperature

from .pooling import check_pooling, pool


class AlignmentLoss(nn.Module):
    """Pulls student vectors towards teacher vectors through a trainable projection.

    The projection begins at the identity (rectangular: ones on the diagonal), so that training starts from the
    distance between the vectors as they are. See `fastprompt.ops.alignment_loss` for the formula and the options.

    Args:
        student_dim: features Ds of the student vectors.
        teacher_dim: features Dt of the teacher vectors.
        bias: add a trainable offset (Dt,), begun at zero.
        normalize, distance, temperature: as in `fastprompt.ops.alignment_loss`.
        pooling: what makes a sentence's vector of its rows, where rows are given: their "mean", the "first" or "last".
        gather: under torch.distributed, take the vectors of all ranks, so that each sentence has those of all ranks as
            its negatives. Every rank must call, computes the same loss and passes the others' gradients back; with
            gradients averaged over ranks, as DistributedDataParallel does, training is that of one process with the
            whole batch. Ranks may hold different numbers of sentences.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        bias: bool = False,
        normalize: str = "l2",
        distance: str = "cosine",
        temperature: float | None = None,
        pooling: str = "mean",
        gather: bool = False,
    ) -> None:
        super().__init__()
        check_distance(distance)
        check_pooling(pooling)
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize must be one of {NORMALIZATIONS}, got {normalize!r}")
        check_temperature(temperature)
        self.normalize, self.distance, self.temperature = normalize, distance, temperature
        self.pooling, self.gather = pooling, gather
        self.weight = nn.Parameter(torch.eye(teacher_dim, student_dim))
        self.bias = nn.Parameter(torch.zeros(teacher_dim)) if bias else None

    def project(self, student: Tensor) -> Tensor:
        """student (N, Ds) -> (N, Dt), comparable with teacher vectors."""
        return F.linear(student, self.weight, self.bias)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        row_weight: Tensor | None = None,
        *,
        student_mask: Tensor | None = None,
        student_cu_seqlens: Tensor | None = None,
        teacher_mask: Tensor | None = None,
        teacher_cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar: float32 (float64 where the projection is).

        Each side is pooled vectors (N, D), padded rows (N, L, D) with a mask (N, L), or packed rows (T, D) with
        cu_seqlens (N+1,) int32; the two need not be alike. They are brought to the projection's dtype.

        Args:
            student: (N, Ds), (N, L, Ds) or (T, Ds).
            teacher: (N, Dt), (N, L, Dt) or (T, Dt).
            row_weight: (N,) weights of the sentences; None for equal ones.

        Raises:
            ValueError: a shape or device that does not fit.
        """
        student = pool(student, self.pooling, student_mask, student_cu_seqlens).to(self.weight.dtype)
        teacher = pool(teacher, self.pooling, teacher_mask, teacher_cu_seqlens).to(self.weight.dtype)
        if self.gather and dist.is_initialized() and dist.get_world_size() > 1:
            if row_weight is None:
                row_weight = torch.ones(len(student), device=student.device)
            student, teacher, row_weight = gather_rows(student, teacher, row_weight)
        return alignment_loss(
            student,
            teacher,
            self.weight,
            self.bias,
            row_weight=row_weight,
            normalize=self.normalize,
            distance=self.distance,
            temperature=self.temperature,
        )

    def extra_repr(self) -> str:
        teacher_dim, student_dim = self.weight.shape
        return (
            f"{student_dim}, {teacher_dim}, bias={self.bias is not None}, normalize={self.normalize!r}, "
            f"distance={self.distance!r}, temperature={self.temperature}, pooling={self.pooling!r}, "
            f"gather={self.gather}"
        )


def gather_rows(student: Tensor, teacher: Tensor, row_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All ranks' rows, in the ranks' order, with gradients. A rank with fewer is filled up with rows of weight 0."""
    count = torch.tensor([len(student)], device=student.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    missing = int(torch.cat(counts).max()) - len(student)
    padded = (F.pad(x, (0, 0, 0, missing)) for x in (student, teacher, row_weight.unsqueeze(1)))
    student, teacher, row_weight = (_AllGather.apply(x.contiguous()) for x in padded)
    return student, teacher, row_weight.squeeze(1)


class _AllGather(torch.autograd.Function):
    """Rows of all ranks one after the other; the gradients of a rank's rows, summed over all ranks, come back to it."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(dist.get_world_size(), *rows.shape)
        dist.all_gather(list(gathered), rows)
        return gathered.flatten(0, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad.unflatten(0, (dist.get_world_size(), -1))[dist.get_rank()]
