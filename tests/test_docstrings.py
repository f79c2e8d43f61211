"""The examples in docstrings give what they say, where they need neither a model nor a file."""

import doctest
import inspect

import numpy
import pytest

from fastprompt import AdapterConfig, AlignmentConfig, InputConfig, TrainingArguments, tasks
from fastprompt.data import iter_rows, read_examples
from fastprompt.inference import Index
from fastprompt.tasks import Classification, Generation, Qa, Tagging
from fastprompt.training import PackingCollator

CONFIGS = [AdapterConfig, AlignmentConfig, InputConfig, TrainingArguments]
OTHERS = [Classification, Generation, Index, PackingCollator, Qa, Tagging, iter_rows, read_examples, tasks.get]


@pytest.mark.parametrize("documented", [*CONFIGS, *OTHERS], ids=lambda each: each.__name__)
def test_examples(documented, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = vars(inspect.getmodule(documented)) | {"np": numpy, "tasks": tasks}
    test = doctest.DocTestParser().get_doctest(documented.__doc__, dict(names), documented.__name__, None, None)
    assert test.examples and not doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed
