"""AlignmentLoss: the loss with its projection."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt.ops.alignment import NORMALIZATIONS, alignment_loss, check_distance


class AlignmentLoss(nn.Module):
    """Pulls student vectors towards teacher vectors through a trainable projection.

    The projection begins at the identity (rectangular: ones on the diagonal), so that training starts from the
    distance between the vectors as they are. See `fastprompt.ops.alignment_loss` for the formula and the options.

    Args:
        student_dim: features Ds of the student vectors.
        teacher_dim: features Dt of the teacher vectors.
        bias: add a trainable offset (Dt,), begun at zero.
        normalize, distance, temperature: as in `fastprompt.ops.alignment_loss`.
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
    ) -> None:
        super().__init__()
        check_distance(distance)
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize must be one of {NORMALIZATIONS}, got {normalize!r}")
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.normalize, self.distance, self.temperature = normalize, distance, temperature
        self.weight = nn.Parameter(torch.eye(teacher_dim, student_dim))
        self.bias = nn.Parameter(torch.zeros(teacher_dim)) if bias else None

    def project(self, student: Tensor) -> Tensor:
        """student (N, Ds) -> (N, Dt), comparable with teacher vectors."""
        return F.linear(student, self.weight, self.bias)

    def forward(self, student: Tensor, teacher: Tensor, row_weight: Tensor | None = None) -> Tensor:
        """student (N, Ds), teacher (N, Dt), row_weight (N,) or None -> scalar loss, float32 (float64 for float64)."""
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
            f"distance={self.distance!r}, temperature={self.temperature}"
        )
