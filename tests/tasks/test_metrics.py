"""The scores: by hand in each script, and against the official scripts' steps taken one by one."""

import re
import string
import sys
import unicodedata
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprompt.data.examples import Answer, Question
from fastprompt.tasks.metrics import accuracy, answer_scores, macro, mlqa_scores, squad_scores

ARTICLES = {
    "en": r"\b(a|an|the)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "ar": "\\sال^|ال",
}
PUNCTUATION = {chr(i) for i in range(sys.maxunicode) if unicodedata.category(chr(i)).startswith("P")}
PUNCTUATION |= set(string.punctuation)


def ask(*answers: str, id: str = "q") -> Question:
    return Question(id, "Who?", "", [Answer(answer, 0) for answer in answers])


def squad_normal(text: str) -> str:
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(ARTICLES["en"], " ", text).split())


def mlqa_normal(text: str, language: str) -> str:
    text = "".join(character for character in text.lower() if character not in PUNCTUATION)
    if language in ARTICLES:
        text = re.sub(ARTICLES[language], " ", text)
    if language != "zh":
        return " ".join(text.split())
    tokens, rest = [], ""
    for character in text:
        if re.search("[\u4e00-\u9fa5]", character):
            tokens += [*rest.split(), character]
            rest = ""
        else:
            rest += character
    return " ".join(tokens + rest.split())


def official(questions, predictions, normal) -> dict[str, float]:
    exact_match = f1 = 0
    for question in questions:
        best = []
        for answer in question.answers if question.id in predictions else ():
            ours, theirs = normal(predictions[question.id]), normal(answer.text)
            same = sum((Counter(ours.split()) & Counter(theirs.split())).values())
            score = 0
            if same:
                precision, recall = 1.0 * same / len(ours.split()), 1.0 * same / len(theirs.split())
                score = (2 * precision * recall) / (precision + recall)
            best.append((ours == theirs, score))
        exact_match += max((exact for exact, _ in best), default=0)
        f1 += max((score for _, score in best), default=0)
    return {"exact_match": 100.0 * exact_match / len(questions), "f1": 100.0 * f1 / len(questions)}


WORDS = st.sampled_from(
    [
        *"the a an The der Des un LAS của là những ال البيت والبيت بيت 我 们 龥 龦 三A b ab c नदी गाँव। का!".split(),
        *"„ab“ ¿c? c. c、d $ + · İ - ' « 。".split(),
        *[" ", "\u3000", "\u2028", ""],
    ]
)
TEXT = st.lists(st.tuples(WORDS, st.sampled_from(["", " "])).map("".join), max_size=6).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.lists(TEXT, min_size=1, max_size=3), st.none() | TEXT), min_size=1, max_size=5))
def test_as_the_official_scripts(cases):
    questions = [ask(*answers, id=str(number)) for number, (answers, _) in enumerate(cases)]
    predictions = {str(number): text for number, (_, text) in enumerate(cases) if text is not None}
    assert squad_scores(questions, predictions) == official(questions, predictions, squad_normal)
    for language in ("en", "de", "es", "ar", "zh", "vi", "hi"):
        expected = official(questions, predictions, lambda text, language=language: mlqa_normal(text, language))
        assert mlqa_scores(questions, predictions, language) == expected, language


def close(scores, exact_match, f1):
    assert scores == {"exact_match": pytest.approx(100 * exact_match), "f1": pytest.approx(100 * f1)}


