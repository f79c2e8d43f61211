"""Callbacks of the Trainer: what is recorded of each step, and how a run is stopped by a signal."""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import SaveStrategy

from .run import METRICS

READ_EVERY = 10  # steps; on a CPU nobody waits


class Metrics:
    """What steps computed, kept until it is read from the device together: a step that read its own would wait for it.

    Args:
        device: where it is computed.
    """

    def __init__(self, device: torch.device) -> None:
        self.every = 1 if device.type == "cpu" else READ_EVERY
        self._waiting: list[tuple[dict, dict[str, Tensor]]] = []
        self._began = 0.0

    def begin(self) -> None:
        """A step begins."""
        if not self._waiting:
            self._began = time.perf_counter()

    def add(self, record: dict, values: dict[str, Tensor]) -> None:
        """A step's own numbers, and those that stand on the device."""
        self._waiting.append((record, {name: value.detach() for name, value in values.items()}))

    @property
    def due(self) -> bool:
        """Whether it is time to read."""
        return len(self._waiting) >= self.every

    def read(self) -> list[dict]:
        """The records of the steps since the last call, each with its values and "seconds", the mean of these steps."""
        if not self._waiting:
            return []
        found = torch.stack([value for _, values in self._waiting for value in values.values()])
        if dist.is_initialized() and dist.get_world_size() > 1:  # the mean over the processes
            dist.all_reduce(found)
            found = found / dist.get_world_size()
        found = found.tolist()
        seconds = (time.perf_counter() - self._began) / len(self._waiting)
        numbers = iter(found)
        records = [
            record | {name: next(numbers) for name in values} | {"seconds": seconds} for record, values in self._waiting
        ]
        self._waiting = []
        return records


class Recorder(TrainerCallback):
    """Keeps the metrics of every step: loss and its parts, gradient norm, seconds and, at evaluations, the score.

    Args:
        device: where they are computed.
        folder: where metrics.jsonl grows; None: they are kept in memory.
        on_step: called with the record of each step.

    Attributes:
        norm: the norm of the gradients, before they are clipped.
    """

    def __init__(self, device: torch.device, folder: Path | None, on_step: Callable[[dict], None] | None) -> None:
        self.device, self.folder, self.on_step = device, folder, on_step
        self.records: list[dict] = []
        self.metrics = Metrics(device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.metrics.every = READ_EVERY  # they are averaged over the processes when they are read
        self._parts: list[dict[str, Tensor]] = []
        self.norm: Tensor | float | None = None

    def note(self, losses: dict[str, Tensor]) -> None:
        """Take down the losses of a batch."""
        self._parts.append({name: value.detach() for name, value in losses.items()})

    def on_step_end(self, args, state, control, **kwargs) -> None:
        names = dict.fromkeys(name for parts in self._parts for name in parts)
        count = len(self._parts)
        values = {name: sum(parts[name] for parts in self._parts if name in parts) / count for name in names}
        self._parts = []
        about = {"step": state.global_step, "epoch": state.epoch, "steps": state.max_steps}
        self.metrics.add(about, values | {"gradient_norm": self.norm})
        if self.metrics.due:
            self.read()

    def read(self) -> None:
        """Read what the device has of the steps since the last time.

        Raises:
            FloatingPointError: the loss of one is no number.
        """
        for record in self.metrics.read():
            if not math.isfinite(record["loss"]):
                raise FloatingPointError(
                    f"the loss is {record['loss']} at step {record['step']}: try a smaller learning_rate"
                )
            self.records.append(record)
            if self.folder is not None:
                with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            if self.on_step is not None:
                self.on_step(record)


def ends_epoch(state: TrainerState) -> bool:
    """Whether the step that was done is the last of an epoch."""
    return state.epoch == int(state.epoch)


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM end the run after the step it is at, with a checkpoint; a second one ends it as usual.

    Attributes:
        stopped: whether one came.
    """

    def __init__(self) -> None:
        self._asked, self.stopped = threading.Event(), False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to the signals for a while; they are the main thread's."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame) -> None:
            self._asked.set()
            signal.signal(number, before[number])

        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.stopped = False

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.stopped = self.stopped or self._agreed(args, state)
        if not self.stopped or state.global_step >= state.max_steps:
            self.stopped = False
            return
        control.should_training_stop = True
        if not (ends_epoch(state) and args.save_strategy == SaveStrategy.EPOCH):  # which has a checkpoint of its own
            control.should_save = True

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        if self.stopped and not ends_epoch(state):  # the loop thinks so wherever it stops
            control.should_evaluate = control.should_save = False

    def _agreed(self, args, state) -> bool:
        """Processes stop at the same step, or they would wait for each other for ever."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self._asked.is_set()
        if state.global_step % READ_EVERY:
            return False
        asked = torch.tensor(int(self._asked.is_set()), device=args.device)
        dist.all_reduce(asked)
        return bool(asked)
