"""A small backbone, a cache of its own for each test, and a Trainer without what takes long and no test looks at."""

import functools
import gc
import multiprocessing
import os

import pytest
import torch
from helpers import save_backbone

from fastprompt.models import checkpoint
from fastprompt.training import trainer


@pytest.fixture(scope="session")
def backbone(tmp_path_factory) -> str:
    return str(save_backbone("bert", tmp_path_factory.mktemp("backbone"), num_hidden_layers=2))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTPROMPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "training"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda *_: 0)  # accelerate does, before each run
    monkeypatch.setattr(trainer, "draw_curves", lambda *_: None)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(checkpoint, "_base_shapes", functools.cache(checkpoint._base_shapes))


@pytest.fixture(scope="session")
def processes():
    """Starts others: a forked one has all modules at once, but no CUDA."""
    return multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
