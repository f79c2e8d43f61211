"""Trainer: transformers' own, for prompts, tasks and the alignment."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader
from transformers.trainer import TRAINER_STATE_NAME

from fastprompt import tasks
from fastprompt._card import CARD, card
from fastprompt._files import write_text
from fastprompt.models.load import load_backbone
from fastprompt.models.methods import AdapterConfig, keep_layers
from fastprompt.tasks.base import InputConfig, Task
from fastprompt.tasks.retrieval import Retrieval, retrieval_scores, sentence_groups

from .alignment import AlignmentConfig
from .arguments import TrainingArguments
from .batch import Batch, Collator
from .callbacks import Recorder, StopOnSignal
from .checkpoints import KeepsCheckpoints
from .learner import RETRIEVAL, Learner
from .plan import EpochSteps
from .run import (
    RunInfo,
    check_empty,
    check_same,
    draw_curves,
    last_checkpoint,
    locked,
    read_records,
    read_run,
    read_scores,
    write_records,
    write_run,
    write_summary,
)
from .streams import check_metric, examples_of, fresh, pairs_of, read_streams, select
from .teacher import Digest, teacher_vectors


class Trainer(KeepsCheckpoints):
    """Trains a prompt, or whatever `adapter` says, on a task's examples, on parallel sentences, or on both at once.

    All of transformers' Trainer is there: devices, processes, precision, logging, callbacks. Beyond it, batches are
    packed on the host; each kind of parameter has a learning rate of its own; pairs of sentences run beside the
    examples, in the same pass; what the frozen backbone makes of them is computed once; and a run that is stopped
    (Ctrl-C, SIGTERM) or killed goes on, with `resume_from_checkpoint=True`, to the same bytes.

    The output folder is all that is needed later: `fastprompt.load(folder)` opens it.

    Args:
        model: a folder of a model, or its name on the hub; or a transformers model, which is changed in place.
        args: the course of the training.
        task: a `fastprompt.tasks.Task`, or the name of one; None trains the alignment alone, on `pairs`. The examples
            of "retrieval", for which nothing but the alignment trains, are pairs.
        train_dataset: examples of the task: named tuples of `fastprompt.data.examples`, or rows as
            `fastprompt.tasks.rows.examples_of` takes them, such as dicts by column or a `datasets.Dataset`, whose
            numbers of classes become their names.
        eval_dataset: more of these, to be scored. With them the best of all evaluations is kept, without them the last
            step.
        pairs: parallel sentences: `Pair`s, or rows with the columns source and target.
        eval_pairs: more of these, to see how well a translation finds its English sentence. Without a task this score
            chooses the best.
        alignment: how `pairs` are aligned; None is `AlignmentConfig()` where there are pairs.
        adapter: what of the backbone trains; None is `AdapterConfig()`, a prefix.
        inputs: how text becomes an input; None is `InputConfig()`.
        processing_class: the tokenizer; None takes the one in `model`'s folder.
        language: language of `eval_dataset`, for scores whose rules go by it.
        num_examples: how many of the examples to train on, drawn at random; None trains on all.
        on_step: a function that is called with the record of each step: step, steps, epoch, loss and its parts,
            gradient_norm, seconds.
        cache: the folder of what is computed once; None is $FASTPROMPT_CACHE/training, or
            ~/.cache/fastprompt/training.
        data: how the data can be found again; it is written into run.json.
        dtype, quantization: of a model that is given by its name, as `fastprompt.models.load.load_backbone` takes them.
        callbacks: callbacks of transformers.

    Attributes:
        learner: the `Learner`, which holds all that trains.

    Example:
        >>> trainer = Trainer(
        ...     "intfloat/multilingual-e5-small",
        ...     TrainingArguments("run", max_steps=200),
        ...     task="classification",
        ...     train_dataset=[{"text": "Great!", "label": "good"}, {"text": "Never again.", "label": "bad"}],
        ... )
        >>> trainer.train()
        >>> fastprompt.load("run").predict(["Not bad at all."])

    Raises:
        TypeError, ValueError: before the first step, naming the argument that does not fit: no examples, one that is
            not as the task reads it, a setting that does not fit the backbone, or nothing that trains.
    """

    def __init__(
        self,
        model: str | nn.Module,
        args: TrainingArguments,
        *,
        task: Task | str | None = None,
        train_dataset: Sequence | None = None,
        eval_dataset: Sequence | None = None,
        pairs: Sequence | None = None,
        eval_pairs: Sequence | None = None,
        alignment: AlignmentConfig | None = None,
        adapter: AdapterConfig | None = None,
        inputs: InputConfig | None = None,
        processing_class: Callable | None = None,
        language: str = "en",
        num_examples: int | None = None,
        on_step: Callable[[dict], None] | None = None,
        cache: Path | None = None,
        data: Mapping[str, Any] | None = None,
        dtype: str = "float32",
        quantization: str | None = None,
        callbacks: Sequence[transformers.TrainerCallback] = (),
    ) -> None:
        adapter, inputs = adapter or AdapterConfig(), inputs or InputConfig()
        task = tasks.get(task) if isinstance(task, str) else task and fresh(task)
        self.language, self._stop = language, StopOnSignal()
        pairs, self.eval_pairs = pairs_of(pairs, "pairs"), pairs_of(eval_pairs, "eval_pairs")
        examples = examples_of(task, train_dataset, "train_dataset")
        held_out = examples_of(task, eval_dataset, "eval_dataset")
        self._aligns = task is None or task.name == RETRIEVAL  # nothing but the alignment trains then
        if task is not None and self._aligns:
            pairs, self.eval_pairs, examples, held_out = [*pairs, *examples], [*self.eval_pairs, *held_out], [], []
        if not pairs and not examples:
            raise ValueError("train_dataset or pairs must hold at least one example, got none")
        if alignment is not None and not pairs:
            raise ValueError("pairs must be given with alignment, got none")
        alignment = (alignment or AlignmentConfig()) if pairs else None
        if task is not None:
            task.fit(examples)
        args = args.for_metric(task.metric if held_out else "r@1" if self.eval_pairs else None)
        torch.manual_seed(args.seed)
        model, tokenizer = _loaded(model, processing_class, args, task is not None, dtype, quantization)
        if adapter.num_layers is not None:
            keep_layers(model.base_model, adapter.num_layers)
        digest = Digest(model.base_model)  # before anything of it is adapted
        learner = Learner(model, tokenizer, adapter, inputs, task, alignment)
        counts, pairs, examples, items = select(task, pairs, examples, num_examples, args.seed)
        learner.groups(args)  # something must train
        evaluated = [held_out, self.eval_pairs]
        self.streams = read_streams(learner, digest, examples, items, pairs, evaluated, args, counts)
        self.steps = self.streams.steps(args, args.world_size)
        check_metric(learner, args, held_out, bool(self.eval_pairs))
        self.streams.compute(digest, args.cache_layers, cache)
        english = learner.tokenize([pair.source for pair in self.eval_pairs]) if self.eval_pairs else []
        self._english = None
        if english:
            self._english = teacher_vectors(digest, english, inputs.pooling, learner.device, cache)
        self.info = RunInfo(
            {"name": model.config._name_or_path, "dtype": dtype, "quantization": quantization},
            *(adapter, inputs, None if task is None else {"name": task.name, "settings": task.settings()}, alignment),
            arguments=args.deciding(),
            data=None if data is None else dict(data),
            content=self.streams.content,
            counts=self.streams.counts,
            language=language,
        )
        folder = Path(args.output_dir)
        self._recorder = Recorder(learner.device, folder if args.should_save else None, on_step)
        more = [self._recorder, self._stop]
        if args.early_stopping_patience is not None and args.eval_strategy != "no":
            more.append(transformers.EarlyStoppingCallback(args.early_stopping_patience))
        super().__init__(
            learner,
            args,
            train_dataset=self.steps,
            eval_dataset=held_out or self.eval_pairs or None,
            processing_class=tokenizer,
            callbacks=[*callbacks, *more],
        )
        self._examples, self._collate = held_out, partial(self.streams.collated, self._batches(), args.process_index)

    # -- data -----------------------------------------------------------------------------------------------------

    def _batches(self) -> Collator:
        """What packs the batches: all to a few shapes, if that is wanted."""
        types = self.learner.collate.token_types
        if not self.args.static_shapes:
            return Collator(types)
        plain, costs = Collator(types), []
        for n in range(len(self.steps)):
            bounds = self.streams.batch(plain, self.steps[n], self.args.process_index).bounds
            costs.append((bounds[-1], len(bounds) - 1))
        most = -(-max(tokens for tokens, _ in costs) // 64) * 64
        if self.learner.adapted.prompted is not None:
            self.learner.adapted.prompted.cuda_graphs = True
        return Collator(types, max_tokens=sorted({-(-most // 128) * 64, most}), max_samples=max(n for _, n in costs))

    def get_train_dataloader(self) -> DataLoader:
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.steps,
            batch_sampler=EpochSteps(self.steps),
            collate_fn=self._collate,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context if workers else None,
            persistent_workers=workers > 0 and self.args.dataloader_persistent_workers,
        )

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple:
        epochs, an_epoch, count, samples, batch_size, steps, _ = super().set_initial_training_values(args, dataloader)
        updates = self.steps.updates
        return -(-updates // an_epoch), an_epoch, count, samples, batch_size, steps, updates

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        found = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        return found, None  # a batch knows its share of the loss

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: Batch) -> int:
        return 0

    # -- a step ---------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.learner)
            options.pop("lr", None)
            self.optimizer = kind(self.learner.groups(self.args), **options)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch=None) -> Tensor:
        self._recorder.metrics.begin()
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model: nn.Module, inputs: Batch, return_outputs=False, num_items_in_batch=None):
        losses = model(inputs)
        self._recorder.note(losses)
        return (losses["loss"], losses) if return_outputs else losses["loss"]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        if grad_norm is None:  # it was not clipped
            found = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
            grad_norm = get_total_norm(found)
        self._recorder.norm = grad_norm
        return grad_norm

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self._recorder.read()  # a loss that is no number is told before anything is kept
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # -- the run --------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train, and leave in the output folder all that `fastprompt.load` opens.

        Args:
            resume_from_checkpoint: True goes on with the run in the output folder, from its last checkpoint, or from
                the beginning where it has none. Its settings, backbone and data must be the same, but it may be
                longer. The path of a checkpoint goes on from that one.

        Raises:
            FileExistsError, FileNotFoundError, ValueError: the folder holds a run already, or none to go on with.
            FloatingPointError: the loss is no number. On a GPU it is told some steps later, before anything is saved.
        """
        folder, checkpoint, records = Path(self.args.output_dir), None, []
        resume_from_checkpoint = resume_from_checkpoint or self.args.resume_from_checkpoint
        if not resume_from_checkpoint:
            check_empty(folder)
        else:
            check_same(read_run(folder), self.info, folder)
            given = isinstance(resume_from_checkpoint, str)
            checkpoint = Path(resume_from_checkpoint) if given else last_checkpoint(folder)
        if checkpoint is not None:
            file = checkpoint / TRAINER_STATE_NAME
            if not file.is_file():
                raise FileNotFoundError(
                    f"resume_from_checkpoint must be True or the folder of a checkpoint, got {checkpoint}"
                )
            records = read_records(folder, transformers.TrainerState.load_from_json(str(file)).global_step)
        self._barrier()
        self._recorder.records[:] = records
        with locked(folder) if self.args.should_save else nullcontext():
            if self.args.should_save:
                write_run(folder, self.info)
                write_records(folder, records)
            self._barrier()
            with self._stop.listening():
                result = super().train(None if checkpoint is None else str(checkpoint), **kwargs)
            self._recorder.read()
            if self.args.should_save and self._recorder.records:
                self.learner.save(folder)
                self._summarise(folder)
            self._barrier()
        return result

    def _summarise(self, folder: Path) -> None:
        records, counts = self._recorder.records, self.info.counts
        best = {} if self.state.best_metric is None else {"best": self.state.best_metric}
        best |= {"best_step": self.state.best_global_step} if best else {}
        more = {"counts": counts} | best | {"metric": self.args.metric_for_best_model}
        write_summary(folder, records, self.state.max_steps, self.stopped, more)
        draw_curves(folder, records)
        write_text(folder / CARD, card(self.info, scores=read_scores(folder)))

    @property
    def records(self) -> list[dict]:
        """The metrics of each step: step, loss and its parts, gradient_norm, seconds; at evaluations, validation."""
        return self._recorder.records

    @property
    def stopped(self) -> bool:
        """Whether a signal ended the run before its last step."""
        return self._stop.stopped

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The task's scores of examples, and those of finding English sentences by their translations.

        Args:
            eval_dataset: examples, or without a task pairs; None scores the `eval_dataset` and `eval_pairs` that the
                Trainer was made with.
            ignore_keys: not read.
            metric_key_prefix: what the names of the scores begin with, and an underscore.
        """
        task, pairs, examples = self.learner.task, self.eval_pairs, self._examples
        if eval_dataset is not None:
            given = examples_of(Retrieval() if self._aligns else task, eval_dataset, "eval_dataset")
            pairs, examples = (given, []) if self._aligns else ([], given)
        scores = {}
        if pairs:
            texts, size = [pair.target for pair in pairs], {"batch_size": self.args.per_device_eval_batch_size}
            vectors = torch.stack(self._divided(texts, lambda part: list(self.learner.vectors(part, **size))))
            english = self._english
            if eval_dataset is not None:
                english = self.learner.vectors([pair.source for pair in pairs], source=True, **size)
            groups = sentence_groups(self.learner.tokenize([pair.source for pair in pairs]))
            scores |= retrieval_scores(vectors, english.float(), groups)
        if examples:
            scores |= task.scores(examples, self.predict(examples), self.language)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        counted = (self.args.metric_for_best_model or "").removeprefix("eval_")
        if self.is_in_train and self._recorder.records and counted in scores:
            self._recorder.records[-1]["validation"] = scores[counted]
            if self.args.should_save:
                write_records(Path(self.args.output_dir), self._recorder.records)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, test_dataset: Sequence, **kwargs) -> list[dict]:
        """A prediction of each example, as `fastprompt.tasks.Task.predict` gives it.

        Args:
            test_dataset: examples or rows, as `train_dataset`; their labels are not read.
        """
        examples = examples_of(self.learner.task, test_dataset, "test_dataset", labelled=False)
        batch_size = self.args.per_device_eval_batch_size
        if self._aligns:  # a sentence is found among all the others
            return self.learner.predict(examples, batch_size)
        return self._divided(examples, lambda part: self.learner.predict(part, batch_size))

    def _divided(self, things: Sequence, function: Callable[[list], list]) -> list:
        """`function` of all things, a part of them on each process, in their order."""
        world_size, rank = self.args.world_size, self.args.process_index
        own = list(things[rank::world_size])
        found = function(own) if own else []
        if world_size == 1:
            return found
        parts: list = [None] * world_size
        dist.all_gather_object(parts, found)
        return [parts[n % world_size][n // world_size] for n in range(len(things))]


def _loaded(
    model: str | nn.Module,
    tokenizer: Callable | None,
    args: TrainingArguments,
    has_task: bool,
    dtype: str,
    quantization: str | None,
) -> tuple[nn.Module, Callable]:
    """The backbone and its tokenizer; one that is given as a module is taken as it is."""
    if isinstance(model, str):
        options = {"dtype": dtype, "quantization": quantization, "head": "auto" if has_task else "none"}
        model, own = load_backbone(model, args.device, **options)
        return model, own if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ValueError("processing_class must be the tokenizer of a model that is given as a module, got None")
    return model, tokenizer
