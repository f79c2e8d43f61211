"""Labels: what the labels of a classification are, learnt from examples, and targets and predictions of them."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastprompt.data.examples import Text
from fastprompt.data.reading import shorten

from .rows import is_missing, tell_names

SEPARATOR = "|"  # between the classes of an example, where they are one string
_EXPECTED = {"single": "the name of a class", "multi": "names of classes", "regression": "a finite number"}


class Labels:
    """The labels of one problem.

    Args:
        problem: "single", "multi" or "regression".
        classes: their names; None: not yet known.
        scale: mean and deviation of numbers; None: not yet known.

    Raises:
        ValueError: names that are none, or what does not belong to the problem.
    """

    def __init__(self, problem: str, classes: Sequence[str] | None, scale: Sequence[float] | None) -> None:
        self.problem, self.classes, self.scale = problem, None, None
        if classes is not None:
            if not isinstance(classes, list | tuple) or not all(
                isinstance(each, str) and each.strip() for each in classes
            ):
                raise ValueError(f"labels must be names of classes, got {shorten(classes)}")
            self.classes = list(classes)
            if len(set(classes)) < len(classes) or len(classes) < (2 if problem == "single" else 1):
                raise ValueError(f"labels must be several and differ, got {shorten(classes)}")
            if problem == "regression":
                raise ValueError(f"labels must be None for problem 'regression', whose are numbers, got {classes}")
        if scale is not None:
            numbers = isinstance(scale, list | tuple) and all(type(each) in (int, float) for each in scale)
            if not numbers or len(scale) != 2 or not 0 < scale[1] < math.inf or problem != "regression":
                raise ValueError(f"scale must be a mean and a deviation, for problem 'regression', got {scale}")
            self.scale = list(scale)

    @property
    def complete(self) -> bool:
        """Whether nothing has to be learnt of examples."""
        return self.classes is not None or self.scale is not None

    @property
    def outputs(self) -> int:
        """Numbers that a head must give.

        Raises:
            ValueError: what the examples tell is not yet known.
        """
        if not self.complete:
            raise ValueError("labels must be given, or learnt of examples by fit, before a head is built")
        return 1 if self.classes is None else len(self.classes)

    def read(self, label: Any, where: str) -> str | list[str] | float:
        """A label as this problem has it; a ValueError begins with `where`."""
        if self.problem == "regression":
            try:
                number = float(label)
            except (TypeError, ValueError):
                number = math.nan
            if math.isfinite(number) and not isinstance(label, bool):
                return number
        elif self.problem == "multi":
            parts = label
            if isinstance(label, str):
                parts = label.split(SEPARATOR) if label.strip() else []
            if isinstance(parts, list | tuple) and not any(map(is_missing, parts)):
                return [str(part).strip() for part in parts]
        elif isinstance(label, str | int | float) and not is_missing(label):
            return str(label).strip()
        raise ValueError(f"{where} must be {_EXPECTED[self.problem]}, got {shorten(label)}")

    def of(self, example: Text) -> str | list[str] | float:
        """The label of an example, which must have one."""
        if example.label is None:
            raise ValueError(f"example {example.id!r} must have a label, got none")
        return self.read(example.label, f"label of example {example.id!r}")

    def fit(self, examples: Sequence[Text]) -> None:
        """Learn the names of the classes, or mean and deviation of the numbers, or hold the examples to them.

        Raises:
            ValueError: a label that is not of the problem or of the classes, or nothing to be learnt of them.
        """
        labels = [self.of(example) for example in examples]
        if self.problem == "regression":
            if self.scale is None:
                deviation, mean = torch.std_mean(torch.tensor(labels, dtype=torch.float64), correction=0)
                if not deviation > 0:
                    raise ValueError(f"labels must differ for something to be learnt of them, got {labels[0]} alone")
                self.scale = [mean.item(), deviation.item()]
        elif self.classes is None:
            self.classes = self._counted(labels)
        else:
            for example in examples:
                if not self.knows(example):
                    raise ValueError(
                        f"label of example {example.id!r} must be of {shorten(self.classes)}, got {example.label!r}"
                    )

    def _counted(self, labels: Sequence[str | list[str]]) -> list[str]:
        counts = Counter(each for label in labels for each in _group(label))
        names = sorted(counts)
        if len(names) < (2 if self.problem == "single" else 1):
            raise ValueError(
                f"labels must be of two classes or more, got {', '.join(map(repr, names)) or 'none'} alone"
            )
        if len(names) > 2 and 2 * len(names) > len(labels):
            some = ", ".join(shorten(each) for each in names[:3])
            raise ValueError(
                f"labels must be of classes with two examples or more on average, got {len(names)} classes in "
                f"{len(labels)} examples: {some}, ... If that is meant, give the names of all classes in labels"
            )
        tell_names("classes", counts)
        return names

    def knows(self, example: Text) -> bool:
        """Whether the label of an example is of the classes, or a number."""
        return self.problem == "regression" or set(_group(self.of(example))) <= set(self.classes)

    def tell_unknown(self, examples: Sequence[Text], what: str) -> None:
        """Warn of examples with a class that training did not have, and say what becomes of them."""
        unknown = [example for example in examples if not self.knows(example)]
        if unknown:
            text = "%d of %d examples have a class that training did not have, such as %s, and are %s"
            logging.getLogger("fastprompt").warning(text, len(unknown), len(examples), shorten(unknown[0].label), what)

    def target(self, example: Text) -> int | list[float] | float:
        """What a loss takes: the number of the class, a 1 or 0 for each class, or the number in deviations."""
        label = self.of(example)
        if self.problem == "regression":
            mean, deviation = self.scale
            return (label - mean) / deviation
        if self.problem == "multi":
            return [float(each in label) for each in self.classes]
        return self.classes.index(label)

    def prediction(self, logits: Tensor) -> dict[str, Any]:
        """What the logits of an example, on the host, say."""
        logits = logits.double()
        if self.problem == "regression":
            mean, deviation = self.scale
            return {"prediction": logits.item() * deviation + mean}
        if self.problem == "single":
            best = int(logits.argmax())
            return {"prediction": self.classes[best], "probability": logits.softmax(0)[best].item()}
        shares = dict(zip(self.classes, logits.sigmoid().tolist(), strict=True))
        return {"prediction": [each for each, share in shares.items() if share > 0.5], "probability": shares}


def _group(label: str | list[str]) -> list[str]:
    return [label] if isinstance(label, str) else label
