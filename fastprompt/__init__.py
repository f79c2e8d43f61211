"""fastprompt: fused kernels for soft-prompt and prefix tuning of frozen language models."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["PromptConfig", "PromptModel", "fuse", "nn", "ops"]

try:
    __version__ = version("fastprompt")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str):
    # `fastprompt.models` needs transformers, `fastprompt.ops` needs torch alone: import what is asked for.
    import importlib

    if name in ("PromptConfig", "PromptModel", "fuse"):
        return getattr(importlib.import_module("fastprompt.models"), name)
    if name in ("nn", "ops", "models", "training", "tasks"):
        return importlib.import_module(f"fastprompt.{name}")
    raise AttributeError(f"module 'fastprompt' has no attribute {name!r}")
