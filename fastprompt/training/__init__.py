"""Training: transformers' Trainer for prompts, tasks and the alignment, and what its steps are made of."""

from fastprompt._extras import require

require("transformers", "train")
require("accelerate", "train")

from .alignment import AlignmentConfig  # noqa: E402
from .arguments import TrainingArguments  # noqa: E402
from .collator import PackingCollator  # noqa: E402
from .learner import Learner  # noqa: E402
from .run import RunInfo, load_learner, read_run  # noqa: E402
from .sampler import TokenBudgetSampler  # noqa: E402
from .trainer import Trainer  # noqa: E402

__all__ = [
    "AlignmentConfig",
    "Learner",
    "PackingCollator",
    "RunInfo",
    "TokenBudgetSampler",
    "Trainer",
    "TrainingArguments",
    "load_learner",
    "read_run",
]
