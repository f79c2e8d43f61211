"""Tasks by their names."""

import json
import subprocess
import sys

import pytest

from fastprompt import tasks
from fastprompt.tasks.base import Task

MADE = {
    "classification": {"labels": ["a", "b"]},
    "tagging": {"tags": ["O", "B-X"]},
    "qa": {},
    "generation": {},
    "retrieval": {},
    "xquad": {},
    "mlqa": {},
    "pawsx": {"answers": "head"},
}


@pytest.mark.parametrize("name", tasks.NAMES)
def test_a_task_is_what_its_settings_make_again(name):
    task = tasks.get(name, **MADE[name])
    settings = task.settings()
    again = tasks.get(task.name, **json.loads(json.dumps(settings)))
    assert isinstance(task, Task) and type(again) is type(task) is tasks.task_class(name)
    assert task.name == name and again.settings() == settings and MADE[name].items() <= settings.items()
    named = {*task.labels, *task.optional} - {"id"}
    assert named <= set(task.columns) and isinstance(task.metric, str)


def test_presets():
    assert tasks.get("pawsx").settings()["labels"] == ["0", "1"]
    assert tasks.get("mlqa").settings()["metrics"] == "mlqa"


def test_unknown_names():
    with pytest.raises(ValueError, match="task must be one of classification, tagging, qa, .*pawsx, got 'squad'"):
        tasks.get("squad")
    with pytest.raises(ValueError, match="task 'tagging' has no setting 'labels', only tags"):
        tasks.get("tagging", labels=["O"])
    with pytest.raises(ValueError, match="task 'xquad' has no setting 'names', only metrics"):
        tasks.get("xquad", names="qa")
    with pytest.raises(AttributeError, match="module 'fastprompt.tasks' has no attribute 'Squad'"):
        tasks.Squad  # noqa: B018


def test_nothing_is_imported_before_it_is_asked_for():
    code = "import sys, fastprompt.tasks; assert not {'torch', 'transformers'} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert tasks.Classification.name == "classification" and tasks.Task is Task
