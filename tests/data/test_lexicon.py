"""A lexicon learnt from made-up parallel text, and the words of several scripts."""

import itertools
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprompt.data.examples import Pair
from fastprompt.data.lexicon import learn_lexicon
from fastprompt.data.words import Corpus, begins_sentence, word_spans

NOUNS = {"dog": "Hund", "cat": "Katze", "horse": "Pferd", "king": "König", "house": "Haus"}
VERBS = {"sees": "sieht", "finds": "findet", "loves": "liebt"}
GERMAN = [
    Pair(f"The {one} {verb} a {two} .", f"{NOUNS[two]} , den {VERBS[verb]} {NOUNS[one]} .")
    for one, verb, two in itertools.product(NOUNS, VERBS, NOUNS)
    if one != two
]


def words(text: str) -> list[str]:
    return [text[start:end] for start, end in word_spans(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't stop, well-known_x: 1,234.5 at 10:30.", ["Don't", "stop", "well-known", "x", "1,234.5", "at", "10:30"]),
        ("Luther's 24–10", ["Luther", "s", "24", "10"]),
        ("यस पृष्ठको स्रोत", ["यस", "पृष्ठको", "स्रोत"]),
        (
            unicodedata.normalize("NFD", "Àtúnṣe ìdí"),
            [unicodedata.normalize("NFD", each) for each in ("Àtúnṣe", "ìdí")],
        ),
        ("在1519年 Luther。", ["在", "1519", "年", "Luther"]),
        ("コーヒー・ガ", list("コーヒーガ")),
        ("か\u3099く", ["か\u3099", "く"]),
        ("❤️ good 👩‍👩‍👧 end", ["good", "end"]),
        ("", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


@given(st.text())
def test_words_are_in_order_and_not_empty(text):
    ends = [place for span in word_spans(text) for place in span]
    assert ends == sorted(ends)
    assert all(start < end for start, end in word_spans(text))


def test_beginning_of_a_sentence():
    text = 'One day. Then he said: "Never in Rome".'
    assert [
        each for each, (start, _) in zip(words(text), word_spans(text), strict=True) if begins_sentence(text, start)
    ] == [
        "One",
        "Then",
        "Never",
    ]


def test_units():
    text = "The old Queen Anne rode to Bath on 12 March 1702 with cheerful people."
    corpus = Corpus([text, *["the old of to on with"] * 9])
    assert [(text[unit.start : unit.end], unit.kind) for unit in corpus.units(text)] == [
        ("Queen Anne", "name"),
        ("rode", "plain"),
        ("Bath", "name"),
        ("12 March 1702", "name"),
        ("cheerful", "plain"),
        ("people", "plain"),
    ]


def test_units_without_capitals():
    text = "猫在火山的川在1519"
    corpus = Corpus([text, "的在的在的在", "春天东京去了他们来学校"])
    assert [(text[unit.start : unit.end], unit.kind) for unit in corpus.units(text)] == [
        ("火山", "word"),
        ("1519", "number"),
    ]


def test_lexicon():
    lexicon = learn_lexicon(GERMAN)
    assert {word: lexicon.get(word) for word in NOUNS | VERBS} == NOUNS | VERBS
    assert learn_lexicon(GERMAN) == lexicon


def test_lexicon_of_characters():
    names = {"london": "伦敦", "lake": "湖", "bread": "面包", "tea": "茶"}
    pairs = [Pair(f"{one} {two}", f"{names[one]}，{names[two]}") for one, two in itertools.permutations(names, 2)]
    assert learn_lexicon(pairs) == names


def test_words_seen_once_are_left_out():
    assert learn_lexicon([*GERMAN, Pair("Mozilla crashes", "Mozilla stürzt")]) == learn_lexicon(GERMAN)


def test_composed_and_decomposed_are_one_word():
    decomposed = [
        Pair(unicodedata.normalize("NFD", pair.source), unicodedata.normalize("NFD", pair.target)) for pair in GERMAN
    ]
    assert learn_lexicon(GERMAN[::2] + decomposed[1::2]) == learn_lexicon(GERMAN)


def test_threshold():
    assert len(learn_lexicon(GERMAN, threshold=0.95)) < len(learn_lexicon(GERMAN, threshold=0.0))


def test_pairs_without_words():
    assert learn_lexicon([Pair("...", "!"), Pair("one", "?")]) == {}


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([], {}, "pairs must hold at least one pair, got none"),
        (GERMAN, {"iterations": 0}, "iterations must be a positive integer, got 0"),
        (GERMAN, {"threshold": 1.5}, r"threshold must lie in \[0, 1\], got 1.5"),
    ],
)
def test_errors(pairs, options, message):
    with pytest.raises(ValueError, match=message):
        learn_lexicon(pairs, **options)
