"""evaluate_task: the official scores of a run on a task, language by language."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from fastprompt._files import write_text
from fastprompt.tasks.data import read_examples

from .run import read_run
from .task_config import TaskConfig
from .task_learner import TaskLearner


def evaluate_task(
    backbone: nn.Module,
    tokenizer: Callable,
    adapter: str | Path,
    data: str | Path,
    languages: Sequence[str],
    split: str,
) -> tuple[dict[str, dict[str, float]], dict[str, dict]]:
    """Predict and score with what `train_task` left in a folder.

    Args:
        backbone, tokenizer: as for `train_task`; the backbone is changed in place.
        adapter: the run's folder.
        data, split: as in `fastprompt.tasks.data.read_examples`.
        languages: to be scored; of mlqa also pairs such as "de-en".

    Returns:
        Scores and predictions (answer or label by the example's id), each by language.

    Raises:
        FileNotFoundError, ValueError: the folder holds no run on a task, or one that does not fit the backbone; or as
            of `read_examples`.
    """
    adapter = Path(adapter)
    run = read_run(adapter)
    if run is None or not isinstance(run["config"], TaskConfig):
        raise ValueError(f"adapter {adapter} must be the folder of a run on a task: train --task makes one")
    config = run["config"]
    tests = {name: read_examples(config.task, data, name, split) for name in languages}
    learner = TaskLearner(backbone, tokenizer, config)
    learner.load(adapter)
    predictions = {name: learner.predict(examples) for name, examples in tests.items()}
    scores = {
        name: learner.task.scores(examples, predictions[name], name.partition("-")[0])
        for name, examples in tests.items()
    }
    return scores, predictions


def write_predictions(folder: Path, predictions: dict[str, dict]) -> None:
    """Write what `fastprompt score` reads: {language}.json of answers by id, or {language}.txt with a label a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for language, each in predictions.items():
        if all(isinstance(value, str) for value in each.values()):
            write_text(folder / f"{language}.json", json.dumps(each, ensure_ascii=False, indent=0) + "\n")
        else:
            write_text(folder / f"{language}.txt", "".join(f"{label}\n" for label in each.values()))