@pytest.mark.parametrize(
    ("answer", "prediction", "exact_match", "f1"),
    [
        ("the old mill", "Old  mill!", 1, 1),
        ("the old mill", "a new mill", 0, 1 / 2),
        ("mill mill", "mill", 0, 2 / 3),  # a bag: the second one counts
        ("mother-in-law", "motherinlaw", 1, 1),
        ("theatre", "atre", 0, 0),  # articles are whole words
        ("«mill»", "mill", 0, 0),  # punctuation is that of ASCII alone
        ("der Hof", "Hof", 0, 2 / 3),  # articles are English in every language
        ("البيت", "بيت", 0, 0),
        ("गाँव।", "गाँव", 0, 0),
        ("我的朋友", "朋友", 0, 0),  # one token
        ("The", "a", 1, 0),  # nothing is left of both
        ("mill", "", 0, 0),
    ],
)
def test_squad(answer, prediction, exact_match, f1):
    close(squad_scores([ask(answer)], {"q": prediction}), exact_match, f1)


@pytest.mark.parametrize(
    ("language", "answer", "prediction", "exact_match", "f1"),
    [
        ("en", "“the” mill…", "Mill", 1, 1),
        ("en", "der Hof", "Hof", 0, 2 / 3),
        ("en", "5 $", "5", 1, 1),  # of symbols those of ASCII
        ("en", "5 €", "5", 0, 2 / 3),
        ("de", "„Der Hof des Bauern“", "hof bauern", 1, 1),
        ("de", "dem Hof", "the Hof", 0, 2 / 3),
        ("es", "¿Los unos?", "", 1, 0),
        ("es", "la casa roja", "una casa", 0, 2 / 3),
        ("ar", "البيت الكبير،", "بيت كبير", 1, 1),
        ("ar", "والبيت", "و بيت", 1, 1),  # inside a word it splits the word
        ("ar", "القط", "قط أسود", 0, 2 / 3),
        ("hi", "गाँव के पास।", "गाँव के पास", 1, 1),
        ("hi", "गाँव के पास", "गाँव", 0, 1 / 2),
        ("vi", "những cái nhà của tôi", "nhà tôi", 1, 1),
        ("vi", "nhà tôi", "nhà", 0, 2 / 3),
        ("zh", "我的朋友。", "我的 朋友", 1, 1),
        ("zh", "我的朋友", "朋友", 0, 2 / 3),
        ("zh", "三A队", "三 a 队", 1, 1),
        ("zh", "ABC队", "AB C队", 0, 2 / 5),  # Latin letters are tokens between white space
        ("zh", "㐀㐁", "㐀", 0, 0),  # beyond U+4E00 to U+9FA5 as well
    ],
)
def test_mlqa(language, answer, prediction, exact_match, f1):
    close(mlqa_scores([ask(answer)], {"q": prediction}, language), exact_match, f1)


def test_best_answer_and_missing_predictions():
    questions = [ask("old mill", "mill", id="1"), ask("river", id="2"), ask("new stone bridge", "stone", id="3")]
    predictions = {"1": "the mill", "3": "stone bridge", "9": "river"}
    close(squad_scores(questions, predictions), 1 / 3, (1 + 4 / 5) / 3)
    close(mlqa_scores(questions, predictions, "en"), 1 / 3, (1 + 4 / 5) / 3)
    close(squad_scores(questions, {}), 0, 0)


def test_answer_errors():
    with pytest.raises(ValueError, match="questions must hold at least one"):
        squad_scores([], {})
    with pytest.raises(ValueError, match="ids of their own to be scored, got 'q' 2 times"):
        squad_scores([ask("a", id="p"), ask("a"), ask("b")], {})
    with pytest.raises(ValueError, match="answers to be scored, 'q' has none"):
        mlqa_scores([ask()], {}, "en")
    with pytest.raises(ValueError, match="language must be one of en, de, es, ar, zh, vi, hi, got 'ru'"):
        mlqa_scores([ask("a")], {}, "ru")


