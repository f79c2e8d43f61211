"""train_task: adapt a backbone to a task with a few labelled examples and, if wanted, parallel text."""

import hashlib
import json
import logging
import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from fastprompt.models.methods import keep_layers
from fastprompt.tasks.parallel import Pair
from fastprompt.tasks.retrieval import firsts, sentence_groups

from .encoding import Digest, first_row, teacher_vectors, tokenize
from .loop import stop_on_signal
from .metrics import Metrics
from .run import Run
from .sampler import shuffled
from .task_config import RETRIEVAL, TaskConfig
from .task_learner import TaskLearner
from .tasks import Aligned, Item, Task


def train_task(
    backbone: nn.Module,
    tokenizer: Callable,
    examples: Sequence,
    validation: Sequence,
    config: TaskConfig,
    out: str | Path | None = None,
    *,
    language: str = "en",
    pairs: Sequence[Pair] = (),
    resume: bool = False,
    cache: Path | None = None,
    on_step: Callable[[dict], None] | None = None,
) -> tuple[TaskLearner, list[dict]]:
    """Train on labelled examples of one language, with the alignment of parallel text beside them.

    The loss of a step is the task's on a batch of examples plus `config.alignment` times the alignment loss of a batch
    of pairs: the student is the adapted backbone on a target sentence, the teacher the backbone as it came on the
    English one, computed once. At every evaluation on the validation examples what trains is kept if it is the best so
    far; at the end the best is put back.

    Args:
        backbone: of a supported family, a base model or a causal language model with its head; changed in place.
        tokenizer: transformers' tokenizer for it.
        examples, validation: as `fastprompt.tasks.data.read_examples` gives them; pairs for retrieval. Without
            validation examples the last step counts as the best.
        config: all that decides the result.
        out: the run's folder, or None to keep nothing: trained.safetensors (the best), PEFT's files of a prompt,
            run.json, metrics.jsonl, curves.png, summary.json, and training_state.pt for `resume`, as of the last
            evaluation.
        language: of the validation examples, whose rules score them.
        pairs: parallel sentences, where `config.alignment` is not 0.
        resume: go on with the run in `out`: the same settings, backbone and data.
        cache: folder of the teacher's vectors, as in `train`.
        on_step: called for each step with its metrics; on a GPU for some steps at a time, as they are read there.

    Returns:
        The learner, with the best weights, and the metrics of each step: step, steps (in all), loss and its parts,
        gradient_norm, seconds and, at evaluations, validation.

    Raises:
        FileExistsError, FileNotFoundError, TypeError, ValueError: before any work, for what does not fit.
        FloatingPointError: the loss is no longer a number. On a GPU it is told when the metrics are next read, before
            anything is saved.
    """
    if not examples:
        raise ValueError("examples must hold at least one example, got none")
    retrieval = config.task == RETRIEVAL
    if not retrieval and bool(pairs) != bool(config.alignment):
        raise ValueError(f"pairs and an alignment above 0 go together, got {len(pairs)} and {config.alignment}")
    torch.manual_seed(config.seed)
    base = backbone.base_model
    if config.num_layers is not None:
        keep_layers(base, config.num_layers)
    given, drawn = len(examples), draw(examples, config.examples, config.seed)
    if retrieval:
        pairs = drawn
    source, target = (
        tokenize(tokenizer, [getattr(pair, side) for pair in pairs], config.prefix_text, config.max_length)
        if pairs
        else []
        for side in ("source", "target")
    )
    groups = sentence_groups(source).tolist()
    digest, device = Digest(base), next(base.parameters()).device
    learner = TaskLearner(backbone, tokenizer, config)
    examples, items = (drawn, []) if retrieval else usable(learner.task, examples, config.examples, config.seed)
    counts = {"given": given, "drawn": len(examples), "pairs": len(pairs)}
    if not retrieval:
        cut = len({item.example for item in items if item.cut})
        counts |= {"inputs": len(items), "cut": cut}
    trained = learner.trained()
    optimizer = torch.optim.AdamW(learner.groups(), weight_decay=0.0)
    run, state = None, None
    if out is not None:
        text = json.dumps([examples, validation, source, target])
        read = [item.ids for item in items] + source + target
        content = {"data": hashlib.sha256(text.encode()).hexdigest(), "backbone": digest(read)}
        run = Run(Path(out), config, content, [], resume, counts)
        state = run.state
    # What is adapted is, until it trains, the backbone as it came.
    teacher, layer = None, config.alignment_layer
    if pairs:
        teacher = teacher_vectors(digest, source, config.pooling, device, cache, layer).to(device)
        teacher = teacher if layer is None else learner.standardized(teacher)
    if retrieval and validation:
        english = learner.task.tokenize([pair.source for pair in validation])
        learner.task.english = teacher_vectors(digest, english, config.pooling, device, cache)
    rates = [group["lr"] for group in optimizer.param_groups]
    records: list[dict] = [] if run is None else run.records
    best = {"score": -math.inf, "step": 0, "weights": {}}
    if state is not None:
        learner.load_state_dict(state["trained"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        best = state["best"]

    metrics = Metrics(device)

    def report(evaluated: bool) -> None:
        read = metrics.read()
        for record in read:
            if not math.isfinite(record["loss"]):
                raise FloatingPointError(f"the loss is {record['loss']} at step {record['step']}: try a smaller lr")
            records.append(record)
        if evaluated:
            keep_if_best()
        for record in read if on_step is not None else ():
            on_step(record | {"steps": total})

    def keep_if_best() -> None:
        score = float(len(records))  # without validation examples, the last
        if validation:
            score = learner.task.scores(validation, learner.predict(validation), language)[learner.task.metric]
            records[-1]["validation"] = score
        if score > best["score"]:
            weights = {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained.items()}
            best.update(score=score, step=len(records), weights=weights)

    def save() -> None:
        nonlocal saved
        weights = {name: parameter.detach().cpu() for name, parameter in trained.items()}
        run.write_records()  # first: of too many, those after the state are left out
        run.save_state(step, weights, optimizer.state_dict(), best=best)
        saved = step

    total, out_of_patience = config.alignment_first + config.steps, _out_of_patience(records, best["step"], config)
    step = saved = len(records)
    # Where nothing is kept, half a run is worth nothing: it ends as any program does.
    with stop_on_signal() if run is not None else nullcontext(lambda: False) as stopped:
        while step < total and not stopped() and not out_of_patience:
            metrics.begin()
            fitting = step >= config.alignment_first
            labelled = _batch(config.seed, "task", step - config.alignment_first, config.batch_size, len(items))
            chosen = _batch(config.seed, "alignment", step, config.alignment_batch_size, len(pairs))
            # A pair that is there twice would be its own rival, and so would an English sentence.
            chosen = [n for n, first in zip(chosen, firsts([groups[n] for n in chosen]), strict=True) if first]
            weight = _weight(step - config.alignment_first, config)
            if config.alignment_form == "task":
                aligned = learner.task.align(pairs, chosen, random.Random(f"{config.seed} {step}"))
            else:
                aligned = [sentence(target[n], n, config) for n in chosen]
            parts = learner.loss([items[n] for n in labelled] if fitting else [], aligned, teacher)
            loss = sum(part * (weight if name == "alignment" else 1.0) for name, part in parts.items())
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * _rate(step, total)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained.values() if p.grad is not None])
            optimizer.step()
            step += 1
            metrics.add({"step": step}, {"loss": loss} | parts | {"gradient_norm": norm})
            evaluated = fitting and (step - config.alignment_first) % config.evaluate_every == 0
            last = step == total or stopped()
            if evaluated or last or metrics.due:
                report(evaluated or step == total)
            if run is not None and (evaluated or last):
                save()
            out_of_patience = evaluated and _out_of_patience(records, best["step"], config)
        if run is not None and saved != step:
            report(False)
            save()
    if best["weights"]:
        learner.load_state_dict(best["weights"], strict=False)
    if run is not None and records:
        learner.save(run.folder)
        run.summarise(total, stopped=len(records) < total and not out_of_patience)
        run.draw()
    return learner, records


