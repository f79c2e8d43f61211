"""Small runs of the Trainer: settings by their names, wherever they belong."""

import dataclasses
import json
from pathlib import Path

import torch

from fastprompt.models.methods import AdapterConfig
from fastprompt.tasks.base import InputConfig
from fastprompt.training import Trainer, TrainingArguments

SMALL = dict(use_cpu=True, disable_tqdm=True, per_device_train_batch_size=8, num_train_epochs=3, learning_rate=3e-2)
SMALL |= dict(projection_learning_rate=1e-2, head_learning_rate=1e-2, num_virtual_tokens=4, max_length=30)


def trainer(backbone, out: Path, **given) -> Trainer:
    given = SMALL | given
    made = []
    for kind in (TrainingArguments, AdapterConfig, InputConfig):
        names = {each.name for each in dataclasses.fields(kind)} & given.keys()
        made.append({name: given.pop(name) for name in names})
    arguments, adapter, inputs = made
    configs = {"adapter": AdapterConfig(**adapter), "inputs": InputConfig(**inputs)}
    return Trainer(backbone, TrainingArguments(str(out), **arguments), **configs, **given)


def run(backbone, out: Path, *, resume: bool | str = False, **given) -> Trainer:
    made = trainer(backbone, out, **given)
    made.train(resume_from_checkpoint=resume)
    return made


def equal(one: Trainer, two: Trainer) -> bool:
    """To the bit."""
    states = [each.learner.state_dict() for each in (one, two)]
    return states[0].keys() == states[1].keys() and all(map(torch.equal, *(state.values() for state in states)))


def written(out: Path, file: str = "metrics.jsonl") -> list[dict]:
    """The records of a run's file, but for what is never twice the same."""
    return [json.loads(line) | {"seconds": 0} for line in (out / file).read_text().splitlines()]


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())
