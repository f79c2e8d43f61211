"""Pseudo-data: what must hold of it in any script, and when it is refused."""

import itertools
import random
import unicodedata
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprompt.data.examples import Answer, Pair, Question
from fastprompt.data.pseudo import cloze_questions, code_switch, code_switch_question, paraphrase_pairs
from fastprompt.data.words import word_key, word_spans

NAMES = ["Berlin", "Rome", "Paris", "Vienna", "Cairo", "Tokyo"]
ENGLISH = [
    f"The old king went from {one} to {two} with all of his men. "
    f"He came back in {1800 + number} 👑, tired but happy, as they say."
    for number, (one, two) in enumerate(itertools.permutations(NAMES, 2))
]
DEVANAGARI = [
    f"राजा की यात्रा {one} से {two} की ओर थी और वह की बात है। फिर वह की ओर से {number} में की ओर आया।"
    for number, (one, two) in enumerate(itertools.permutations(["दिल्ली", "मुंबई", "काठमाडौं", "पटना"], 2), 1857)
]
CHINESE = [
    f"他在{number}年的春天去了{one}，的在了是他的。他在的是了{two}的，在。"
    for number, (one, two) in enumerate(itertools.permutations(["伦敦", "巴黎", "东京", "开罗"], 2), 1900)
]
DECOMPOSED = [unicodedata.normalize("NFD", text.replace("Cairo", "Ọ̀yọ́").replace("Rome", "Ìbàdàn")) for text in ENGLISH]
LEXICON = {
    "king": "König",
    "went": "ging",
    "old": "alte",
    "from": "aus",
    "men": "Männern",
    "rome": "Rom",
    "back": "zurück",
}
PAIRS = [
    Pair(
        f"{one} beat {two} by {number + 3} points in the final of {1900 + number} .",
        f"Im Endspiel von {1900 + number} schlug {one} {two} mit {number + 3} Punkten Vorsprung .",
    )
    for number, (one, two) in enumerate(itertools.permutations(NAMES, 2))
]


@pytest.mark.parametrize("passages", [ENGLISH, DEVANAGARI, CHINESE, DECOMPOSED], ids=["en", "hi", "zh", "nfd"])
def test_cloze_questions(passages):
    questions = cloze_questions(passages, count=12, seed=0)
    assert len(questions) == len({each.id for each in questions}) == 12
    assert len({(each.question, each.context) for each in questions}) == 12
    for _, question, context, answers in questions:
        [(text, start)] = answers
        assert context in passages
        assert context[start : start + len(text)] == text != ""
        assert question.count("___") == 1 and question.endswith("?")
        assert word_key(text) not in word_key(question), "the question gives the answer away"
        assert question.rstrip("?") not in context
        spans = word_spans(context)
        assert start in {first for first, _ in spans} and start + len(text) in {last for _, last in spans}
    assert cloze_questions(passages, count=12, seed=0) == questions
    assert cloze_questions(passages, count=12, seed=1) != questions


def test_cloze_questions_come_from_all_passages_in_turn():
    questions = cloze_questions(ENGLISH, count=len(ENGLISH), seed=3)
    assert {each.context for each in questions} == set(ENGLISH)


def test_answers_are_names_and_numbers():
    answers = {each.answers[0].text for each in cloze_questions(ENGLISH, count=80, seed=0)}
    assert answers <= {*NAMES, *map(str, range(1800, 1800 + len(ENGLISH)))}


def test_blank():
    assert all("what" in each.question for each in cloze_questions(ENGLISH, 9, 0, blank="what"))


@pytest.mark.parametrize(
    ("passages", "count", "message"),
    [
        ([], 1, "passages must hold at least one, got none"),
        (ENGLISH, 0, "count must be a positive integer, got 0"),
        (
            ["nothing with a name is in this very long sentence."],
            1,
            "count must be at most 0, as many as could be made of 1 passages, got 1",
        ),
        (ENGLISH[:1] * 2, 50, "count must be at most 3, .* of 2 passages, got 50"),
    ],
)
def test_cloze_errors(passages, count, message):
    with pytest.raises(ValueError, match=message):
        cloze_questions(passages, count, seed=0)