def official_without_answers(questions, predictions) -> dict[str, float]:
    """The steps of SQuAD v2's script."""
    exact, f1 = {}, {}
    for question in questions:
        golds = [answer.text for answer in question.answers if squad_normal(answer.text)] or [""]
        exact[question.id], f1[question.id] = 0, 0
        for gold in golds:
            ours, theirs = squad_normal(predictions[question.id]).split(), squad_normal(gold).split()
            same = sum((Counter(ours) & Counter(theirs)).values())
            if not ours or not theirs:
                score = int(ours == theirs)
            else:
                score = 2 * same / (len(ours) + len(theirs))
            exact[question.id] = max(exact[question.id], int(ours == theirs))
            f1[question.id] = max(f1[question.id], score)
    with_answers = {question.id: bool(question.answers) for question in questions}
    scores = {}
    for exact_name, f1_name, kinds in (
        ("exact_match", "f1", (True, False)),
        ("HasAns_exact", "HasAns_f1", (True,)),
        ("NoAns_exact", "NoAns_f1", (False,)),
    ):
        ids = [id for id, kind in with_answers.items() if kind in kinds]
        if ids:
            scores[exact_name] = 100.0 * sum(exact[id] for id in ids) / len(ids)
            scores[f1_name] = 100.0 * sum(f1[id] for id in ids) / len(ids)
    return scores


WORDY = st.lists(st.sampled_from(["the", "old", "mill", "a", ".", "river"]), max_size=4).map(" ".join)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.lists(WORDY, max_size=3), WORDY), min_size=1, max_size=5))
def test_questions_without_answers(drawn):
    questions = [ask(*answers, id=n) for n, (answers, _) in enumerate(drawn)]
    predictions = [prediction for _, prediction in drawn]
    expected = official_without_answers(questions, dict(enumerate(predictions)))
    assert answer_scores("squad", questions, predictions, unanswerable=True) == pytest.approx(expected)


def test_scores_in_order():
    """Of questions whose ids may be anything, and the same."""
    questions = [ask("old mill", id=["q"]), ask("river", id=["q"])]
    assert answer_scores("xquad", questions, ["mill", None]) == {"exact_match": 0, "f1": pytest.approx(100 / 3)}
    assert answer_scores("mlqa", [ask("der Hof")], ["Hof"], "de")["exact_match"] == 100
    none = answer_scores("mlqa", [ask("dem Hof"), ask()], ["Hof", ""], "de", unanswerable=True)
    assert set(none.values()) == {100.0} and len(none) == 6
    assert answer_scores("squad", [ask("a"), ask()], [None, None], unanswerable=True)["NoAns_exact"] == 0
    with pytest.raises(ValueError, match="questions and predictions must be equally many, got 2 and 1"):
        answer_scores("squad", questions, ["mill"])
    with pytest.raises(ValueError, match="language must be one of .*, got 'yor'"):
        answer_scores("mlqa", questions, ["a", "b"], "yor")
    with pytest.raises(ValueError, match="must have answers, or an empty list, to be scored, 'q' has neither"):
        answer_scores("squad", [ask()._replace(answers=None)], ["a"], unanswerable=True)


def test_accuracy():
    assert accuracy([1, 0, 1, 1], [1, 1, 1, 0]) == {"accuracy": 50.0}
    assert accuracy([1] * 29 + [0] * 21, [1] * 50) == {"accuracy": 29 / 50 * 100}  # not 100 * 29 / 50, which is 58
    for truth, predictions in (([1], [1, 0]), ([], [])):
        with pytest.raises(ValueError, match=f"got {len(truth)} and {len(predictions)}"):
            accuracy(truth, predictions)


def test_macro():
    scores = {"en": {"exact_match": 80.0, "f1": 90.0}, "de": {"f1": 70.0, "exact_match": 50.0}}
    assert macro(scores) == {"exact_match": 65.0, "f1": 80.0, "score": 72.5}
    assert macro({"ko": {"accuracy": 60.0}, "fr": {"accuracy": 90.0}}) == {"accuracy": 75.0, "score": 75.0}
    with pytest.raises(ValueError, match="at least one language"):
        macro({})
    with pytest.raises(ValueError, match="got exact_match, f1 for en and accuracy for ko"):
        macro({"en": scores["en"], "ko": {"accuracy": 60.0}})
