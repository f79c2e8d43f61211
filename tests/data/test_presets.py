"""Examples by one notation: splits, slices of rows, ids, and what is wrong."""

import pytest

from fastprompt.data.examples import Answer, Question
from fastprompt.data.presets import parse_split, read_examples, spread

QUESTIONS = [Question(id, f"q{n}", f"context {n}", [Answer(str(n), 8)]) for n, id in enumerate("aabc")]


@pytest.mark.parametrize(
    ("text", "split", "rows"),
    [
        ("dev", "dev", slice(None)),
        ("dev[:1400]", "dev", slice(None, 1400)),
        ("folder/train.json[200:]", "folder/train.json", slice(200, None)),
        ("a[1]/b.json[2:3]", "a[1]/b.json", slice(2, 3)),
        ("test[:]", "test", slice(None)),
        ("test[-3:]", "test[-3:]", slice(None)),
    ],
)
def test_split(text, split, rows):
    assert parse_split(text) == (split, rows)


def test_split_without_a_name():
    with pytest.raises(ValueError, match=r"split must be a name or a file, .* got ''"):
        parse_split("")


@pytest.mark.parametrize("task", ["xquad", "mlqa"])
def test_a_file_for_training(write_squad, task):
    """Ids may be anything there, and repeat: row numbers stand for them, counted before the slice."""
    file = write_squad("train.json", [*QUESTIONS[:2], *(each._replace(id=7) for each in QUESTIONS[2:])])
    read = read_examples(task, "not read", "en", f"{file}[1:3]")
    assert [question.id for question in read] == ["1", "2"]
    assert [question[1:] for question in read] == [question[1:] for question in QUESTIONS[1:3]]


def test_slices_of_test_sets(write_squad):
    folder = write_squad("data/xquad.de.json", QUESTIONS[1:]).parent
    assert read_examples("xquad", folder, "de", "test[1:]") == QUESTIONS[2:]
    write_squad("data/test/test-context-de-question-en.json", QUESTIONS[1:])
    assert read_examples("mlqa", folder, "de-en", "test[:1]") == QUESTIONS[1:2]
    write_squad("data/hi_squad-translate-train-train-v1.1.json", QUESTIONS[1:])
    assert read_examples("mlqa", folder, "hi", "translate-train[1:]") == QUESTIONS[2:]


def test_rows_of_pawsx_are_counted_before_any_is_left_out(tmp_path):
    (tmp_path / "dev-de.tsv").write_text("a\tb\t1\nNS\tb\t0\nc\td\t0\ne\tf\t1\n")
    assert [each.text for each in read_examples("pawsx", tmp_path, "de", "dev[1:3]")] == ["c"]
    assert [each.text for each in read_examples("pawsx", tmp_path, "de", "dev[:2]")] == ["a"]


@pytest.mark.parametrize(
    ("task", "language", "split", "message"),
    [
        ("squad", "en", "test", "task must be one of xquad, mlqa, pawsx, got 'squad'"),
        ("xquad", "en", "dev", "split must be one of test, got 'dev'"),
        ("xquad", "cy", "test", "language must be one of .* got 'cy'"),
        ("mlqa", "de-cy", "test", "language must be one of .* got 'cy'"),
        ("mlqa", "de", "train", "split must be one of .* got 'train'"),
        ("pawsx", "en", "dev[3]", r"split must be one of .* got 'dev\[3\]'"),
        ("pawsx", "ar", "dev", "language must be one of .* got 'ar'"),
    ],
)
def test_errors(tmp_path, task, language, split, message):
    with pytest.raises(ValueError, match=message):
        read_examples(task, tmp_path, language, split)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_examples("xquad", tmp_path, "en", str(tmp_path / "train.json[:5]"))


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, range(10)), (10, range(10)), (99, range(10)), (3, [0, 3, 6]), (1, [0])]
)
def test_spread(limit, expected):
    assert spread(range(10), limit) == list(expected)
