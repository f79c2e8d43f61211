"""Adapting a backbone to a language by aligning its sentences with English, and scoring what was learned."""

from fastprompt._extras import require

require("transformers", "train")

from .collator import PackingCollator  # noqa: E402
from .config import TrainingConfig  # noqa: E402
from .evaluation import evaluate  # noqa: E402
from .loop import train  # noqa: E402
from .sampler import TokenBudgetSampler  # noqa: E402

__all__ = ["PackingCollator", "TokenBudgetSampler", "TrainingConfig", "evaluate", "train"]
