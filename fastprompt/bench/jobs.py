"""The training jobs of `fastprompt.bench.end_to_end`: one run of one way, in this process."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastprompt._extras import require
from fastprompt._measure import peak_memory_mb
from fastprompt.data.examples import Pair
from fastprompt.data.parallel import read_pairs, split_pairs
from fastprompt.tasks.retrieval import retrieval_scores

from .case import OURS
from .flops import count_flops

PEFT = "peft"
WAYS = OURS, PEFT
SCORES = {"retrieval": "R@1", "accuracy": "accuracy"}
JOBS = tuple(SCORES)
BATCH, PREFIX_ROWS, SEED = 16, 16, 0
MAX_LENGTH = 256  # tokens of a sentence, as the stock job has it
TEXT_PREFIX = "query: "  # multilingual-e5 was trained with it; it does others no harm
COUNTED_STEPS = 4  # whose FLOPs are counted, after training


@dataclass(frozen=True)
class Settings:
    """Of one run; see `fastprompt.bench.end_to_end.measure_jobs`."""

    backbone: str
    parallel: str
    steps: int
    train: int
    test: int
    evaluate_every: int
    threads: int | None


def run_job(job: str, way: str, settings: Settings) -> dict:
    """Run one way of a job from the beginning.

    Returns:
        "seconds", "losses" and "tokens" of each step, "curve" ([step, seconds of training so far, score], ...) from
        step 0 on, "resident_bytes" when training ended, "flops_per_step".
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    test, train = split_pairs(distinct(read_pairs(settings.parallel)), settings.test, settings.train, SEED)
    if job == "accuracy":
        return _accuracy(way, settings, _examples(train, settings.train), _examples(test, settings.test))
    return (_fused_retrieval if way == OURS else _stock_retrieval)(settings, train, test)


def distinct(pairs: Sequence[Pair]) -> list[Pair]:
    """Without pairs that share a side with a later one: none may be held out and trained on, or rival itself."""
    for side in ("source", "target"):
        pairs = list({getattr(pair, side): pair for pair in pairs}.values())
    return pairs


class _Course:
    """What a run tells of itself, step by step."""

    def __init__(self, settings: Settings, sentences: Sequence[Sequence], before: float) -> None:
        self._every, self.batches = settings.evaluate_every, list(_batches(len(sentences), settings.steps))
        self._tokens = [sum(len(sentences[n]) for n in batch) for batch in self.batches]
        self._seconds, self._losses, self._curve = [], [], [[0, 0.0, before]]

    def step(self, seconds: float, loss: float, score: Callable[[], float]) -> None:
        """Note a step that was made."""
        self._seconds.append(seconds)
        self._losses.append(loss)
        step, last = len(self._seconds), len(self.batches)
        if step == last:
            self._resident = round(peak_memory_mb() * 2**20)  # scores before came without gradients, and with less
        if step % self._every == 0 or step == last:
            self._curve.append([step, sum(self._seconds), score()])

    def steps(self, step: Callable[[list[int]], Tensor], score: Callable[[], float]) -> None:
        """Make all steps by `step`, which takes a batch and gives its loss."""
        for batch in self.batches:
            begin = time.perf_counter()
            loss = step(batch).item()
            self.step(time.perf_counter() - begin, loss, score)

    def result(self, loss: Callable[[list[int]], Tensor]) -> dict:
        """As `run_job` returns it; `loss` is what `step` differentiates."""
        counted = self.batches[:COUNTED_STEPS]
        flops = sum(count_flops(lambda batch=batch: loss(batch).backward()) for batch in counted)
        return {
            "seconds": self._seconds,
            "losses": self._losses,
            "tokens": self._tokens,
            "curve": self._curve,
            "resident_bytes": self._resident,
            "flops_per_step": round(flops / len(counted)),
        }


