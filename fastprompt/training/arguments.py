"""TrainingArguments: transformers' own, with the defaults that prompts need, and what is ours on top."""

import json
import logging
import os
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import transformers

from fastprompt._settings import setting
from fastprompt.data.reading import check_count

LOG = logging.getLogger("fastprompt")
# What decides the result of a run, beside the number of its steps.
_DECIDING = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_tokens", "num_train_epochs", "max_steps"),
    *("learning_rate", "weights_learning_rate", "head_learning_rate", "projection_learning_rate", "warmup_steps"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("weight_decay", "max_grad_norm", "bf16", "fp16", "seed", "cache_layers", "early_stopping_patience"),
)
# Of transformers' arguments those that this Trainer would leave out without a word.
_NOT_HERE = (
    *("label_smoothing_factor", "neftune_noise_alpha", "auto_find_batch_size", "dataloader_drop_last", "deepspeed"),
    *("save_only_model", "parallelism_config", "push_to_hub", "train_sampling_strategy", "data_seed", "fsdp"),
    *("ignore_data_skip", "bf16_full_eval", "fp16_full_eval", "use_liger_kernel", "include_num_input_tokens_seen"),
)


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """The course of a training: transformers' `TrainingArguments` with other defaults and some fields of our own.

    All of transformers' names mean the same here. By default learning rates rise over the first tenth of the steps and
    fall on a line to 0, gradients are not clipped, and weights do not decay. There is an evaluation and a checkpoint
    after each epoch; with `max_steps` after each fifth of the steps, and with `eval_steps` after as many steps. Where
    the best is kept at the end, as it is unless told otherwise, there is a checkpoint at each evaluation, whatever
    `save_steps` says.

    Attributes:
        learning_rate: of the prompt or prefix, which wants a larger one than weights do.
        weights_learning_rate: of what else trains in the backbone: LoRA, adapters, norms, layers, or all of it.
        head_learning_rate: of a task's head.
        projection_learning_rate: of the alignment's projection.
        warmup_ratio: share of the steps over which learning rates rise; it is not read where `warmup_steps` is given.
        max_tokens: the most tokens of a step on a device, a prompt's own rows included, instead of
            `per_device_train_batch_size`: each step has as many examples as that holds (`TokenBudgetSampler`).
        static_shapes: fill every batch up to one of a few shapes, so that a step on a GPU can be a CUDA graph.
        cache_layers: compute the layers below the first one with a prefix once, keep their output on disk, and leave
            them out of every step. Results are the same up to rounding.
        early_stopping_patience: stop after this many evaluations without a better one; None never stops early.

    Example:
        >>> args = TrainingArguments("run", num_train_epochs=3, learning_rate=5e-3, early_stopping_patience=2)

    Raises:
        ValueError: a value outside its range, or what transformers refuses.
    """

    per_device_train_batch_size: int = setting(16, "Examples, or pairs, of a step on a device.", basic=True)
    per_device_eval_batch_size: int = setting(32, "Examples of a pass without training.")
    num_train_epochs: float = setting(5.0, "Passes over the examples.", basic=True)
    max_steps: int = setting(-1, "Steps, instead of epochs.", basic=True)
    learning_rate: float = setting(1e-2, "Learning rate of the prompt.", basic=True)
    weights_learning_rate: float = setting(1e-3, "Learning rate of weights that train in the backbone.")
    head_learning_rate: float = setting(1e-3, "Learning rate of a task's head.")
    projection_learning_rate: float = setting(1e-4, "Learning rate of the alignment's projection.")
    warmup_ratio: float = setting(0.1, "Share of the steps over which learning rates rise.")
    weight_decay: float = setting(0.0, "Weight decay of AdamW.")
    lr_scheduler_type: str = setting("linear", "How learning rates go on from there: linear, cosine, constant, ...")
    gradient_accumulation_steps: int = setting(1, "Batches whose gradients make one step.")
    eval_steps: float | None = setting(None, "Steps between evaluations; below 1, a share of all steps.")
    save_steps: float = setting(500, "Steps between checkpoints; below 1, a share of all steps.")
    bf16: bool = setting(False, "Compute in bfloat16 where that is safe, by autocast.")
    gradient_checkpointing: bool | None = setting(None, "Compute activations twice, to keep fewer of them.")
    seed: int = setting(42, "Seed of all that is random.")
    dataloader_num_workers: int = setting(0, "Processes that make batches ready.")
    max_grad_norm: float = setting(0.0, "Clip gradients to that norm; 0: never.")
    max_tokens: int | None = setting(None, "Instead of a batch size: tokens of a step on a device.")
    static_shapes: bool = setting(False, "Fill batches up to a few shapes, for CUDA graphs.")
    cache_layers: bool = setting(False, "Compute the layers below the first prefix once, and keep that on disk.")
    early_stopping_patience: int | None = setting(None, "Evaluations without a better one to stop after.")
    logging_nan_inf_filter: bool = setting(False, "Hide losses that are no number; here they are an error.")
    remove_unused_columns: bool = setting(False, "Not read here.")
    save_total_limit: int | None = setting(2, "Checkpoints to keep: the last and the best.")
    report_to: str | None = setting("none", "Where metrics go, too: tensorboard, wandb, ...")
    eval_strategy: str = setting("epoch", "When to evaluate: no, epoch or steps.", choices=("no", "epoch", "steps"))
    save_strategy: str = setting("epoch", "When to keep a checkpoint: no, epoch, steps or best.")
    load_best_model_at_end: bool = setting(True, "End with the best that an evaluation found, not with the last.")
    restore_callback_states_from_checkpoint: bool = setting(True, "Go on with the patience that is left.")
    logging_steps: float = setting(10, "Steps between two lines of the log.")

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weights_learning_rate", "head_learning_rate", "projection_learning_rate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number, 0 or more, got {value!r}")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            check_count(name, getattr(self, name))
        for name in ("max_tokens", "early_stopping_patience"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if type(self.max_steps) is not int or (self.max_steps < 1 and self.max_steps != -1):
            raise ValueError(f"max_steps must be a positive integer, or -1 for epochs, got {self.max_steps!r}")
        if not 0 < self.num_train_epochs < float("inf"):
            raise ValueError(f"num_train_epochs must be a number above 0, got {self.num_train_epochs!r}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must be in [0, 1), got {self.warmup_ratio!r}")
        if not self.warmup_steps:
            self.warmup_steps = self.warmup_ratio  # below 1 it is a share for transformers, too
        # A few steps, or as many as are said, may be a small part of an epoch, or many epochs.
        told = self.save_strategy == "steps" and self.load_best_model_at_end  # which must evaluate where it saves
        told |= self.save_strategy == "epoch" and self.save_steps != type(self).save_steps
        some = self.save_strategy == "epoch" and (self.eval_steps or self.max_steps > 0)
        if self.eval_strategy == "epoch" and (told or some):
            self.eval_strategy = self.save_strategy = "steps"
            self.eval_steps = self.eval_steps or (self.save_steps if told else -(-self.max_steps // 5))
            self.save_steps = self.save_steps if told else self.eval_steps
        if self.load_best_model_at_end and self.eval_strategy != "no" and self.save_strategy in ("epoch", "steps"):
            if self.save_strategy != self.eval_strategy:
                self.save_strategy = self.eval_strategy  # the best evaluation of all has a checkpoint
            if self.eval_strategy == "steps":
                self.eval_steps = self.eval_steps or (-(-self.max_steps // 5) if self.max_steps > 0 else None)
                self.eval_steps = self.save_steps = self.eval_steps or self.logging_steps
        self._check_known()
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # or transformers has no bf16 there
        if "no" in (self.eval_strategy, self.save_strategy):
            self.load_best_model_at_end = False  # there is none
        super().__post_init__()
        if self.n_gpu > 1:
            LOG.warning("one of %d GPUs is used: torchrun, or accelerate launch, use them all", self.n_gpu)
            self._n_gpu = 1  # transformers' other way to use them makes copies of the model in each step

    def _check_known(self) -> None:
        """Raise a ValueError for what transformers' Trainer does, and this one does not."""
        usual = {each.name: each.default for each in fields(transformers.TrainingArguments)}
        for name in _NOT_HERE:
            value = getattr(self, name)
            if value and value != usual[name]:
                raise ValueError(f"{name} must be {usual[name]!r}, nothing else is done here, got {value!r}")
        for name in ("FSDP", "DEEPSPEED", "PARALLELISM_CONFIG"):  # as `accelerate launch` says it
            if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true", "yes", "on"):
                raise ValueError(
                    f"ACCELERATE_USE_{name} must not be set: each process holds all of the frozen backbone here; "
                    "train by torchrun, or accelerate launch --multi_gpu"
                )

    def deciding(self) -> dict[str, Any]:
        """The arguments that decide the result of a run, as values of JSON."""
        found = {name: getattr(self, name) for name in _DECIDING} | {"world_size": self.world_size}
        return json.loads(json.dumps(found, default=str))

    def for_metric(self, metric: str | None) -> "TrainingArguments":
        """These arguments for a run whose evaluations give that metric; None stands for a run without evaluations."""
        if metric is None:
            return replace(self, eval_strategy="no")
        if not self.load_best_model_at_end and self.early_stopping_patience is None:
            return self
        given = self.metric_for_best_model
        if given not in (None, "loss") and self.greater_is_better is False:
            raise ValueError("greater_is_better must be True or None, as for all scores here, got False")
        metric = metric if given in (None, "loss") else given
        return replace(self, metric_for_best_model=metric, greater_is_better=True)
