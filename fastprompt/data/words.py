"""What counts as a word, and as a name, a number or a content word, in any script."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

# \w lacks the combining marks that Indic scripts and decomposed accents are written with: word_spans() puts this
# private character in their place. Chinese characters and kana stand alone, as nothing shows where a word ends.
_MARK = "\ue000"
_ALONE = (
    "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(
    rf"[{_ALONE}]{_MARK}*"
    rf"|[^\W_{_ALONE}](?:[^\W_{_ALONE}]|[{_MARK}\u200c\u200d]|['’ʼ·](?![sS]\b)(?=[^\W_])|(?<=[^\W\d_])[-‐](?=[^\W\d_])|(?<=\d)[.,:](?=\d))*"
)
_BEFORE_A_SENTENCE = re.compile(r"(?:^|[.!?…:;。！？।؟])[\"'“”‘’«»‹›„()\[\]\s-]*$")

# The most frequent words, as many as make up this share of running text, carry no content. With capitals, which show
# names already, more can be passed over; without, characters that are parts of words must not be.
_FUNCTION_WORDS = {"word": 0.33, "plain": 0.5}
_JOINED = {
    ("number", "number"): "number",
    ("number", "name"): "name",
    ("name", "number"): "name",
    ("name", "name"): "name",
    ("word", "word"): "word",
}
_WIDEST = 4  # words of a unit, and twice as many characters where each is a word


class Unit(NamedTuple):
    """A part of a sentence that another could stand for.

    kind: "number"; "name", words with a capital; "word", words of a script without capitals that are not among the
    most frequent; "plain", a word of four letters or more that is not, of a script with capitals.
    """

    start: int
    end: int
    kind: str


class Corpus:
    """Counts over `texts`, which tell names and content words from others."""

    def __init__(self, texts: Sequence[str]):
        self._small: Counter[str] = Counter()
        self._capital: Counter[str] = Counter()
        for text in texts:
            for start, end in word_spans(text):
                if text[start].isupper():
                    self._capital[word_key(text[start:end])] += not begins_sentence(text, start)
                elif not text[start].isdecimal():
                    self._small[word_key(text[start:end])] += 1
        self._share: dict[str, float] = {}  # of running text: all the words that are more frequent
        done = 0
        for word, count in sorted(self._small.items(), key=lambda item: (-item[1], item[0])):
            self._share[word] = done / self._small.total() if count > 2 else 1.0
            done += count

    def units(self, text: str) -> list[Unit]:
        """The numbers, names and content words of `text`, in order; such as stand side by side are one, if short."""
        runs: list[tuple[Unit, int]] = []  # and of how many words
        for start, end in word_spans(text):
            kind = self._kind(text[start:end])
            last, words = runs[-1] if runs else (Unit(0, 0, ""), 0)
            if text[last.end : start] in ("", " ", "-", "–", "/") and (joined := _JOINED.get((last.kind, kind))):
                runs[-1] = Unit(last.start, end, joined), words + 1
            elif kind:
                runs.append((Unit(start, end, kind), 1))
        return [
            unit
            for unit, words in runs
            if (words <= _WIDEST or unit.end - unit.start <= 2 * _WIDEST)
            and (unit.end - unit.start > 1 or unit.kind == "number")
        ]

    def _kind(self, word: str) -> str:
        key = word_key(word)
        if word[0].isdecimal():
            return "number"
        if word[0].isupper():
            return "name" if len(word) > 1 and self._capital[key] > self._small[key] else ""
        kind = "plain" if key != word.upper() else "word"
        return kind if self._share.get(key, 1.0) >= _FUNCTION_WORDS[kind] and (kind == "word" or len(word) > 3) else ""


def word_spans(text: str) -> list[tuple[int, int]]:
    """Start and end of each word of `text`, in order.

    A word is a run of letters and digits with the combining marks and joiners in it, apostrophes (but 's is a word),
    between letters hyphens and between digits points, commas and colons. A Chinese character or kana is a word of its
    own.
    """
    plain = re.sub(r"[^\w\s]", lambda found: _MARK if unicodedata.category(found[0])[0] == "M" else found[0], text)
    return [found.span() for found in _WORD.finditer(plain)]


def word_key(word: str) -> str:
    """The form in which words are compared and counted: composed (NFC), in lower case."""
    return unicodedata.normalize("NFC", word).lower()


def begins_sentence(text: str, start: int) -> bool:
    """Whether a word at `start` begins a sentence, or a quotation or clause in one: then its capital says nothing."""
    before = text[max(0, start - 8) : start]
    # What stands further back than a few characters does not matter, except that there is something.
    return _BEFORE_A_SENTENCE.search("x" * (start > 8) + before) is not None
