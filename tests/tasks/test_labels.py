"""Labels of classifications: what rows have, what is learnt of them, predictions, and scores."""

import logging
import random

import pytest
import torch

from fastprompt.data.examples import Tagged, Text
from fastprompt.tasks.classification import Classification
from fastprompt.tasks.labels import Labels
from fastprompt.tasks.scores import f1_scores, regression_scores
from fastprompt.tasks.tagging import Tagging


def test_scores_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(0)
    truth, given = (rng.choices("abcde", weights, k=50) for weights in ([5, 1, 1, 1, 0], [4, 1, 1, 0, 1]))
    found = f1_scores([{each} for each in truth], [{each} for each in given])
    assert found["macro_f1"] == pytest.approx(100 * metrics.f1_score(truth, given, average="macro"))
    sets = [[{each for each in "abcd" if rng.random() < 0.4} for _ in range(30)] for _ in range(2)]
    rows = [[[each in group for each in "abcd"] for group in side] for side in sets]
    for average in ("micro", "macro"):
        expected = 100 * metrics.f1_score(*rows, average=average)
        assert f1_scores(*sets)[f"{average}_f1"] == pytest.approx(expected)
    numbers = [[rng.randint(0, 9) + 0.5 * side for _ in range(40)] for side in (0, 1)]  # with ties
    assert regression_scores(*numbers) == pytest.approx(
        {
            "pearson": stats.pearsonr(*numbers)[0],
            "spearman": stats.spearmanr(*numbers)[0],
            "mse": sum((a - b) ** 2 for a, b in zip(*numbers, strict=True)) / 40,
        }
    )
    assert regression_scores([1, 2], [3, 3]) == {"pearson": 0.0, "spearman": 0.0, "mse": 2.5}
    assert f1_scores([set()], [set()]) == {"micro_f1": 0.0, "macro_f1": 0.0}


def test_what_was_learnt_is_told(caplog):
    """So that a licence under the last row is seen, which is a class like any other."""
    rows = [Text(n, "w", None, label) for n, label in enumerate(["no", "yes", "no", "This data is CC BY"])]
    with caplog.at_level(logging.INFO, "fastprompt"):
        Classification().fit(rows[:2] + rows)
        Tagging().fit([Tagged(0, [str(n) for n in range(26)], ["O", "O", *(f"t{n:02}" for n in range(24))])])
    assert caplog.messages[0] == "3 classes: 'no' 3, 'yes' 2, 'This data is CC BY' 1"
    shown = [f"'t{n:02}' 1" for n in (*range(16), 22, 23)]
    assert caplog.messages[1] == f"25 tags: 'O' 2, {', '.join(shown[:16])}, ..., {', '.join(shown[16:])}"


def test_classes_above_a_half_are_predicted():
    found = Labels("multi", ["a", "b", "c"], None).prediction(torch.tensor([-0.1, 0.0, 0.1]))
    assert found["prediction"] == ["c"] and found["probability"]["b"] == 0.5


@pytest.mark.parametrize(
    ("problem", "row", "expected"),
    [
        ("single", {"text": "a", "label": 3, "id": "x", "more": 1}, Text("x", "a", None, "3")),
        ("single", {"text": "a", "text_pair": "b", "label": " c|d "}, Text(7, "a", "b", "c|d")),
        ("multi", {"text": "a", "text_pair": "", "label": "c | d"}, Text(7, "a", None, ["c", "d"])),
        ("multi", {"text": "a", "label": ["c"]}, Text(7, "a", None, ["c"])),
        ("multi", {"text": "a", "label": ""}, Text(7, "a", None, [])),
        ("regression", {"text": "a", "label": "-1e2"}, Text(7, "a", None, -100.0)),
    ],
)
def test_rows(problem, row, expected):
    task = Classification(problem=problem)
    assert task.example(row, "f.csv, row 8", 7) == expected
    bare = {name: value for name, value in row.items() if name != "label"}
    assert task.example(bare, "f.csv, row 8", 7, labelled=False) == expected._replace(label=None)


@pytest.mark.parametrize(
    ("problem", "row", "message"),
    [
        ("single", {"label": "c"}, "f.csv, row 8: no column 'text', only 'label'"),
        ("single", {"text": "a"}, "f.csv, row 8: no column 'label', only 'text'"),
        ("single", {"text": " ", "label": "c"}, "f.csv, row 8, text: must be a text, got ' '"),
        ("single", {"text": "a", "text_pair": 3, "label": "c"}, "row 8, text_pair: must be a text, got 3"),
        ("single", {"text": "a", "label": " "}, "row 8, label: must be the name of a class, got ' '"),
        ("single", {"text": "a", "label": ["c"]}, r"row 8, label: must be the name of a class, got \['c'\]"),
        ("multi", {"text": "a", "label": "c||d"}, r"row 8, label: must be names of classes, got 'c\|\|d'"),
        ("multi", {"text": "a", "label": None}, "row 8, label: must be names of classes, got None"),
        ("regression", {"text": "a", "label": "high"}, "row 8, label: must be a finite number, got 'high'"),
        ("regression", {"text": "a", "label": "nan"}, "row 8, label: must be a finite number, got 'nan'"),
    ],
)
def test_bad_rows(problem, row, message):
    with pytest.raises(ValueError, match=message):
        Classification(problem=problem).example(row, "f.csv, row 8", 7)


@pytest.mark.parametrize(
    ("settings", "examples", "message"),
    [
        ({}, [], "examples must hold at least one to learn from, got none"),
        ({}, [Text(0, "a")], "example 0 must have a label, got none"),
        ({}, [Text(0, "a", None, "x")] * 3, "labels must be of two classes or more, got 'x' alone"),
        ({}, [Text(n, "a", None, f"l{n}") for n in range(90)], "got 90 classes in 90 examples: 'l0', 'l1', 'l10', "),
        ({"problem": "regression"}, [Text(0, "a", None, 2.0)] * 3, "labels must differ .* got 2.0 alone"),
        ({"problem": "regression"}, [Text(5, "a", None, "x")], "label of example 5 must be a finite number, got 'x'"),
        ({"labels": ["x", "y"]}, [Text(5, "a", None, "z")], r"example 5 must be of \['x', 'y'\], got 'z'"),
        (
            {},
            [Text(4, "a", None, "x"), Text(5, "a", "b", "y")],
            "example 5 must have texts=1, .* got a second one, 'b'",
        ),
        (
            {"texts": 2},
            [Text(5, "a", None, "x")],
            "example 5 must have texts=2, as all examples, got no second one \\(text_",
        ),
        (
            {"words": {"x": "1"}},
            [Text(n, "a", None, n % 2 and "x" or "y") for n in (0, 1)],
            "words must have one for each",
        ),
    ],
)
def test_nothing_to_learn_of(settings, examples, message):
    with pytest.raises(ValueError, match=message):
        Classification(**settings).fit(examples)
