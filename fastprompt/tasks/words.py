"""What counts as a word, in any script."""

import re
import unicodedata

# \w lacks the combining marks that Indic scripts and decomposed accents are written with: word_spans() puts this
# private character in their place. Chinese characters and kana stand alone, as nothing shows where a word ends.
_MARK = "\ue000"
_ALONE = (
    "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(
    rf"[{_ALONE}]{_MARK}*"
    rf"|[^\W_{_ALONE}](?:[^\W_{_ALONE}]|[{_MARK}\u200c\u200d]|['’ʼ·](?=[^\W_])|(?<=[^\W\d_])[-‐](?=[^\W\d_])|(?<=\d)[.,:](?=\d))*"
)
_BEFORE_A_SENTENCE = re.compile(r"(?:^|[.!?…:;。！？।؟])[\"'“”‘’«»‹›„()\[\]\s-]*$")


def word_spans(text: str) -> list[tuple[int, int]]:
    """Start and end of each word of `text`, in order.

    A word is a run of letters and digits with the combining marks and joiners in it, the apostrophes and, between
    letters, hyphens and, between digits, points, commas and colons; a Chinese character or kana is a word of its own.
    """
    plain = re.sub(r"[^\w\s]", lambda found: _MARK if unicodedata.category(found[0])[0] == "M" else found[0], text)
    return [found.span() for found in _WORD.finditer(plain)]


def word_key(word: str) -> str:
    """The form in which words are compared and counted: composed (NFC), in lower case."""
    return unicodedata.normalize("NFC", word).lower()


def begins_sentence(text: str, start: int) -> bool:
    """Whether a word at `start` begins a sentence, or a quotation or clause in one: then its capital says nothing."""
    return _BEFORE_A_SENTENCE.search(text[:start][-8:] if start > 8 else text[:start]) is not None
