"""Learner: labelled and parallel sentences in one pass."""

import torch
from helpers import build

from fastprompt.models import PromptModel
from fastprompt.training import TrainingConfig
from fastprompt.training.learner import Learner

CONFIG = TrainingConfig(num_virtual_tokens=4)
LABELLED, PARALLEL = [[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 15, 16]]


def learner() -> Learner:
    made = Learner(PromptModel(build("bert"), CONFIG.prompt()), CONFIG, ["no", "yes"]).double()
    torch.nn.init.normal_(made.head.weight, generator=torch.Generator().manual_seed(0))
    return made


def gradients(made: Learner, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(made.trained().values()), materialize_grads=True, allow_unused=True))


def test_one_pass_gives_what_two_give():
    made, teacher, labels = learner(), torch.randn(2, 48, dtype=torch.float64), torch.tensor([1, 0, 1])
    apart = [
        made.loss(LABELLED, torch.zeros(3, 48), labels, aligned=torch.zeros(3)),
        made.loss(PARALLEL, teacher, None),
    ]
    assert apart[0]["alignment"] == 0  # nothing to align
    nothing = torch.full((3, 48), torch.nan, dtype=torch.float64)
    together = made.loss(
        LABELLED + PARALLEL,
        torch.cat([nothing, teacher]),
        torch.cat([labels, torch.tensor([-100, -100])]),
        aligned=torch.tensor([0.0, 0, 0, 1, 1]),
    )
    torch.testing.assert_close(together["task"], apart[0]["task"])
    torch.testing.assert_close(together["alignment"], apart[1]["alignment"])
    want = [a + b for a, b in zip(*(gradients(made, sum(parts.values())) for parts in apart), strict=True)]
    torch.testing.assert_close(gradients(made, sum(together.values())), want)


def test_no_label_at_all_is_no_task_loss():
    parts = learner().loss(PARALLEL, torch.randn(2, 48, dtype=torch.float64), torch.tensor([-100, -100]))
    assert parts["task"] == 0 and parts["alignment"] > 0
