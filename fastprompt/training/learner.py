"""Learner: everything that trains in a run: an adapted backbone, a task's head, and the alignment's projection."""

import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastprompt._files import read_tensors, write_tensors
from fastprompt.models.generation import evaluating, generate
from fastprompt.models.methods import AdaptedBackbone, AdapterConfig, keep_layers
from fastprompt.nn import AlignmentLoss
from fastprompt.nn.pooling import pool
from fastprompt.tasks.base import InputConfig, Item, Segments, Task, was_cut

from .alignment import AlignmentConfig
from .arguments import TrainingArguments
from .batch import Batch, Collator
from .teacher import encode, plain

TRAINED = "trained.safetensors"
RETRIEVAL = "retrieval"  # the task for which nothing but the alignment trains


class Learner(nn.Module):
    """All that trains in a run.

    Args:
        backbone: a base model, or a model with its language-model head; changed in place.
        tokenizer: transformers' tokenizer for it.
        adapter: what of the backbone trains.
        inputs: how text becomes an input.
        task: fitted to its examples; it is built here. None: there is the alignment alone.
        alignment: None: there is none.

    Attributes:
        adapted: the adapted backbone.
        alignment: the loss with its projection, or None.
        model: what a task predicts with: see `fastprompt.tasks.base.Model`.

    Raises:
        ValueError: a setting that does not fit the backbone.
    """

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: Callable,
        adapter: AdapterConfig,
        inputs: InputConfig,
        task: Task | None = None,
        alignment: AlignmentConfig | None = None,
    ) -> None:
        super().__init__()
        self._mode, self._optimized = None, None
        base = backbone.base_model
        device, width = next(base.parameters()).device, base.config.get_text_config().hidden_size
        if adapter.num_layers is not None:
            keep_layers(base, adapter.num_layers)
        self.tokenizer, self.inputs, self.adapter = tokenizer, inputs, adapter
        self._backbone = (backbone,)  # no submodule: its head is a constant, and is not saved
        self.adapted = AdaptedBackbone(backbone, adapter, tokenizer)
        room = self.adapted.text_positions
        if room is not None and inputs.max_length > room:
            raise ValueError(
                f"max_length must be at most {room}, what the position table has room for beside the prompt, "
                f"got {inputs.max_length}"
            )
        least = len(tokenizer(inputs.prefix_text)["input_ids"])
        if inputs.max_length <= least:
            beside = f"{least}, the special tokens and those of prefix_text"
            raise ValueError(f"max_length must be above {beside}, got {inputs.max_length}")
        self.alignment, self.alignment_config, self.mean, self.deviation = None, alignment, None, None
        if alignment is not None:
            if alignment.layer is not None and alignment.layer > len(self.adapted.layers):
                raise ValueError(
                    f"alignment layer must be at most {len(self.adapted.layers)}, the backbone's layers, "
                    f"got {alignment.layer}"
                )
            for name, only in (("form", "sentence"), ("schedule", "constant"), ("warmup_steps", 0), ("weight", 1.0)):
                value = getattr(alignment, name)
                if (task is None or task.name == RETRIEVAL) and value != only:
                    raise ValueError(f"alignment {name} must be {only!r} with nothing beside it, got {value!r}")
            options = {"distance": alignment.distance, "temperature": alignment.temperature}
            self.alignment = AlignmentLoss(width, width, gather=True, **options)
        self.task = task
        if task is not None:
            task.build(backbone, tokenizer, inputs)
            self._check_task(task)
            task.requires_grad_(adapter.train_head)
        self.collate = Collator(getattr(base.config, "type_vocab_size", 0) > 1)
        self.to(device)
        self.eval()

    def _check_task(self, task: Task) -> None:
        alignment = self.alignment_config
        if alignment is not None and alignment.form == "task":
            try:
                task.align([], [], random.Random())
            except NotImplementedError as error:
                what = f"alignment form must be 'sentence' for the task {task.name!r}, which has no other, got 'task'"
                raise ValueError(what) from error
        if alignment is not None and task.own_pass:
            raise ValueError(f"alignment must be None for {task.name!r} with an encoder-decoder, got {alignment}")
        head = next(task.parameters(), None)
        if not self.adapter.train_head and head is not None and not head.any():
            raise ValueError(f"train_head must be True for {task.name!r}, whose head begins at 0, got False")

    @property
    def backbone(self) -> nn.Module:
        """The backbone as it was given, with its head if it has one."""
        return self._backbone[0]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def model(self) -> "AdaptedModel":
        return AdaptedModel(self)

    def train(self, mode: bool = True) -> "Learner":
        """Stay in evaluation mode, but for gradient checkpointing.

        The backbone's dropout would only blur a few hundred examples. Gradient checkpointing reads the mode of the
        layers, and not of what is in them: theirs alone is set. A Trainer calls this before each step; the same mode
        once more costs nothing.
        """
        if self._mode == mode:
            return self
        self._mode = mode
        super().train(False)
        for layer in self.adapted.layers:
            layer.training = mode and getattr(layer, "gradient_checkpointing", False)
        return self

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **more) -> None:
        """Have the backbone compute activations twice, by default in the way that sees prefixes (not reentrant)."""
        kwargs = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
        self._mode = None
        if hasattr(self.backbone, "activation_checkpointing_enable"):
            self.backbone.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs, **more)
        else:
            self.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """The same, under the name that transformers' Trainer calls it by."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def trained(self) -> dict[str, nn.Parameter]:
        """What trains, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def groups(self, args: TrainingArguments) -> list[dict]:
        """What trains, for an optimizer, at the learning rate of its kind.

        Raises:
            ValueError: nothing does.
        """
        heads = [] if self.task is None else [p for p in self.task.parameters() if p.requires_grad]
        kinds = (
            ([p for p in self.adapted.prompt_parameters() if p.requires_grad], args.learning_rate),
            (self.adapted.weights(), args.weights_learning_rate),
            (heads, args.head_learning_rate),
            ([] if self.alignment is None else [*self.alignment.parameters()], args.projection_learning_rate),
        )
        groups = [{"params": found, "lr": rate, "weight_decay": args.weight_decay} for found, rate in kinds if found]
        self._optimized = [parameter for group in groups for parameter in group["params"]]
        if not groups:
            raise ValueError(
                f"nothing trains with method {self.adapter.method!r} and train_head {self.adapter.train_head}"
            )
        return groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Once `groups` were made, clear the gradients of these alone: the frozen backbone has many parameters."""
        if self._optimized is None or not set_to_none:
            return super().zero_grad(set_to_none)
        for parameter in self._optimized:
            parameter.grad = None

    def standardized(self, teacher: Tensor) -> Tensor:
        """The teacher's vectors (N, D) at mean 0 and deviation 1 of each feature.

        Mean and deviation are kept: student vectors are brought to the same scale by them.
        """
        deviation, mean = torch.std_mean(teacher, 0, correction=0)
        deviation = torch.where(deviation > 0, deviation, 1)
        self.mean, self.deviation = mean.to(self.device), deviation.to(self.device)
        return (teacher - mean) / deviation

    # -- training -------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The "loss" of a batch, and its parts "task" and "alignment", where there are such.

        Each is divided by the count of what there is on all processes, and multiplied by the number of processes: the
        mean over the processes, which their gradients are averaged to, is the loss of one process with the whole batch.
        """
        losses: dict[str, Tensor] = {}
        if self.task is not None and self.task.own_pass:
            losses["task"] = self.task.loss_alone(self.model, batch.items) * batch.share
        else:
            segments, middle = self.run(batch)
            if batch.items:
                count = len(batch.items)
                own = Segments(segments.hidden, segments.cu_seqlens[: count + 1], segments.bounds[: count + 1])
                losses["task"] = self.task.loss(own, batch.items) * batch.share
            if batch.parts is not None:
                losses["alignment"] = self._alignment_loss(middle.hidden, batch)
        weights = {"alignment": batch.weight}
        loss = sum(part if weights.get(name, 1.0) == 1.0 else part * weights[name] for name, part in losses.items())
        return {"loss": loss} | losses

    def run(self, batch: Batch) -> tuple[Segments, Segments]:
        """The last hidden states of a batch's inputs, and those that are aligned."""
        layer = None if batch.parts is None or self.alignment_config is None else self.alignment_config.layer
        found = self.adapted(layer=layer, lower_states=batch.states, **batch.inputs)
        last, middle = found if layer is not None else (found, found)
        bounds = batch.bounds
        cu_seqlens = batch.inputs["cu_seq_lens_q"][: len(bounds)]
        return Segments(last.squeeze(0), cu_seqlens, bounds), Segments(middle.squeeze(0), cu_seqlens, bounds)

    def _alignment_loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        rows, cu_seqlens = batch.parts
        student = pool(hidden[rows], self.inputs.pooling, cu_seqlens=cu_seqlens)
        if self.mean is not None:
            student = (student - self.mean) / self.deviation
        return self.alignment(student, batch.teacher.to(student.dtype), batch.row_weight)

    # -- use ------------------------------------------------------------------------------------------------------

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text with the prefix text before it, cut to max_length."""
        longest = self.inputs.max_length
        texts = [self.inputs.prefix_text + text for text in texts]
        encoded = self.tokenizer(texts, truncation=True, max_length=longest)
        ids, cut = encoded["input_ids"], sum(was_cut(encoded, n) for n in range(len(texts)))
        if cut:
            text = "%d of %d sentences have more than max_length %d tokens, and are cut"
            logging.getLogger("fastprompt").warning(text, cut, len(texts), longest)
        for text, tokens in zip(texts, ids, strict=True):
            if not tokens:
                raise ValueError(f"texts must have at least one token each, got none for {text!r}")
        return ids

    @torch.no_grad()
    def vectors(self, texts: Sequence[str], *, source: bool = False, batch_size: int = 32) -> Tensor:
        """(N, D) float32 vectors, on the CPU: those of translations, adapted and projected, are comparable with those
        of English texts.

        Args:
            texts: one or more.
            source: they are English: the frozen backbone's own vectors.
            batch_size: texts of a pass.

        Raises:
            ValueError: a text without a token, or `source` where the frozen backbone's own weights changed.
        """
        ids, options = self.tokenize(texts), {"pooling": self.inputs.pooling, "device": self.device}
        options["batch_size"] = batch_size
        if not source:
            found = encode(self.adapted.output, ids, **options)
            if self.alignment is not None:
                found = self.alignment.project(found.to(self.device, self.alignment.weight.dtype))
            return found.float().cpu()
        if any(parameter.requires_grad for parameter in self.backbone.base_model.parameters()):
            raise ValueError(
                "source must be False for a run that trained weights of the backbone, which made the English vectors: "
                "encode English texts by the backbone as it came"
            )
        return encode(plain(self.backbone.base_model), ids, **options).float()

    @torch.no_grad()
    def predict(
        self, examples: Sequence, batch_size: int = 32, on_batch: Callable[[int], None] | None = None
    ) -> list[dict]:
        """A prediction of each example: see `Task.predict`."""
        if self.task is None:
            raise ValueError("predict needs a task, and this run has none: it aligned a language; use encode")
        with evaluating(self):
            return self.task.predict(self.model, examples, batch_size, on_batch)

    # -- files ----------------------------------------------------------------------------------------------------

    def _kept(self) -> dict[str, nn.Parameter]:
        """What trained, and a task's head in any case: where it did not train, it may have begun at random."""
        heads = {} if self.task is None else {f"task.{name}": each for name, each in self.task.named_parameters()}
        return self.trained() | heads

    def save(self, folder: Path) -> None:
        """Write what trained; of a prompt PEFT's files as well."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: parameter.detach() for name, parameter in self._kept().items()}
        if self.mean is not None:
            tensors |= {"mean": self.mean, "deviation": self.deviation}
        write_tensors(folder / TRAINED, tensors)
        if self.adapted.prompted is not None:
            self.adapted.prompted.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: it is not there, is damaged, or of another configuration or backbone.
        """
        file = folder / TRAINED
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no {TRAINED}")
        tensors = read_tensors(file).tensors
        found = {name: tensors.pop(name, None) for name in ("mean", "deviation")}
        expected, got = ({n: tuple(t.shape) for n, t in each.items()} for each in (self._kept(), tensors))
        if got != expected:
            wrong = sorted(expected.items() ^ got.items())
            raise ValueError(f"{file} does not fit the backbone and configuration: {wrong[:4]} in one of them only")
        self.load_state_dict(tensors, strict=False)
        if found["mean"] is not None:
            self.mean, self.deviation = (found[name].to(self.device) for name in ("mean", "deviation"))


class AdaptedModel:
    """What a task predicts with; see `fastprompt.tasks.base.Model`."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.tokenize, self.vectors = learner.tokenize, learner.vectors

    def __call__(self, items: Sequence[Item]) -> Segments:
        return self.learner.run(self.learner.collate(items).to(self.learner.device))[0]

    def generate(self, **inputs) -> Tensor:
        adapted, backbone, inputs = self.learner.adapted, self.learner.backbone, self._moved(inputs)
        with torch.no_grad(), evaluating(self.learner):
            if adapted.prompted is None:
                return backbone.generate(**inputs)
            return generate(backbone, adapted.prompted.prompt_inputs(), **inputs)

    def forward(self, **inputs):
        return self.learner.adapted.output(**self._moved(inputs))

    def _moved(self, inputs: dict) -> dict:
        device = self.learner.device
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
