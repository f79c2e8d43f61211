"""evaluate: does a translation find its English sentence, without and with the adapter?"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from fastprompt.tasks.parallel import Pair
from fastprompt.tasks.retrieval import retrieval_scores, sentence_groups

from .config import TrainingConfig
from .encoding import encode_all, plain, tokenize
from .learner import Learner
from .run import read_run
from .task_config import TaskConfig


def evaluate(
    backbone: nn.Module,
    tokenizer: Callable,
    pairs: Sequence[Pair],
    adapter: str | Path,
    *,
    prefix_text: str | None = None,
    pooling: str | None = None,
) -> dict[str, dict[str, float]]:
    """Score the retrieval of English sentences by their translations, without and with what was trained.

    Args:
        backbone, tokenizer: as for `train`.
        pairs: parallel sentences. English sentences of the same tokens are no rivals of each other.
        adapter: a run's folder, or an adapter that PEFT wrote (then without projection).
        prefix_text, pooling: instead of the run's ("" and "mean" for PEFT's).

    Returns:
        {"without": scores, "with": scores}, each as `retrieval_scores` gives them; with labelled pairs and a trained
        head also "accuracy" in "with".

    Raises:
        FileNotFoundError, ValueError: the adapter is not there or does not fit, a label was never seen in training.
    """
    adapter = Path(adapter)
    run = read_run(adapter) or {"config": TrainingConfig(), "labels": []}
    config, labels = run["config"], run["labels"]
    if isinstance(config, TaskConfig):
        raise ValueError(f"adapter {adapter} must be the run of a language, got one on the task {config.task!r}")
    given = {"prefix_text": prefix_text, "pooling": pooling}
    config = dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})
    device = next(backbone.parameters()).device
    learner = Learner.load(backbone, adapter, config, labels)
    unknown = {pair.label for pair in pairs} - {None} - set(labels)
    if labels and unknown:
        raise ValueError(f"label must be one of those in training, {labels}, got {sorted(unknown)}")
    source, target = (
        tokenize(tokenizer, [getattr(pair, side) for pair in pairs], config.prefix_text, config.max_length)
        for side in ("source", "target")
    )
    groups = sentence_groups(source)
    teacher = plain(backbone)
    english, before = (encode_all(teacher, sentences, config.pooling, device) for sentences in (source, target))
    after, logits = learner.vectors(target)
    scores = {
        "without": retrieval_scores(before, english, groups),
        "with": retrieval_scores(after, english, groups),
    }
    if logits is not None and pairs[0].label is not None:
        truth = torch.tensor([labels.index(pair.label) for pair in pairs])
        scores["with"]["accuracy"] = (logits.argmax(1) == truth).double().mean().item()
    return scores
