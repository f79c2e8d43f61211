"""Adapter: what was trained, in use."""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastprompt.data.reading import check_count, shorten
from fastprompt.models.generation import evaluating
from fastprompt.tasks.base import Item, Task, without_end
from fastprompt.tasks.retrieval import Retrieval
from fastprompt.tasks.rows import examples_of
from fastprompt.tasks.written import Writer, is_writer

from .index import Hit, Index, check_texts, unit

_CHUNK = 4096  # texts of which batches are made at a time


def load(
    folder: str | Path,
    *,
    backbone: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    task: type[Task] | None = None,
) -> "Adapter":
    """Load what a run trained, with its backbone, from the run's folder alone.

    Args:
        folder: of a run, one of its checkpoints, or one that PEFT wrote (which has no task).
        backbone: a folder or a name on the hub, instead of the one that the run recorded: where it has moved.
        device: where it runs; None: a GPU where there is one.
        dtype: of the backbone's weights, one of `fastprompt.models.load.DTYPES`; None: as in training.
        task: the class of the run's task, where it is one of your own and not one of `fastprompt.tasks.NAMES`.

    Example:
        >>> model = fastprompt.load("run")
        >>> model.predict(["Not bad at all."])
        [{'prediction': 'good', 'probability': 0.93}]

    Raises:
        FileNotFoundError, ValueError: the folder or the backbone is not there, is damaged, or does not fit the other;
            or the run's task is not one of `fastprompt.tasks.NAMES`, and `task` is not given.
    """
    from fastprompt.training import run

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder must be that of a run, got {str(folder)!r}, which is no folder")
    learner = run.load_learner(folder, device=device, dtype=dtype, backbone=backbone, task=task)
    home = run.home_of(folder)
    return Adapter(learner) if home is None else Adapter(learner, run.read_run(home), run.read_scores(home))


