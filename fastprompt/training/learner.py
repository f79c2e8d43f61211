"""Learner: everything a run trains, and its files."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt._files import read_tensors, write_tensors
from fastprompt.models import PromptModel
from fastprompt.nn import AlignmentLoss

from .config import TrainingConfig
from .encoding import encode, encode_all

ALIGNMENT = "alignment.safetensors"


class Learner(nn.Module):
    """A prompted backbone, the projection that makes its vectors the teacher's, and a head where there are labels.

    Args:
        prompted: the student.
        config: of the run.
        labels: the classes, in the head's order; none without a head.
    """

    def __init__(self, prompted: PromptModel, config: TrainingConfig, labels: Sequence[str] = ()) -> None:
        super().__init__()
        width = prompted.backbone.config.hidden_size
        self.prompted, self.pooling, self.labels = prompted, config.pooling, list(labels)
        self.alignment = AlignmentLoss(width, width, distance=config.distance, temperature=config.temperature)
        self.head = nn.Linear(width, len(labels)) if labels else None
        if self.head is not None:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        self.to(prompted.prompt.weight.device)
        self.eval()  # the backbone is a constant: its dropout would only blur it

    @property
    def device(self) -> torch.device:
        return self.prompted.prompt.weight.device

    def trained(self) -> dict[str, nn.Parameter]:
        """What trains, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def loss(
        self,
        sentences: Sequence[list[int]],
        teacher: Tensor,
        labels: Tensor | None,
        states: Tensor | None = None,
        aligned: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The parts of the loss of one batch: "alignment", and "task" where there are labels; their sum is the loss.

        Labelled sentences and sentences with a partner, which need not be the same, share one pass.

        Args:
            sentences: N sentences, token ids.
            teacher: (N, D) vectors of their partners in the source language.
            labels: (N,) int64, -100 for a sentence without; or None.
            aligned: (N,) 1 for a sentence with a partner, 0 for one without, whose teacher row is not read; None: all.
            states: (T, D) or None, the sentences' `PromptModel.lower_states`, where they are at hand.
        """
        student = encode(self.prompted, sentences, self.pooling, self.device, lower_states=states)
        parts = {"alignment": self.alignment(student, teacher, aligned)}
        if labels is not None:
            total = F.cross_entropy(self.head(student), labels, reduction="sum")  # -100 is left out
            parts["task"] = total / (labels != -100).sum().clamp(min=1)
        return parts

    @torch.no_grad()
    def vectors(self, sentences: Sequence[list[int]]) -> tuple[Tensor, Tensor | None]:
        """(N, D) projected vectors, comparable with the teacher's, and (N, classes) logits if there is a head."""
        student = encode_all(self.prompted, sentences, self.pooling, self.device).to(self.device)
        logits = None if self.head is None else self.head(student).cpu()
        return self.alignment.project(student).cpu(), logits

    def save(self, folder: Path) -> None:
        """Write PEFT's files and, beside them, the projection and the head with a digest of the prompt they fit."""
        others = {name: p for name, p in self.state_dict().items() if not name.startswith("prompted.")}
        self.prompted.save_pretrained(folder)
        write_tensors(folder / ALIGNMENT, others, {"prompt": _digest(self.prompted.prompt.weight)})

    @classmethod
    def load(cls, backbone: nn.Module, folder: Path, config: TrainingConfig, labels: Sequence[str]) -> "Learner":
        """What `save` wrote; of a folder that PEFT wrote, with the projection at the identity.

        Raises:
            FileNotFoundError, ValueError: a file is missing, damaged, or does not fit the backbone or the prompt.
        """
        learner = cls(PromptModel.from_pretrained(backbone, folder), config, labels)
        file = folder / ALIGNMENT
        if not file.is_file():
            return learner
        tensors, metadata, _ = read_tensors(file)
        offset = learner.prompted.prompt_config.position_offset  # PEFT may have saved the same prompt over it
        if metadata.get("prompt") != _digest(learner.prompted.prompt.weight) or offset != config.position_offset:
            raise ValueError(
                f"{file} belongs to another prompt than the one beside it: files of two runs were mixed, PEFT saved "
                "over this one, or a run was killed while it saved (train --resume writes them again)"
            )
        expected = {k: v for k, v in learner.state_dict().items() if not k.startswith("prompted.")}
        shapes, got = ({name: tuple(t.shape) for name, t in each.items()} for each in (expected, tensors))
        if got != shapes:
            raise ValueError(f"{file} must hold {shapes}, got {got}")
        learner.load_state_dict(tensors, strict=False)
        return learner


def _digest(prompt: Tensor) -> str:
    return hashlib.sha256(prompt.detach().cpu().contiguous().numpy().data).hexdigest()