@pytest.mark.parametrize("lexicon", [None, {"beat": "schlug", "points": "Punkte", "final": "Endspiel"}])
@pytest.mark.parametrize("count", [1, 20, 41])
def test_paraphrase_pairs(lexicon, count):
    examples = paraphrase_pairs(PAIRS, count, seed=0, lexicon=lexicon)
    labels = Counter(each.label for each in examples)
    assert (labels["1"], labels["0"]) == (count - count // 2, count // 2)
    assert len({each.id for each in examples}) == count
    assert len({frozenset(each[1:3]) for each in examples}) == count, "an example twice, or with two labels"
    assert all(each.text != each.text_pair for each in examples)
    assert paraphrase_pairs(PAIRS, count, seed=0, lexicon=lexicon) == examples
    assert count == 1 or paraphrase_pairs(PAIRS, count, seed=1, lexicon=lexicon) != examples


def facts(text: str) -> list[str]:
    """The names and numbers of a sentence, in the order of PAIRS' English."""
    found = [text[start:end] for start, end in word_spans(text) if text[start:end] in NAMES or text[start].isdigit()]
    return found[1:] + found[:1] if text.startswith("Im ") else found


def test_labels_are_true():
    examples = paraphrase_pairs(PAIRS, 2 * len(PAIRS), seed=0)
    for _, one, two, label in examples:
        assert (facts(one) == facts(two)) == (label == "1")


def test_both_kinds_of_negatives():
    originals = {text for pair in PAIRS for text in pair[:2]}
    examples = paraphrase_pairs(PAIRS, 40, seed=0)
    exchanged = [sum(text not in originals for text in each[1:3]) for each in examples if each.label == "0"]
    assert Counter(exchanged) == {0: 10, 1: 10}
    for _, one, two, label in examples:
        if label == "0" and not {one, two} <= originals:
            assert sorted(facts(one)) == sorted(facts(two)), "an exchange keeps the words"


def test_exchanged_sentences_do_not_tell_the_label():
    originals = {text for pair in PAIRS for text in pair[:2]}
    examples = paraphrase_pairs(PAIRS, 2 * len(PAIRS), seed=0)
    labels = Counter(each.label for each in examples if not {*each[1:3]} <= originals)
    assert labels["0"] and labels["1"]


def test_names_within_each_other_are_not_exchanged_in_the_translation():
    pairs = [Pair("So York went on to see York City again", "Dann sah er York City"), Pair("Then he went on", "Ja")]
    corpus = [Pair("so in York", "er"), Pair("so in City", "sie")] * 9
    examples = [example for seed in range(20) for example in paraphrase_pairs(pairs + corpus, 4, seed)]
    texts = {text for example in examples for text in example[1:3]}
    assert "So York City went on to see York again" in texts
    assert {text for text in texts if text.startswith("Dann")} == {"Dann sah er York City"}


def test_with_a_lexicon_exchanged_sentences_are_in_positives_too():
    pairs = [pair._replace(target=f"Satz {number}") for number, pair in enumerate(PAIRS)]
    examples = paraphrase_pairs(pairs, 60, 0, {"beat": "schlug", "points": "Punkten", "final": "Endspiel"})
    switched = [each for each in examples if "Satz" not in each.text + each.text_pair]
    assert all((facts(each.text) == facts(each.text_pair)) == (each.label == "1") for each in switched)
    originals = [facts(pair.source) for pair in pairs]
    assert {each.label for each in switched if facts(each.text) not in originals} == {"0", "1"}


def test_nearest_shares_most_words():
    pairs = [Pair("a red fox sleeps in here", "A"), Pair("a red fox sits in there", "B"), Pair("some other words", "C")]
    for _, one, two, label in paraphrase_pairs(pairs, 2, seed=0) * 9:
        assert label == "1" or "C" not in (one, two)


def test_labels_of_pairs_are_ignored():
    assert paraphrase_pairs([pair._replace(label="x") for pair in PAIRS], 9, 0) == paraphrase_pairs(PAIRS, 9, 0)


@pytest.mark.parametrize(
    ("pairs", "count", "message"),
    [
        ([], 1, "pairs must hold at least one, got none"),
        (PAIRS, 0, "count must be a positive integer, got 0"),
        (PAIRS, 99, "count must be at most 60, as many as could be made of 30 pairs, got 99"),
        ([Pair("one", "eins")], 2, "count must be at most 0, .* of 1 pairs, got 2"),
    ],
)
def test_paraphrase_errors(pairs, count, message):
    with pytest.raises(ValueError, match=message):
        paraphrase_pairs(pairs, count, seed=0)


def test_code_switch():
    text = "The king WENT, old king’s men 👑 from Rome."
    assert code_switch(text, LEXICON, 1.0, random.Random(0)) == "The König Ging, alte König’s Männern 👑 aus Rom."
    assert code_switch(text, LEXICON, 0.0, random.Random(0)) == text
    some = [code_switch("king " * 400, {"king": "x"}, 0.25, random.Random(seed)).count("x") for seed in (1, 1, 2)]
    assert some[0] == some[1] != some[2] and 60 < some[0] < 140


def test_code_switch_keeps_what_is_the_same():
    assert code_switch("ROME Rome", {"rome": "rome"}, 1.0, random.Random(0)) == "ROME Rome"


def test_code_switch_of_a_question():
    context = "Old 👑 men went back. The king of Rome rode."
    question = Question("7", "Who went?", context, [Answer("king of Rome", 25), Answer("ome", 34), Answer("Old", 0)])
    switched = code_switch_question(question, LEXICON, 1.0, random.Random(0))
    new = "Alte 👑 Männern ging zurück. The König of Rome rode."
    assert switched == Question(
        "7", "Who ging?", new, [Answer("König of Rome", 32), Answer("ome", 42), Answer("Alte", 0)]
    )


PIECES = st.sampled_from(["king", "Old", "went", "e\u0301a", "दिल्ली", "伦敦", "👩‍👧", " ", ", ", "x", "\u0301", "ROME"])
TO = {"king": "k", "old": "ancient", "went": "ê\u0323", "दिल्ली": "Delhi", "伦": "Lon", "éa": "", "rome": "r"}


@given(st.lists(PIECES, max_size=20), st.data(), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 9))
def test_answers_stay_exact(pieces, data, fraction, seed):
    context = "".join(pieces)
    places = st.integers(0, len(context))
    spans = [sorted(two) for two in data.draw(st.lists(st.tuples(places, places), max_size=3))]
    answers = [Answer(context[start:end], start) for start, end in spans]
    lexicon = {word: other for word, other in TO.items() if other}
    switched = code_switch_question(Question("q", "king?", context, answers), lexicon, fraction, random.Random(seed))
    assert len(switched.answers) == len(answers)
    for before, after in zip(answers, switched.answers, strict=True):
        assert switched.context[after.start : after.start + len(after.text)] == after.text
        if fraction == 0.0:
            assert after == before
    # Nothing but words has changed: the text around and between the answers is there still.
    assert [each for each in switched.context if each in " ,👧"] == [each for each in context if each in " ,👧"]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_fraction_errors(fraction):
    message = rf"fraction must lie in \[0, 1\], got {fraction}"
    with pytest.raises(ValueError, match=message):
        code_switch("a", {}, fraction, random.Random(0))
    with pytest.raises(ValueError, match=message):
        code_switch_question(Question("q", "", "", []), {}, fraction, random.Random(0))


@pytest.mark.parametrize("start", [-2, 1, 9])
def test_an_answer_that_is_not_there(start):
    with pytest.raises(ValueError, match=f"question q: answers must be spans of the context, got 'ab' at {start}"):
        code_switch_question(Question("q", "?", "abab", [Answer("ab", start)]), {}, 0.5, random.Random(0))
