"""Labelled data made without labels: cloze questions, pairs of paraphrases, code-switched text."""

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from .parallel import Pair
from .pawsx import Example
from .squad import Answer, Question
from .words import begins_sentence, word_key, word_spans

_SENTENCE = re.compile(r"\S(?:.*?(?:(?<![\s.][A-Z])(?<!^[A-Z])[.!?…]+[\"'”’»)\]]*(?=\s)|[。！？｡।۔؟።]+[”」』）]*)|.*)", re.S)
_CLAUSE_END = re.compile(r"[,;:，、；：،؛]+(?:\s+|(?=[^\s\d]))|\s[–—-]+\s|\s*[()（）]\s*")
_FUNCTION_WORDS = 0.4  # share of running text that the most frequent words make up, which are no answers
_WIDEST = 4  # words of an answer; twice as many characters where each is a word
_WINDOW = 10  # words at most on either side of the blank


class _Unit(NamedTuple):
    """A number, a name or, where a script has no capitals, a run of words that are not among the most frequent."""

    start: int
    end: int
    number: bool


class _Corpus:
    """Counts over `texts` that tell names and content words from others."""

    def __init__(self, texts: Sequence[str]):
        self._lower: Counter[str] = Counter()
        self._capital: Counter[str] = Counter()
        for text in texts:
            for start, end in word_spans(text):
                if not text[start].isupper():
                    self._lower[word_key(text[start:end])] += 1
                elif not begins_sentence(text, start):
                    self._capital[word_key(text[start:end])] += 1
        self._frequent = set()
        left = _FUNCTION_WORDS * self._lower.total()
        for word, count in sorted(self._lower.items(), key=lambda item: (-item[1], item[0])):
            if left < count or count < 3:
                break
            left -= count
            self._frequent.add(word)

    def units(self, text: str) -> list[_Unit]:
        """The numbers, names and content words of `text`, in order; adjacent ones are one."""
        runs: list[list[tuple[int, int, str]]] = []
        for start, end in word_spans(text):
            kind = self._kind(text[start:end])
            if not kind:
                continue
            last = runs[-1][-1] if runs else None
            joined = last and text[last[1] : start] in ("", " ", "-", "–") and (kind == last[2] or kind != "word" != last[2])
            if joined:
                runs[-1].append((start, end, kind))
            else:
                runs.append([(start, end, kind)])
        return [
            _Unit(run[0][0], run[-1][1], all(kind == "number" for _, _, kind in run))
            for run in runs
            if len(run) <= (2 * _WIDEST if run[-1][1] - run[0][0] <= 2 * _WIDEST else _WIDEST)
        ]

    def _kind(self, word: str) -> str:
        key = word_key(word)
        if word[0].isnumeric():
            # A numeral such as 一 is letter and number, and in most words not the latter.
            return "number" if word[0].isdecimal() else "word" if key not in self._frequent else ""
        if word[0].isupper():
            return "name" if len(word) > 1 and self._capital[key] > self._lower[key] else ""
        cased = key != word.upper()
        return "" if cased or key in self._frequent else "word"
