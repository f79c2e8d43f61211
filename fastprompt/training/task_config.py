"""TaskConfig: all that decides the result of training on a task, its data aside."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastprompt._settings import check_fields
from fastprompt.models import PromptConfig
from fastprompt.models.methods import METHODS
from fastprompt.nn import AlignmentLoss
from fastprompt.tasks.data import TASKS

from .config import prompt_config
from .encoding import POOLINGS

RETRIEVAL = "retrieval"  # no labels: examples are pairs, and train the alignment alone
FORMS = ("sentence", "task")
SCHEDULES = ("constant", "linear")


@dataclass(frozen=True)
class TaskConfig:
    """Checked when made; what depends on the backbone and the data is checked by `train_task`.

    Attributes:
        task: "pawsx", "xquad", "mlqa" or "retrieval", whose examples are the pairs of the alignment.
        method, lora_rank, norms, top_layers: what trains, as of `fastprompt.models.methods.AdaptedBackbone`.
        train_head: whether the head trains; without, it is what it began as.
        num_virtual_tokens, layers, adapter_size, position_offset: as in `fastprompt.PromptConfig`.
        init_text: as in `TrainingConfig`.
        num_layers: use the backbone's first layers only, that many. None: all.
        pooling: a sentence's vector, for the alignment and for classification: "mean", "first" or "last".
        prefix_text: put before each input.
        max_length, stride: tokens of an input, and those that windows of a long context share.
        examples: labelled examples to train on, drawn from those given. None: all.
        alignment: weight of the alignment loss beside the task's; 0 for none.
        alignment_schedule: that weight is "constant" or falls on a line to 0 ("linear").
        alignment_form: each "sentence" of a pair is an input, as its partner was for the teacher; or in the form of the
            "task": sentences stand where the task has its two texts, each in either language by chance, and the rows
            of each are drawn to its teacher's vector. For span answers: one sentence is the question, and some, that
            one among them, are the context.
        alignment_layer: align what comes out of so many layers; None: of the last. A causal model's last states are
            about the next word, those in the middle about the sentence. A few features are there some hundred times as
            large as the others: student and teacher are both brought to the teacher's mean and deviation, feature by
            feature, and the mean of a sentence's rows leaves out the first of all. (Ours.)
        alignment_first: steps at the beginning in which there is the alignment loss alone, added to `steps`.
        alignment_batch_size: pairs of a step.
        distance, temperature: of the alignment loss, as in `fastprompt.ops.alignment_loss`.
        steps, batch_size: of training on the task. Learning rates rise over the first tenth and fall to 0 at the end.
        lr: learning rate of the prompt (AdamW, as all).
        weights_lr: of all else that trains in the backbone: LoRA, adapters, norms, layers.
        head_lr, projection_lr: of the head and of the alignment's projection.
        evaluate_every: steps between evaluations on the validation examples; the best one's weights are kept.
        patience: stop after that many evaluations without a better one. None: never.
        seed: of what begins at random, the examples drawn and their order.
    """

    task: str = "pawsx"
    method: str = "prefix"
    num_virtual_tokens: int = 16
    layers: Sequence[int] | None = None
    adapter_size: int | None = None
    position_offset: str = "peft"
    init_text: str | None = None
    lora_rank: int = 8
    norms: bool = False
    top_layers: int = 0
    train_head: bool = True
    num_layers: int | None = None
    pooling: str = "mean"
    prefix_text: str = ""
    max_length: int = 384
    stride: int = 128
    examples: int | None = None
    alignment: float = 0.0
    alignment_form: str = "sentence"
    alignment_schedule: str = "constant"
    alignment_layer: int | None = None
    alignment_first: int = 0
    alignment_batch_size: int = 16
    distance: str = "infonce+cosine"
    temperature: float = 0.05
    steps: int = 200
    batch_size: int = 16
    lr: float = 1e-2
    weights_lr: float = 1e-3
    head_lr: float = 1e-3
    projection_lr: float = 1e-4
    evaluate_every: int = 50
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(TaskConfig, vars(self))
        for name, allowed in (
            ("task", (*TASKS, RETRIEVAL)),
            ("method", METHODS),
            ("pooling", POOLINGS),
            ("alignment_form", FORMS),
            ("alignment_schedule", SCHEDULES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        optional = ("examples", "patience", "num_layers", "alignment_layer")
        positive = ("max_length", "batch_size", "alignment_batch_size", "steps", "evaluate_every", "lora_rank")
        for name, least in (*((name, 1) for name in optional + positive), ("alignment_first", 0), ("top_layers", 0)):
            value = getattr(self, name)
            if not (name in optional and value is None) and (type(value) is not int or value < least):
                raise ValueError(f"{name} must be an integer, {least} or more, got {value!r}")
        for name in ("alignment", "temperature", "lr", "weights_lr", "head_lr", "projection_lr"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number, 0 or more, got {value!r}")
        if self.adapter_size is not None and self.method not in ("prompt", "prefix"):
            raise ValueError(f"adapter_size is for methods 'prompt' and 'prefix', got it with {self.method!r}")
        if self.task == RETRIEVAL and not self.alignment:
            raise ValueError(f"alignment must be above 0 for retrieval, got {self.alignment}")
        if self.task == RETRIEVAL and self.alignment_layer is not None:
            raise ValueError(f"alignment_layer must be None for retrieval, got {self.alignment_layer}")
        if self.alignment_form == "task" and self.task == "pawsx" and self.alignment_batch_size < 2:
            raise ValueError("alignment_batch_size must be 2 or more for pawsx with alignment_form 'task', got 1")
        if self.alignment_first and not self.alignment:
            raise ValueError(f"alignment_first needs an alignment above 0, got {self.alignment_first} and 0")
        AlignmentLoss(1, 1, distance=self.distance, temperature=self.temperature)
        self.prompt()

    def prompt(self, tokenizer: Callable | None = None) -> PromptConfig | None:
        """What the prompt is made of, where the method has one; the text it begins with needs the tokenizer."""
        if self.method not in ("prompt", "prefix"):
            return None
        return prompt_config(self, self.method, tokenizer, adapter_size=self.adapter_size)
