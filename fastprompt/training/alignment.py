"""The alignment: a second stream of parallel sentences beside a task's examples, or the only one."""

from dataclasses import dataclass

from fastprompt._settings import check_fields, setting
from fastprompt.nn import AlignmentLoss

FORMS = ("sentence", "task")
SCHEDULES = ("constant", "linear")


@dataclass(frozen=True)
class AlignmentConfig:
    """How the vector of a sentence is drawn to the one that the frozen backbone gives its English translation.

    Attributes:
        weight: weight of the alignment loss beside the task's. Without a task there is nothing else, and it is 1.
        schedule: whether the weight stays "constant" or falls on a line to 0, "linear".
        form: "sentence" makes an input of each translation, as its English sentence was one for the teacher. "task"
            puts the sentences where the task has its two texts, each in either language by chance, and draws the
            tokens of each to its teacher's vector.
        layer: align the hidden states after this many layers; None aligns the last. A causal model's last states are
            about the next word, those in the middle about the sentence. A few features are there some hundred times as
            large as the others: student and teacher are both brought to the teacher's mean and deviation, feature by
            feature, and the mean of a sentence's states leaves out the first of all. (Ours.)
        warmup_steps: how many steps of the alignment alone come before the task's.
        batch_size: pairs of a step beside a task's examples, on all processes together. Without a task
            `per_device_train_batch_size` counts the pairs.
        distance: "cosine", "mse", "smooth_l1", "infonce", or several joined by "+": see
            `fastprompt.ops.alignment_loss`.
        temperature: temperature of "infonce".

    Example:
        >>> alignment = AlignmentConfig(weight=0.5, schedule="linear", distance="cosine")

    Raises:
        ValueError: a value of another type or outside its range.
    """

    weight: float = setting(1.0, "Weight of the alignment loss beside the task's.")
    schedule: str = setting("constant", "The weight stays, or falls on a line to 0.", choices=SCHEDULES)
    form: str = setting("sentence", "A sentence is an input, or stands in one of the task's form.", choices=FORMS)
    layer: int | None = setting(None, "Align what comes out of so many layers. Default: of the last one.")
    warmup_steps: int = setting(0, "Steps of alignment alone, before those of the task.")
    batch_size: int = setting(16, "Pairs of a step beside a task's examples.")
    distance: str = setting("infonce+cosine", "cosine, mse, smooth_l1, infonce, or several joined by +.")
    temperature: float = setting(0.05, "Temperature of infonce.")

    def __post_init__(self) -> None:
        check_fields(AlignmentConfig, vars(self))
        for name, allowed in (("schedule", SCHEDULES), ("form", FORMS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"alignment {name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name, least in (("batch_size", 1), ("warmup_steps", 0), ("layer", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"alignment {name} must be an integer, {least} or more, got {value!r}")
        for name in ("weight", "temperature"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"alignment {name} must be a finite number, 0 or more, got {value!r}")
        AlignmentLoss(1, 1, distance=self.distance, temperature=self.temperature)