def draw(examples: Sequence, count: int | None, seed: int) -> list:
    """`count` of the examples at random by `seed`, fewer ones being the first of more; all for None.

    Raises:
        ValueError: more are asked for than there are.
    """
    if count is None:
        return list(examples)
    if count > len(examples):
        raise ValueError(f"examples must be at most {len(examples)}, as many as there are, got {count}")
    shuffled_examples = list(examples)
    random.Random(f"{seed} examples").shuffle(shuffled_examples)
    return shuffled_examples[:count]


def usable(task: Task, examples: Sequence, count: int | None, seed: int) -> tuple[list, list[Item]]:
    """As many of the examples as wanted, drawn as by `draw` and without those that training can make nothing of; and
    the inputs made of them. How many were passed over is told.

    Raises:
        ValueError: too few can be used, or less than half of those looked at.
    """
    order = draw(examples, None if count is None else len(examples), seed)
    wanted, looked, chosen, items = len(order) if count is None else count, 0, [], []
    while len(chosen) < wanted and looked < len(order):
        part = order[looked : looked + wanted - len(chosen)]
        made = task.encode(part)
        used = {n: len(chosen) + place for place, n in enumerate(sorted({item.example for item in made}))}
        items += [item._replace(example=used[item.example]) for item in made]
        chosen += [part[n] for n in used]
        looked += len(part)
    why = "have no answer that stands whole where they say in their context, within max_length"
    if not chosen:
        raise ValueError(f"examples must have answers that stand in their contexts, got none in {looked}")
    passed = looked - len(chosen)
    if count is not None and len(chosen) < count:
        raise ValueError(f"examples must be at most {len(chosen)}, got {count}: {passed} of {looked} {why}")
    if passed > len(chosen):
        raise ValueError(f"examples must be usable for the greater part, got {passed} of {looked} that {why}")
    if passed:
        logging.getLogger("fastprompt").warning("%d of %d examples are left out: they %s", passed, looked, why)
    return chosen, items


