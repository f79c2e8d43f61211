"""Vectors that are searched by cosine."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastprompt._files import write_aside, write_text
from fastprompt.data.reading import check_count, read_text, shorten

_SPARE = 8  # candidates of a search beyond those that are asked for
_ROWS, _QUERIES = 1 << 16, 256  # of the corpus, and queries, whose scores exist at once
_TIE = 1e-5  # scores in float32 that are no further apart may be the same


class Hit(NamedTuple):
    """A text of a corpus that a search found.

    Attributes:
        index: its place in the corpus.
        score: its cosine with the query.
        text: None where the index holds no texts.
    """

    index: int
    score: float
    text: str | None


class Index:
    """Vectors to be searched by cosine: exactly, through faiss where that is installed, else with torch.

    Hits of the same score come in the order of the corpus, so that both ways give the same. A vector of zeros has the
    score 0 with all.

    Args:
        vectors: (N, D), a numpy array or a tensor.
        texts: N texts, for the hits to show; None: hits show none.

    Attributes:
        vectors: (N, D) float32, of length 1.
        texts: the texts, or None.

    Example:
        >>> index = Index(np.eye(2), ["one", "two"])
        >>> index.search(np.array([[0.0, 3.0]]), top_k=1)
        [[Hit(index=1, score=1.0, text='two')]]

    Raises:
        TypeError, ValueError: no floating-point numbers or no such shape, a vector that is not finite, or not as many
            texts as vectors.
    """

    def __init__(self, vectors: np.ndarray | Tensor, texts: Sequence[str] | None = None) -> None:
        self.vectors = unit(matrix("vectors", vectors))
        self.texts = None if texts is None else check_texts("texts", texts)
        if self.texts is not None and len(self.texts) != len(self.vectors):
            raise ValueError(f"texts must be one for each of {len(self.vectors)} vectors, got {len(self.texts)}")

    def __len__(self) -> int:
        return len(self.vectors)

    def search(self, queries: np.ndarray | Tensor, top_k: int = 5) -> list[list[Hit]]:
        """For each query the `top_k` nearest vectors, the nearest first; fewer where there are no more.

        Args:
            queries: (M, D), a numpy array or a tensor.
            top_k: how many hits a query has.

        Raises:
            TypeError, ValueError: no floating-point numbers, another number of features, a vector that is not finite,
                or a `top_k` that is no positive integer.
        """
        check_count("top_k", top_k)
        queries = unit(matrix("queries", queries))
        if queries.shape[1] != self.vectors.shape[1]:
            raise ValueError(f"queries must have the index's {self.vectors.shape[1]} features, got {queries.shape[1]}")
        top_k, count = min(top_k, len(self)), min(top_k + _SPARE, len(self))
        hits = []
        for begin in range(0, len(queries) if top_k else 0, _QUERIES):
            part = queries[begin : begin + _QUERIES]
            for query, found in zip(part, _nearest(part, self.vectors, count), strict=True):
                hits.append(self._hits(query.astype(np.float64), found, top_k))
        return hits or [[] for _ in queries]

    def _hits(self, query: np.ndarray, found: np.ndarray, top_k: int) -> list[Hit]:
        """The best of the candidates, in float64; of all, where what was not found may be as near as the last."""
        scores = self.vectors[found].astype(np.float64) @ query
        if len(found) < len(self) and scores.min() > np.partition(scores, -top_k)[-top_k] - _TIE:
            found = np.arange(len(self))
            parts = range(0, len(self), _ROWS)
            scores = np.concatenate([self.vectors[n : n + _ROWS].astype(np.float64) @ query for n in parts])
        scores = scores.round(12)  # a product need not give equal rows equal results
        best = np.lexsort((found, -scores))[:top_k]
        texts = self.texts
        return [Hit(int(found[n]), float(scores[n]), None if texts is None else texts[found[n]]) for n in best]

    def save(self, path: str | Path) -> None:
        """Write the vectors to `path`.npy and the texts, if there are any, to `path`.jsonl beside it."""
        array, texts = _files(path)
        array.parent.mkdir(parents=True, exist_ok=True)
        texts.unlink(missing_ok=True)  # those of another index must not stand beside these vectors
        write_aside(array, lambda aside: np.save(aside, self.vectors))
        if self.texts is not None:
            lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in self.texts)
            write_text(texts, "".join(lines))

    @classmethod
    def load(cls, path: str | Path) -> "Index":
        """Read what `save` wrote, or vectors of another origin that `numpy.save` did.

        Raises:
            FileNotFoundError, TypeError, ValueError: it is not there, is damaged, or vectors and texts are not of each
                other.
        """
        array, file = _files(path)
        try:
            vectors = np.load(array, allow_pickle=False)
        except (EOFError, ValueError) as error:
            raise ValueError(f"{array} is damaged, or no array of numpy's: {error}") from error
        texts = None
        if file.is_file():
            lines = read_text(file).split("\n")
            try:
                texts = [json.loads(line)["text"] for line in lines if line]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{file} is damaged: each line must be JSON such as {{'text': '...'}}") from error
        try:
            return cls(vectors, texts)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{array}: {error}") from error


def _files(path: str | Path) -> tuple[Path, Path]:
    name = str(path).removesuffix(".npy")
    return Path(name + ".npy"), Path(name + ".jsonl")


def _nearest(queries: np.ndarray, vectors: np.ndarray, count: int) -> np.ndarray:
    """(M, count) places of the vectors with the largest products, in any order, up to float32's rounding."""
    faiss = _faiss()
    if faiss is not None:  # what IndexFlatIP does, without its copy of the vectors
        return faiss.knn(queries, vectors, count, metric=faiss.METRIC_INNER_PRODUCT)[1]
    queries, best = torch.from_numpy(queries), []
    for begin in range(0, len(vectors), _ROWS):
        scores = queries @ torch.from_numpy(vectors[begin : begin + _ROWS]).T
        scores, places = scores.topk(min(count, scores.shape[1]))
        best.append((scores, places + begin))
    scores, places = (torch.cat(each, 1) for each in zip(*best, strict=True))
    return places.gather(1, scores.topk(count).indices).numpy()


