"""train: adapt a frozen backbone to a language."""

import hashlib
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from fastprompt.models import PromptModel
from fastprompt.models.packed.layout import tensor_on
from fastprompt.tasks.parallel import Pair
from fastprompt.tasks.retrieval import firsts, sentence_groups

from .config import TrainingConfig
from .encoding import Digest, lower_states, teacher_vectors, tokenize
from .learner import Learner
from .metrics import Metrics
from .run import Run
from .sampler import TokenBudgetSampler, shuffled


def train(
    backbone: nn.Module,
    tokenizer: Callable,
    pairs: Sequence[Pair],
    out: str | Path,
    config: TrainingConfig,
    *,
    resume: bool = False,
    cache: Path | None = None,
    on_step: Callable[[dict], None] | None = None,
) -> Learner:
    """Train a prompt and a projection so that target sentences get the vectors of their English ones.

    The student is the prompted backbone on the target sentence, the teacher the same backbone without prompt on the
    English one, computed once. The loss is the alignment loss and, where the pairs have labels, the cross-entropy of a
    linear head on the student's vector. Where it has "infonce", an English sentence (of the same tokens) that a batch
    has twice is not aligned the second time: it would be its own rival. After each epoch, and on the first Ctrl-C or
    SIGTERM (after the step it is at), `out` holds what was learned and what `resume` goes on from, to the same result
    as without a pause.

    Args:
        backbone: a base model of a supported family; it is frozen, in place.
        tokenizer: transformers' tokenizer for it.
        pairs: parallel sentences, with labels in all or none.
        out: the run's folder: PEFT's adapter files, alignment.safetensors, run.json, metrics.jsonl, curves.png,
            summary.json and training_state.pt.
        config: all that decides the result.
        resume: go on with the run in `out`. Its settings, backbone and pairs must be the same; `epochs` may differ.
        cache: folder of what is computed once, the teacher's vectors and the lower layers' hidden states; see
            `fastprompt.training.cache`.
        on_step: called for each step with its metrics: step, steps (in all), epoch, loss and its parts, seconds; and
            with the learner as it then is; on a GPU for some steps at a time, as they are read there.

    Returns:
        What was learned. `out`/summary.json tells whether all steps were done.

    Raises:
        FileExistsError, FileNotFoundError, TypeError, ValueError: before any work, for what does not fit.
        FloatingPointError: the loss is no longer a number; `out` holds the last whole epoch. On a GPU it is told when
            the metrics are next read, before anything is saved.
    """
    if not pairs:
        raise ValueError("pairs must hold at least one pair, got none")
    out, device = Path(out), next(backbone.parameters()).device
    labels = sorted({pair.label for pair in pairs} - {None})
    torch.manual_seed(config.seed)
    learner = Learner(PromptModel(backbone, config.prompt(tokenizer)), config, labels)
    _check_length(config, learner.prompted)
    source, target = (
        tokenize(tokenizer, [getattr(pair, side) for pair in pairs], config.prefix_text, config.max_length)
        for side in ("source", "target")
    )
    steps = _steps(config, learner.prompted, [len(tokens) for tokens in target])
    digest = Digest(backbone)
    text = json.dumps([source, target, [pair.label for pair in pairs]])
    # The backbone's is of the rows that these pairs read: other pairs are told first.
    content = {"pairs": hashlib.sha256(text.encode()).hexdigest(), "backbone": digest(source + target)}
    run = Run(out, config, content, labels, resume)

    teacher = teacher_vectors(digest, source, config.pooling, device, cache).to(device)
    states = None
    if config.cache_layers and learner.prompted.first_layer:
        states = lower_states(digest, learner.prompted, target, device, cache)
    groups = sentence_groups(source).tolist() if "infonce" in config.distance else None
    classes = torch.tensor([labels.index(pair.label) for pair in pairs], device=device) if labels else None
    trained = learner.trained()
    projection = list(learner.alignment.parameters())
    others = [parameter for parameter in trained.values() if all(parameter is not p for p in projection)]
    optimizer = torch.optim.AdamW(
        [{"params": others, "lr": config.lr}, {"params": projection, "lr": config.projection_lr}]
    )
    if run.state is not None:
        learner.load_state_dict(run.state["trained"], strict=False)
        optimizer.load_state_dict(run.state["optimizer"])

    step, saved = 0 if run.state is None else run.state["step"], None
    metrics = Metrics(device)

    def report() -> None:
        for record in metrics.read():
            if not math.isfinite(record["loss"]):
                kept = f"; {out} holds epoch {record['epoch'] - 1}" if record["epoch"] > 1 else ""
                raise FloatingPointError(
                    f"the loss is {record['loss']} at step {record['step']}: try a smaller lr{kept}"
                )
            run.record(**record)
            if on_step is not None:
                on_step(record | {"steps": len(steps), "learner": learner})

    def save() -> None:
        nonlocal saved
        report()
        run.save_state(step, {name: p.detach().cpu() for name, p in trained.items()}, optimizer.state_dict())
        learner.save(out)
        if run.records:
            run.summarise(len(steps), stopped=step < len(steps))
        saved = step

    if step:
        save()  # the run may have been killed while it saved
    with stop_on_signal() as stopped:
        while step < len(steps) and not stopped():
            epoch, batch = steps[step]
            metrics.begin()
            chosen = tensor_on(batch, device)
            parts = learner.loss(
                [target[n] for n in batch],
                teacher[chosen],
                None if classes is None else classes[chosen],
                None if states is None else torch.cat([states[n] for n in batch]).to(device),
                None if groups is None else _once([groups[n] for n in batch], device),
            )
            loss = sum(parts.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            metrics.add({"step": step, "epoch": epoch + 1}, {"loss": loss} | parts)
            if metrics.due:
                report()
            if step == len(steps) or steps[step][0] > epoch:
                save()
        if saved != step:
            save()
    if run.records:
        run.draw()
    return learner


def _steps(config: TrainingConfig, prompted: PromptModel, lengths: list[int]) -> list[tuple[int, list[int]]]:
    """The epoch and the pairs of each step."""
    if config.max_tokens is not None:
        per_sentence, per_batch = prompted.prompt_rows
        sampler = TokenBudgetSampler(
            lengths,
            config.max_tokens,
            rows_per_sentence=per_sentence,
            rows_per_batch=per_batch,
            seed=config.seed,
            rank=0,
            world_size=1,
        )
    steps = []
    for epoch in range(config.epochs):
        if config.max_tokens is None:
            order = shuffled(config.seed, epoch, len(lengths))
            batches = [order[n : n + config.batch_size] for n in range(0, len(order), config.batch_size)]
        else:
            sampler.set_epoch(epoch)
            batches = sampler
        steps += [(epoch, batch) for batch in batches]
    return steps


def _once(groups: list[int], device: torch.device) -> torch.Tensor | None:
    """Weights of a batch's pairs: 0 for those after the first of a group; None where there are none."""
    first = firsts(groups)
    return None if all(first) else tensor_on([float(each) for each in first], device)


def _check_length(config: TrainingConfig, prompted: PromptModel) -> None:
    room = prompted.text_positions
    if room is not None and config.max_length > room:
        raise ValueError(
            f"max_length must be at most {room}: what the position table leaves beside a prompt of "
            f"{config.num_virtual_tokens}, got {config.max_length}"
        )


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM end the loop after the step it is at; a second one ends the program as usual."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield stopped.is_set
        return

    def stop(number: int, frame) -> None:
        stopped.set()
        signal.signal(number, before[number])

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield stopped.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
