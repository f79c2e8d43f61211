"""Scores of SQuAD, XQuAD, MLQA and PAWS-X, in percent: to the digit those of the official scripts, quirks included."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from fastprompt.data.examples import Question
from fastprompt.data.reading import check_choice

_PUNCTUATION = frozenset(string.punctuation)

# What is dropped as an article, by language. The official pattern for Arabic is \sال^|ال; its first half never matches,
# so that ال goes wherever it stands, inside words too.
_ARTICLES = {
    "en": r"\b(a|an|the)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "ar": "ال",
    "zh": None,
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "hi": None,
}


def squad_scores(questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, float]:
    """Score answers by SQuAD v1.1's rules, as XQuAD does in every language.

    Before texts are compared they are lower-cased, and lose ASCII punctuation, English articles and superfluous white
    space. F1 is over bags of tokens, the best answer counts. An answer with nothing left matches another such one
    exactly, and yet has F1 0.

    Args:
        questions: each with at least one answer, and an id of its own.
        predictions: answers by question id. A question without one scores 0; other ids are passed over.

    Returns:
        "exact_match" and "f1", means over all questions, 0 to 100.

    Raises:
        ValueError: no questions, one without answers, or two of one id.
    """
    return answer_scores("squad", questions, _by_id(questions, predictions))


def mlqa_scores(questions: Sequence[Question], predictions: Mapping[str, str], language: str) -> dict[str, float]:
    """Score answers by MLQA's rules, which are those of `squad_scores` with three differences.

    All Unicode punctuation goes, not that of ASCII alone; articles are those of the language; of Chinese, each
    character of U+4E00 to U+9FA5 is a token.

    Args:
        questions, predictions: as `squad_scores` takes them.
        language: the language of the contexts, and so of the answers; that of the questions does not matter.

    Raises:
        ValueError: an unknown language, or as `squad_scores`.
    """
    check_choice("language", language, tuple(_ARTICLES))
    return answer_scores("mlqa", questions, _by_id(questions, predictions), language)


def check_equally_many(name: str, truth: Sequence, predictions: Sequence) -> None:
    """Raise a ValueError unless there are as many predictions as there is to score, and any at all."""
    if len(truth) != len(predictions) or len(truth) == 0:
        raise ValueError(
            f"{name} and predictions must be equally many and not none, got {len(truth)} and {len(predictions)}"
        )


def accuracy(truth: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """Score labels as XTREME does: "accuracy", 0 to 100.

    Raises:
        ValueError: none, or not as many predictions as labels.
    """
    check_equally_many("truth", truth, predictions)
    correct = sum(int(label == prediction) for label, prediction in zip(truth, predictions, strict=True))
    return {"accuracy": correct / len(truth) * 100}


def macro(scores_by_language: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Average as XTREME does: each score over the languages, and "score", the mean of these means.

    "score" is what a task counts for: accuracy itself; of question answering the mean of exact match and F1.

    Raises:
        ValueError: no languages, or languages with different scores.
    """
    languages = list(scores_by_language)
    if not languages:
        raise ValueError("scores_by_language must hold at least one language")
    names = list(scores_by_language[languages[0]])
    for language in languages:
        if set(scores_by_language[language]) != set(names):
            raise ValueError(
                f"scores_by_language must hold the same scores for each language, got {', '.join(names)} for "
                f"{languages[0]} and {', '.join(scores_by_language[language])} for {language}"
            )
    means = {name: sum(scores[name] for scores in scores_by_language.values()) / len(languages) for name in names}
    return means | {"score": sum(means.values()) / len(means)}


