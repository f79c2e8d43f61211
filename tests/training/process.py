"""What each of several processes runs in test_processes.py: all cases, one after the other."""

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from helpers import paraphrases, translations
from runs import equal, trainer
from simple_task import Classes

from fastprompt.models.load import load_backbone
from fastprompt.training import AlignmentConfig

BATCH = "per_device_train_batch_size"  # of both processes together


def cases() -> dict[str, dict]:
    """Settings by name. Last batches are odd: of one thing, so that a process has none, and of five."""
    task = {"task": Classes(), "train_dataset": paraphrases(9), BATCH: 4}
    both = task | {"pairs": [*translations(4), *translations(1)]}  # the last one's English sentence is the first's
    cached = {"layers": [1], "cache_layers": True}
    return {
        "alone": {"pairs": translations(25), "eval_pairs": translations(7, 1), BATCH: 8} | cached,
        "tokens": {"pairs": translations(13), "max_tokens": 24, "num_train_epochs": 1},
        "task": task | {"eval_dataset": paraphrases(5, 1), "gradient_accumulation_steps": 2},
        "both": both | {"alignment": AlignmentConfig(batch_size=5, warmup_steps=1), "method": "prompt"},
        "few": both | {"alignment": AlignmentConfig(batch_size=1, layer=1), "method": "lora"},
    }


def in_double(backbone: str, out: Path, world_size: int, **settings):
    """A Trainer in float64, in which what processes compute apart is what one computes, up to rounding."""
    torch.set_default_dtype(torch.float64)
    model, tokenizer = load_backbone(backbone, "cpu")
    if BATCH in settings:
        settings[BATCH] //= world_size
    return trainer(model.double(), out, processing_class=tokenizer, **settings)


def main(rank: int, backbone: str, out: Path, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }  # as torchrun
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "FASTPROMPT_CACHE": str(out / "cache")}
    for state in (AcceleratorState, GradientState, PartialState):  # of the process that this one was forked from
        state._reset_state()
    torch.set_num_threads(1)  # OpenMP's do not live on in a fork
    for name, settings in cases().items():
        made = in_double(backbone, out / name, 2, ddp_backend="gloo", **settings)
        made.train()
        scores = made.evaluate() if made.eval_dataset else {}
        torch.save((made.learner.trained(), made.records, scores), out / f"{name}-{rank}.pt")

    # The form of the task needs two pairs, which one of the processes has not.
    more = {"alignment": AlignmentConfig(form="task", batch_size=3), "ddp_backend": "gloo"}
    made = in_double(backbone, out / "form", 2, **cases()["both"] | more)
    made.train()
    torch.save((made.learner.trained(), made.records, {}), out / f"form-{rank}.pt")

    # One of them is told to stop: both do, and go on to the same bytes.
    def stop(record):
        if record["step"] == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGINT)

    settings = cases()["both"] | {"max_steps": 14, "ddp_backend": "gloo"}
    whole = in_double(backbone, out / "whole", 2, **settings)
    whole.train()
    broken = in_double(backbone, out / "stopped", 2, on_step=stop, **settings)
    broken.train()
    resumed = in_double(backbone, out / "stopped", 2, **settings)
    resumed.train(resume_from_checkpoint=True)
    torch.save((broken.stopped, len(broken.records), equal(whole, resumed)), out / f"stopped-{rank}.pt")
    dist.destroy_process_group()
