"""Scores of XQuAD, MLQA and PAWS-X, in percent: to the digit those of the official scripts, quirks included."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from ._reading import check_choice
from .squad import Question

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
    return _answer_scores(questions, predictions, _squad_tokens)


def mlqa_scores(questions: Sequence[Question], predictions: Mapping[str, str], language: str) -> dict[str, float]:
    """Score answers by MLQA's rules, which are those of `squad_scores` with three differences.

    All Unicode punctuation goes, not that of ASCII alone; articles are those of the language; of Chinese, each
    character of U+4E00 to U+9FA5 is a token.

    Args:
        questions, predictions: as of `squad_scores`.
        language: of the contexts, so of the answers too; that of the questions is of no account.

    Raises:
        ValueError: an unknown language, or as `squad_scores`.
    """
    check_choice("language", language, tuple(_ARTICLES))
    return _answer_scores(questions, predictions, lambda text: _mlqa_tokens(text, language))


def accuracy(truth: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """Score labels as XTREME does: "accuracy", 0 to 100.

    Raises:
        ValueError: none, or not as many predictions as labels.
    """
    if len(truth) != len(predictions) or len(truth) == 0:
        raise ValueError(
            f"truth and predictions must be equally many and not none, got {len(truth)} and {len(predictions)}"
        )
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
    task: str, questions: Sequence[Question], predictions: Mapping[str, str], language: str
) -> dict[str, float]:
    """`mlqa_scores` for "mlqa", for "xquad" `squad_scores`, which are the same in every language."""
    if task == "mlqa":
        return mlqa_scores(questions, predictions, language)
    return squad_scores(questions, predictions)


def _answer_scores(
    questions: Sequence[Question], predictions: Mapping[str, str], tokens: Callable[[str], list[str]]
) -> dict[str, float]:
    if not questions:
        raise ValueError("questions must hold at least one")
    if len({question.id for question in questions}) < len(questions):
        [(id, count)] = Counter(question.id for question in questions).most_common(1)
        raise ValueError(f"questions must have ids of their own to be scored, got {id!r} {count} times")
    exact_match = f1 = 0
    for question in questions:
        if not question.answers:
            raise ValueError(f"questions must have answers to be scored, {question.id!r} has none")
        if question.id in predictions:
            prediction = tokens(predictions[question.id])
            answers = [tokens(answer.text) for answer in question.answers]
            exact_match += max(prediction == answer for answer in answers)
            f1 += max(_f1(prediction, answer) for answer in answers)
    return {"exact_match": 100.0 * exact_match / len(questions), "f1": 100.0 * f1 / len(questions)}


def _f1(prediction: list[str], answer: list[str]) -> float:
    common = sum((Counter(prediction) & Counter(answer)).values())
    if common == 0:
        return 0
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)