def sentence(ids: list[int], pair: int, config: TaskConfig) -> Aligned:
    """The alignment's input of one sentence."""
    begin = first_row(len(ids), config.alignment_layer) if config.pooling == "mean" else 0
    return Aligned(Item(ids, len(ids), None), [(begin, len(ids), pair)])


def _batch(seed: int, name: str, step: int, size: int, count: int) -> list[int]:
    """Which of `count` examples step `step` takes: pass after pass over all, each in an order of its own."""
    if count == 0:
        return []
    places = range(step * size, (step + 1) * size)
    orders = {place // count: None for place in places}
    orders = {epoch: shuffled(f"{seed} {name}", epoch, count) for epoch in orders}
    return [orders[place // count][place % count] for place in places]


def _rate(step: int, total: int) -> float:
    """Of the learning rates: up on a line over the first tenth of the steps, and down on one to 0."""
    rise = max(1, total // 10)
    return min((step + 1) / rise, (total - step) / max(1, total - rise))


def _weight(step: int, config: TaskConfig) -> float:
    """Of the alignment loss, at a step of the task's; before the first one, in full."""
    if config.alignment_schedule == "constant" or step < 0:
        return config.alignment
    return config.alignment * (1 - step / config.steps)


def _out_of_patience(records: list[dict], best_step: int, config: TaskConfig) -> bool:
    if config.patience is None:
        return False
    later = [record for record in records if "validation" in record and record["step"] > best_step]
    return len(later) >= config.patience