def _faiss():
    try:
        import faiss
    except ImportError:
        return None
    return faiss


def check_texts(name: str, texts: Sequence[str]) -> list[str]:
    """The texts as a list; a TypeError names what is not a list of texts, or not a text in it."""
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise TypeError(f"{name} must be a list of texts, got {shorten(texts)}")
    texts = list(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a list of texts, got {shorten(text)} at {number}")
    return texts


def matrix(name: str, vectors: np.ndarray | Tensor) -> np.ndarray:
    """Vectors as an array (N, D) of finite floating-point numbers; a TypeError or ValueError names what is not."""
    found = vectors.detach().cpu().double().numpy() if isinstance(vectors, Tensor) else np.asarray(vectors)
    if not np.issubdtype(found.dtype, np.floating):
        raise TypeError(f"{name} must be floating point, got {found.dtype}")
    if found.ndim != 2 or found.shape[1] == 0:
        raise ValueError(f"{name} must have shape (N, D), got {found.shape}")
    bad = int((~np.isfinite(found)).any(1).sum())
    if bad:
        raise ValueError(f"{name} must be finite, got NaN or infinity in {bad} of {len(found)} rows")
    return found


def unit(vectors: np.ndarray) -> np.ndarray:
    """Each vector at length 1, float32; zeros stay zeros."""
    largest = np.abs(vectors).max(1, keepdims=True, initial=0)  # squares of the largest numbers have no place
    vectors = vectors / np.where(largest > 0, largest, 1)
    length = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return np.ascontiguousarray(vectors / np.where(length > 0, length, 1), np.float32)
