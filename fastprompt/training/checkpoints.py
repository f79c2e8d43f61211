"""Checkpoints of a Trainer: written aside and renamed, of what trains alone, and found again in a folder that moved."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
import transformers
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME

from fastprompt._files import sync

from .learner import Learner
from .run import CHECKPOINT, METRICS, RunInfo, write_run


class KeepsCheckpoints(transformers.Trainer):
    """A transformers' Trainer whose model is a `Learner`.

    Attributes:
        info: what run.json says.
    """

    info: RunInfo

    @property
    def learner(self) -> Learner:
        """All that trains."""
        return self.accelerator.unwrap_model(self.model)

    def _barrier(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """Write the checkpoint aside, and rename it when it is whole: a process that is killed leaves none."""
        folder = Path(self.args.output_dir)
        name = f"{CHECKPOINT}{self.state.global_step}"
        aside, place = folder / f".{name}", folder / name
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self._barrier()
        best = self.state.best_global_step
        if best:
            self.state.best_model_checkpoint = str(folder / f"{CHECKPOINT}{best}")
        self.save_model(str(aside), _internal_call=True)
        self._save_optimizer_and_scheduler(str(aside))
        self._save_scaler(str(aside))
        self._save_rng_state(str(aside))
        if self.args.should_save:
            self._keep_callbacks()
            self.state.save_to_json(str(aside / TRAINER_STATE_NAME))
        self._barrier()
        if self.args.should_save:
            for file in (*aside.iterdir(), folder / METRICS):
                sync(file)
            shutil.rmtree(place, ignore_errors=True)
            os.replace(aside, place)
            sync(folder)
            transformers.trainer_utils.rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        self._barrier()

    def _keep_callbacks(self) -> None:
        """Put the state of callbacks that have one, such as the patience that is left, into the state."""
        kept: dict[str, Any] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, transformers.trainer_callback.ExportableState):
                kept[type(callback).__name__] = callback.state()
        self.state.stateful_callbacks = kept

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            self.learner.save(folder)
            write_run(folder, self.info)  # so that a checkpoint says by itself what it is, wherever it goes

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.learner.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self.learner.load(Path(self.state.best_model_checkpoint))

    def _init_training_state(self, max_steps: int, an_epoch: int, num_train_epochs: int, *args) -> tuple[int, int]:
        found = super()._init_training_state(max_steps, an_epoch, num_train_epochs, *args)
        best = Path(self.args.output_dir) / f"{CHECKPOINT}{self.state.best_global_step}"
        if self.state.best_global_step and best.is_dir():  # the folder may have been moved
            self.state.best_model_checkpoint = str(best)
        for callback in self.callback_handler.callbacks:
            early = isinstance(callback, transformers.EarlyStoppingCallback)
            if early and callback.early_stopping_patience_counter >= callback.early_stopping_patience:
                return num_train_epochs, 0  # the run that goes on had stopped by itself: it has no epoch left
        return found