def _squad_tokens(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return re.sub(_ARTICLES["en"], " ", text).split()


def _mlqa_tokens(text: str, language: str) -> list[str]:
    text = "".join(
        character
        for character in text.lower()
        if character not in _PUNCTUATION and not unicodedata.category(character).startswith("P")
    )
    if _ARTICLES[language]:
        text = re.sub(_ARTICLES[language], " ", text)
    if language == "zh":
        text = re.sub("([\u4e00-\u9fa5])", r" \1 ", text)
    return text.split()


def answer_scores(
    rules: str,
    questions: Sequence[Question],
    predictions: Sequence[str | None],
    language: str = "en",
    unanswerable: bool = False,
) -> dict[str, float]:
    """Score answers, in the order of their questions, whose ids are not read.

    Args:
        rules: "squad", "xquad", which has the same, or "mlqa": how texts are compared.
        questions: each with answers, if not `unanswerable`.
        predictions: None where there is none, which scores 0.
        language: the language of the contexts, which the rules of "mlqa" go by.
        unanswerable: score as SQuAD v2 does, where questions may have no answer, to which "" is the right one.

    Returns:
        "exact_match" and "f1", 0 to 100. If `unanswerable`, also "HasAns_exact" and "HasAns_f1" of the questions that
        have answers, and "NoAns_exact" and "NoAns_f1" of the others, unless there are none.

    Raises:
        ValueError: no questions, one without answers, as many predictions as there are not questions, or an unknown
            language.
    """
    if not questions:
        raise ValueError("questions must hold at least one")
    if len(questions) != len(predictions):
        raise ValueError(f"questions and predictions must be equally many, got {len(questions)} and {len(predictions)}")
    if rules == "mlqa":
        check_choice("language", language, tuple(_ARTICLES))
    tokens = partial(_mlqa_tokens, language=language) if rules == "mlqa" else _squad_tokens
    best = _best_without_answers if unanswerable else _best
    found = [best(question, text, tokens) for question, text in zip(questions, predictions, strict=True)]
    scores = dict(zip(("exact_match", "f1"), _means(found), strict=True))
    for name, answered in (("HasAns", True), ("NoAns", False)) if unanswerable else ():
        of_kind = [each for each, question in zip(found, questions, strict=True) if bool(question.answers) == answered]
        if of_kind:
            scores |= dict(zip((f"{name}_exact", f"{name}_f1"), _means(of_kind), strict=True))
    return scores


def _by_id(questions: Sequence[Question], predictions: Mapping[str, str]) -> list[str | None]:
    """Predictions in the order of the questions."""
    if len({question.id for question in questions}) < len(questions):
        [(id, count)] = Counter(question.id for question in questions).most_common(1)
        raise ValueError(f"questions must have ids of their own to be scored, got {id!r} {count} times")
    return [predictions.get(question.id) for question in questions]


def _best(question: Question, prediction: str | None, tokens: Callable[[str], list[str]]) -> tuple[float, float]:
    """Exact match and F1 of one prediction, by SQuAD v1.1."""
    if not question.answers:
        raise ValueError(f"questions must have answers to be scored, {question.id!r} has none")
    if prediction is None:
        return 0, 0
    got, answers = tokens(prediction), [tokens(answer.text) for answer in question.answers]
    return max(got == answer for answer in answers), max(_f1(got, answer) for answer in answers)


def _best_without_answers(
    question: Question, prediction: str | None, tokens: Callable[[str], list[str]]
) -> tuple[float, float]:
    """Exact match and F1 of one prediction, by SQuAD v2: texts with nothing left are the same, and F1 says so."""
    if question.answers is None:
        raise ValueError(f"questions must have answers, or an empty list, to be scored, {question.id!r} has neither")
    if prediction is None:
        return 0, 0
    got, answers = tokens(prediction), [each for each in (tokens(answer.text) for answer in question.answers) if each]
    answers = answers or [[]]
    return max(got == answer for answer in answers), max(
        _f1(got, answer) if got and answer else float(got == answer) for answer in answers
    )


def _means(found: Sequence[tuple[float, float]]) -> list[float]:
    return [100.0 * sum(each) / len(found) for each in zip(*found, strict=True)]


def _f1(prediction: list[str], answer: list[str]) -> float:
    common = sum((Counter(prediction) & Counter(answer)).values())
    if common == 0:
        return 0
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)
