"""Settings in YAML: what plain values are, and that none of a wrong type gets through."""

import dataclasses

import pytest

from fastprompt._settings import check_fields, read_yaml
from fastprompt.experiments.config import read_study
from fastprompt.models.methods import AdapterConfig
from fastprompt.tasks.base import InputConfig
from fastprompt.training import AlignmentConfig

STUDY = "task: retrieval\nbackbone: b\nparallel: {no: no.tsv, sv: sv.tsv}\nmethods: [frozen]\n"


def test_plain_values(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "a: no\nb: [1e-2, -1.5E3, .5]\nno: {on: Off}\nc: [true, False]\nd: 010\ne: 1:30\nf:\ng: '1'\nh: 1_0\n"
    )
    assert read_yaml(file) == {
        **{"a": "no", "b": [0.01, -1500.0, 0.5], "no": {"on": "Off"}, "c": [True, False], "d": 10, "e": "1:30"},
        **{"f": None, "g": "1", "h": "1_0"},
    }


@pytest.mark.parametrize("kind", [AdapterConfig, InputConfig, AlignmentConfig])
def test_every_field_refuses_what_is_not_of_its_type(kind):
    """In a file, and where it is made: but an integer is a number, and yes is true."""
    for field in dataclasses.fields(kind):
        good = getattr(kind(), field.name)
        wrong = [[[]], {"a": 1}, b"1"] + ([] if isinstance(good, str) or "str" in str(field.type) else ["maybe"])
        for value in wrong + ([True] if isinstance(good, int | float) and not isinstance(good, bool) else []):
            with pytest.raises(ValueError, match=f"^file: {field.name} must be .*, got "):
                check_fields(kind, {field.name: value}, "file: ")
            with pytest.raises(ValueError, match=f"{field.name} must be "):
                kind(**{field.name: value})
        assert check_fields(kind, {field.name: good}) == {field.name: good}
    assert check_fields(AlignmentConfig, {"weight": 1, "other": 2}) == {"weight": 1, "other": 2}
    assert check_fields(AdapterConfig, {"norms": "Yes", "train_head": "off"}) == {"norms": True, "train_head": False}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("seeds: [0, one]\n", "seeds must be a list, each of it an integer, got"),
        ("title: 5\n", "title must be a string, got 5"),
        ("alignment: '1'\n", "alignment must be a number, got '1'"),
        ("settings: {learning_rate: fast}\n", "settings: learning_rate must be a number, got 'fast'"),
        ("examples_settings: {all: {norms: 3}}\n", "settings: norms must be true or false, got 3"),
        ("method_settings: {frozen: [1]}\n", "method_settings must be names and values, each of them names"),
        ("also: {mlqa: x}\n", "also must be names and values"),
    ],
)
def test_a_study(tmp_path, more, message):
    file = tmp_path / "study.yaml"
    file.write_text(STUDY)
    assert list(read_study(file, study="scarcity").parallel) == ["no", "sv"]
    file.write_text(STUDY + more)
    with pytest.raises(ValueError, match=rf"study.yaml: {message}"):
        read_study(file, study="scarcity")