class Adapter:
    """A trained adapter on its backbone: `fastprompt.load` makes it.

    All passes run without gradients and in evaluation mode, and batches are of texts of like length. Several threads
    may share an adapter, as those of a server do: their calls take turns. Different adapters share nothing.

    Args:
        learner: a `fastprompt.training.Learner`.
        info: what the folder of its run says, a `fastprompt.training.RunInfo`; None where nothing is known.
        scores: the best of the run's evaluations, by name.

    Example:
        >>> model = fastprompt.load("run")
        >>> model.predict(["Not bad at all."])  # of a task
        [{'prediction': 'good', 'probability': 0.93}]
        >>> model.search(["Bore da."], ["Good night.", "Good morning."], top_k=1)  # of an alignment
        [[Hit(index=1, score=0.91, text='Good morning.')]]
    """

    def __init__(self, learner, info=None, scores: Mapping[str, float] | None = None) -> None:
        self.learner, self.info, self.scores, self._turn = learner, info, scores or {}, threading.RLock()

    @property
    def task(self) -> str | None:
        """The task's name; None of a run without one."""
        return None if self.learner.task is None else self.learner.task.name

    @property
    def labels(self) -> list[str] | None:
        """The names of the task's classes or tags, where it has such."""
        settings = {} if self.learner.task is None else self.learner.task.settings()
        return settings.get("labels") or settings.get("tags")

    @property
    def language(self) -> str:
        """The language of the texts that it was trained for: some scores go by it."""
        return "en" if self.info is None else self.info.language

    @property
    def backbone(self) -> str:
        """The backbone's name: its folder, or its name on the hub."""
        return self.learner.backbone.name_or_path

    def __repr__(self) -> str:
        trained = sum(parameter.numel() for parameter in self.learner.trained().values())
        about = {"task": self.task, "labels": self.labels, "method": self.learner.adapter.method}
        about |= {"backbone": self.backbone, "language": self.language, "device": str(self.learner.device)}
        shown = [f"{name}={shorten(value)}" for name, value in about.items() if value is not None]
        return f"Adapter({', '.join(shown)}, {trained:,} trained parameters)"

    @contextmanager
    def _pass(self) -> Iterator[None]:
        with self._turn, evaluating(self.learner), torch.no_grad():
            yield

    # -- the task ----------------------------------------------------------------------------------------------------

    def predict(
        self,
        data,
        *,
        batch_size: int = 32,
        columns: Mapping[str, str] | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[dict[str, Any]]:
        """A prediction for each row, in their order: "prediction", and what else the task gives, such as "probability".

        Args:
            data: rows without labels: a list of texts, where the task reads one; of tuples with a value for each
                column; of dicts by column; of the task's own examples; a `datasets.Dataset`, a pandas DataFrame, or
                the path of a table.
            batch_size: how many inputs a pass takes.
            columns: what the data calls columns of the task, such as {"text": "sentence"}.
            on_batch: a function that is called after each pass with the number of its inputs.

        Raises:
            TypeError, ValueError: the run has no task, or a row is not as the task reads it: which, and what came.
        """
        task = self._task("predict")
        check_count("batch_size", batch_size)
        return self._predicted(list(examples_of(task, data, columns, labelled=False)), batch_size, on_batch)

    def predict_stream(
        self, data, chunk: int = 2048, *, batch_size: int = 32, columns: Mapping[str, str] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield what `predict` returns, for any number of rows.

        Args:
            data, batch_size, columns: as `predict` takes them.
            chunk: how many rows are in memory at a time; batches of like length are made among them.
        """
        task = self._task("predict_stream")
        for name, value in (("chunk", chunk), ("batch_size", batch_size)):
            check_count(name, value)
        return self._stream(examples_of(task, data, columns, labelled=False), chunk, batch_size)

    def _stream(self, examples: Iterator, chunk: int, batch_size: int) -> Iterator[dict[str, Any]]:
        while part := list(itertools.islice(examples, chunk)):
            yield from self._predicted(part, batch_size)

    def _predicted(self, examples: Sequence, batch_size: int, on_batch: Callable | None = None) -> list[dict]:
        if not examples:
            return []
        with self._pass():
            return self.learner.predict(examples, batch_size=batch_size, on_batch=on_batch)

    def score(
        self, data, *, language: str | None = None, batch_size: int = 32, columns: Mapping[str, str] | None = None
    ) -> dict[str, float]:
        """The task's scores on labelled rows; of a run without a task, how well translations find their sentences.

        Args:
            data, columns, batch_size: as `predict` takes them; the label stands last in a tuple. Without a task the
                rows are pairs: source and target.
            language: the texts' language, for scores whose rules go by it; None: that of the run.

        Raises:
            TypeError, ValueError: no rows, or one that is not as the task reads it: which, and what came.
        """
        check_count("batch_size", batch_size)
        learner = self.learner
        task, predict = learner.task, learner.predict
        if task is None:
            task = Retrieval()
            predict = partial(task.predict, learner)
        examples = list(examples_of(task, data, columns, labelled=True))
        if not examples:
            raise ValueError("data must have at least one row to be scored, got none")
        with self._pass():
            predictions = predict(examples, batch_size=batch_size)
        return task.scores(examples, predictions, language or self.language)

    def _task(self, method: str) -> Task:
        if self.learner.task is None:
            raise ValueError(f"{method} needs a task, and this run has none: encode and search are what it can do")
        return self.learner.task

    # -- vectors -----------------------------------------------------------------------------------------------------

    def encode(
        self, texts: Sequence[str], *, source: bool = False, batch_size: int = 32, normalize: bool = False
    ) -> np.ndarray:
        """(N, D) float32 vectors of texts.

        Args:
            texts: texts in the language that was trained; their vectors are comparable with those of English texts.
            source: whether the texts are English: their vectors are those of the backbone alone, without what was
                trained.
            batch_size: how many texts a pass takes.
            normalize: whether each vector is brought to length 1.

        Raises:
            TypeError, ValueError: something is no text or has no token, or a vector is not finite.
        """
        backbone = self.learner.backbone
        if backbone.config.is_encoder_decoder:
            raise ValueError(f"encode needs an encoder or a decoder, got {type(backbone).__name__}, which is both")
        texts = check_texts("texts", texts)
        check_count("batch_size", batch_size)
        vectors = np.zeros((len(texts), backbone.config.get_text_config().hidden_size), np.float32)
        # Batches of like length are made of some thousands of texts at a time, and other threads have turns between.
        for begin in range(0, len(texts), _CHUNK):
            part = texts[begin : begin + _CHUNK]
            with self._pass():
                vectors[begin : begin + _CHUNK] = self.learner.vectors(part, source=source, batch_size=batch_size)
        bad = np.flatnonzero(~np.isfinite(vectors).all(1))
        if len(bad):
            raise ValueError(
                f"texts give NaN or infinity in {len(bad)} of {len(texts)} vectors with this backbone in "
                f"{backbone.dtype}, the first of them for {shorten(texts[bad[0]])}"
            )
        return unit(vectors) if normalize else vectors

    def search(
        self, queries: Sequence[str], corpus: Sequence[str] | Index, top_k: int = 5, *, batch_size: int = 32
    ) -> list[list[Hit]]:
        """For each query the `top_k` nearest texts of an English corpus by cosine, the nearest first.

        Args:
            queries: texts in the language that was trained.
            corpus: English texts, or an `Index` of their vectors, which need be made only once:
                `Index(adapter.encode(texts, source=True), texts)`.
            top_k: how many hits a query has; fewer where the corpus has no more.
            batch_size: how many texts a pass takes.

        Raises:
            TypeError, ValueError: as `encode` and `Index`.
        """
        check_count("top_k", top_k)
        queries = check_texts("queries", queries)
        if not isinstance(corpus, Index):
            corpus = check_texts("corpus", corpus)
            corpus = Index(self.encode(corpus, source=True, batch_size=batch_size), corpus)
        return corpus.search(self.encode(queries, batch_size=batch_size), top_k)

    # -- text --------------------------------------------------------------------------------------------------------

    def generate(self, texts: Sequence[str], *, batch_size: int = 32, **options) -> list[str]:
        """What the model writes after each text (an encoder-decoder: for it), without special tokens.

        Args:
            texts: prompts; the run's prefix_text comes before each. Templates and chats are the task's: see `predict`.
            batch_size: how many texts a pass takes.
            options: options of transformers' `generate`, such as max_new_tokens (64 by default), do_sample or
                num_beams.

        Raises:
            TypeError, ValueError: the model has no head to write with, something is no text, or an option says how the
                inputs are given, which `texts` does.
        """
        backbone, tokenizer = self.learner.backbone, self.learner.tokenizer
        if not is_writer(backbone):
            raise ValueError(f"generate needs a model that writes, with its head, got {type(backbone).__name__}")
        taken = options.keys() & {"input_ids", "inputs", "inputs_embeds", "attention_mask", "num_return_sequences"}
        if taken:
            raise ValueError(f"options must not have {', '.join(sorted(taken))}: each text is given once, as it stands")
        check_count("batch_size", batch_size)
        texts = [self.learner.inputs.prefix_text + text for text in check_texts("texts", texts)]
        if not {"max_new_tokens", "max_length", "generation_config"} & options.keys():
            options["max_new_tokens"] = 64
        writer, items = Writer(backbone, tokenizer), []
        with self._pass():
            if texts:
                ids = tokenizer(texts)["input_ids"] if writer.is_encoder_decoder else without_end(tokenizer, texts)
                items = [Item(each, len(each)) for each in ids]
            empty = next((text for text, item in zip(texts, items, strict=True) if not item.ids), None)
            if empty is not None:
                raise ValueError(f"texts must have at least one token each, got none for {shorten(empty)}")
            return writer.generated(self.learner.model, items, self._ends(options), batch_size, **options)

    def _ends(self, options: Mapping) -> list[int]:
        """The tokens that end a text; what stands behind them is filling."""
        if "eos_token_id" in options:
            given, own = options["eos_token_id"], None
        else:
            config = options.get("generation_config") or self.learner.backbone.generation_config
            given, own = config.eos_token_id, self.learner.tokenizer.eos_token_id
        given = given.tolist() if isinstance(given, Tensor) else given
        given = given if isinstance(given, list | tuple) else [given]
        return list(dict.fromkeys(each for each in (own, *given) if each is not None))

    def export(self, to: str, directory: str | Path, **options):
        """Write what was trained into a folder that other software opens.

        Args:
            to, directory, options: as `fastprompt.export.export` takes them; `info` and `scores` are this adapter's.

        Returns:
            The directory.
        """
        from fastprompt.export import export

        return export(self.learner, to, directory, **{"info": self.info, "scores": self.scores} | options)
