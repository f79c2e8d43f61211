"""fastprompt: fused kernels for soft-prompt and prefix tuning of frozen language models."""

import importlib

from ._version import __version__ as __version__

# Where each name stands. It is imported when it is asked for: `fastprompt.models` needs transformers, `fastprompt.ops`
# torch alone.
_HOMES = {
    "AdapterConfig": "models.methods",
    "AlignmentConfig": "training",
    "InputConfig": "tasks.base",
    "PromptConfig": "models",
    "PromptModel": "models",
    "Trainer": "training",
    "TrainingArguments": "training",
    "fuse": "models",
    "load": "inference",
}
_MODULES = ("data", "export", "models", "nn", "ops", "tasks", "training")
__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"fastprompt.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"fastprompt.{name}")
    raise AttributeError(f"module 'fastprompt' has no attribute {name!r}")
