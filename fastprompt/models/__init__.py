"""Packing, injection into transformers' models, and interchange with PEFT."""

from fastprompt._extras import require

require("transformers", "train")

from .config import PromptConfig  # noqa: E402
from .fuse import fuse  # noqa: E402
from .packed import PromptInputs  # noqa: E402
from .prompt_model import PromptModel  # noqa: E402

__all__ = ["PromptConfig", "PromptInputs", "PromptModel", "fuse"]