def _epochs(count: int, steps: int) -> int:
    return -(-steps // -(-count // BATCH))


def _batches(count: int, steps: int) -> Iterator[list[int]]:
    """As a Trainer takes them."""
    from fastprompt.training.sampler import shuffled

    for epoch in range(_epochs(count, steps)):
        order = shuffled(SEED, epoch, count)
        yield from (order[begin : begin + BATCH] for begin in range(0, count, BATCH))


def _recall(queries: Tensor, english: Tensor) -> float:
    return retrieval_scores(queries, english)["r@1"]


def _fused_retrieval(settings: Settings, pairs: Sequence[Pair], held_out: Sequence[Pair]) -> dict:
    from fastprompt import training
    from fastprompt.models.load import load_backbone
    from fastprompt.models.methods import AdapterConfig
    from fastprompt.tasks.base import Aligned, InputConfig, Item

    backbone, tokenizer = load_backbone(settings.backbone, "cpu", head="none")
    english, queries = ([getattr(pair, side) for pair in held_out] for side in ("source", "target"))
    quiet = {"disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    quiet |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    with TemporaryDirectory() as folder:
        epochs = _epochs(len(pairs), settings.steps)
        trainer = training.Trainer(
            backbone,
            training.TrainingArguments(
                folder, num_train_epochs=epochs, per_device_train_batch_size=BATCH, seed=SEED, **quiet
            ),
            pairs=pairs,
            adapter=AdapterConfig(num_virtual_tokens=PREFIX_ROWS),
            inputs=InputConfig(prefix_text=TEXT_PREFIX, max_length=MAX_LENGTH),
            processing_class=tokenizer,
            on_step=lambda record: clock.step(record["loss"]),
            cache=Path(folder) / "cache",
        )
        trainer.remove_callback(require("transformers", "train").PrinterCallback)
        learner, sentences = trainer.learner, trainer.streams.target
        targets, before = (learner.vectors(texts, source=True) for texts in (english, queries))
        course = _Course(settings, sentences, _recall(before, targets))
        clock = _Clock(course, lambda: _recall(learner.vectors(queries), targets))
        trainer.train()

    def loss(batch: list[int]) -> Tensor:
        teacher = torch.randn(len(batch), targets.shape[1])  # FLOPs do not depend on values
        aligned = [Aligned(Item(ids, len(ids)), [(0, len(ids), 0)]) for ids in (sentences[n] for n in batch)]
        return learner(learner.collate([], aligned, teacher=teacher))["loss"]

    return course.result(loss)


class _Clock:
    """The seconds of each step with all that a Trainer does around it; scores are not counted."""

    def __init__(self, course: _Course, score: Callable[[], float]) -> None:
        self._course, self._score, self._began = course, score, time.perf_counter()

    def step(self, loss: float) -> None:
        """A step is done."""
        self._course.step(time.perf_counter() - self._began, loss, self._score)
        self._began = time.perf_counter()


def _stock_retrieval(settings: Settings, pairs: Sequence[Pair], held_out: Sequence[Pair]) -> dict:
    from fastprompt.demo import stock

    steps = len(list(_batches(len(pairs), settings.steps)))
    job = stock.Job(settings.backbone, pairs, text_prefix=TEXT_PREFIX, seed=SEED, steps=steps)
    torch.manual_seed(SEED)
    with torch.no_grad():
        job.prefix.copy_(0.1 * torch.randn(job.prefix.shape))  # as PromptModel begins
    queries, english = (job.tokens(getattr(pair, side) for pair in held_out) for side in ("target", "source"))
    english = job.plain.all(english)
    course = _Course(settings, job.tokens(pair.target for pair in pairs), _recall(job.plain.all(queries), english))
    course.steps(job.step, lambda: _recall(job.vectors(queries), english))
    return course.result(job.loss)


def _examples(pairs: Sequence[Pair], count: int) -> list[tuple[str, int]]:
    """Sentences and their language: 0 the English ones, 1 their translations; never both of one pair."""
    return [(pair.target, 1) if n % 2 else (pair.source, 0) for n, pair in enumerate(pairs[:count])]


def _padded(sentences: Sequence[list[int]]) -> dict[str, Tensor]:
    """A batch of sentences of token ids."""
    ids = pad_sequence([torch.tensor(each) for each in sentences], batch_first=True)
    lengths = torch.tensor([len(each) for each in sentences])
    return {"input_ids": ids, "attention_mask": torch.arange(ids.shape[1]) < lengths[:, None]}


def _accuracy(way: str, settings: Settings, examples: Sequence[tuple], held_out: Sequence[tuple]) -> dict:
    import fastprompt

    transformers, peft = require("transformers", "train"), require("peft", "bench")
    torch.manual_seed(SEED)
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings.backbone)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        settings.backbone, num_labels=2, dtype=torch.float32
    )
    config = peft.PrefixTuningConfig(task_type=peft.TaskType.SEQ_CLS, num_virtual_tokens=PREFIX_ROWS)
    model = peft.get_peft_model(base, config).eval()  # no dropout: both ways do the same
    prefix = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        prefix.mul_(0.1)  # at full scale the prefix drowns the sentence to begin with
    if way == OURS:
        fastprompt.fuse(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]  # with the head
    optimizer = torch.optim.AdamW(trained, lr=1e-2)

    def prepared(examples: Sequence[tuple]) -> tuple[list[list[int]], Tensor]:
        texts, labels = zip(*examples, strict=True)
        return tokenizer(list(texts), truncation=True, max_length=MAX_LENGTH)["input_ids"], torch.tensor(labels)

    sentences, labels = prepared(examples)
    queries, answers = prepared(held_out)

    def loss(batch: list[int]) -> Tensor:
        return model(**_padded([sentences[n] for n in batch]), labels=labels[batch]).loss

    def step(batch: list[int]) -> Tensor:
        found = loss(batch)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        return found.detach()

    @torch.no_grad()
    def score() -> float:
        parts = (queries[begin : begin + BATCH] for begin in range(0, len(queries), BATCH))
        logits = torch.cat([model(**_padded(part)).logits for part in parts])
        return (logits.argmax(1) == answers).double().mean().item()

    course = _Course(settings, sentences, score())
    course.steps(step, score)
    return course.result(loss)
