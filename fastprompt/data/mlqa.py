"""MLQA: questions in seven languages about paragraphs in seven languages."""

from pathlib import Path

from .examples import Question
from .reading import check_choice, find_file
from .squad import questions_from_hub, read_squad

LANGUAGES = ("en", "de", "es", "ar", "zh", "vi", "hi")

_HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}


def read(data: str | Path, context_language: str, question_language: str, split: str) -> list[Question]:
    """Read the questions of a pair of languages.

    Args:
        data: the folder MLQA_V1 or the one that holds it, or a dataset with configs mlqa.{context}.{question}: its name
            on the hub, such as "facebook/mlqa", or a folder laid out like it.
        split: "dev" or "test".

    Raises:
        ValueError: an unknown language or split, or as `read_squad` and `questions_from_hub` have it.
        FileNotFoundError: a folder without the file.
    """
    check_choice("context_language", context_language, LANGUAGES)
    check_choice("question_language", question_language, LANGUAGES)
    check_choice("split", split, ("dev", "test"))
    name = f"{split}/{split}-context-{context_language}-question-{question_language}.json"
    file = find_file(data, [f"MLQA_V1/{name}", name])
    if file:
        return read_squad(file)
    return questions_from_hub(data, f"mlqa.{context_language}.{question_language}", _HUB_SPLITS[split])


def read_translate_train(data: str | Path, language: str, split: str) -> list[Question]:
    """Read SQuAD v1.1, machine-translated from English.

    Args:
        data: the folder mlqa-translate-train or the one that holds it, or a dataset with configs
            mlqa-translate-train.{language}, as for `read`.
        language: one of `LANGUAGES` but English.
        split: "train" or "dev".

    Raises:
        ValueError, FileNotFoundError: as `read`.
    """
    check_choice("language", language, [each for each in LANGUAGES if each != "en"])
    check_choice("split", split, ("train", "dev"))
    name = f"{language}_squad-translate-train-{split}-v1.1.json"
    file = find_file(data, [f"mlqa-translate-train/{name}", name])
    return (
        read_squad(file) if file else questions_from_hub(data, f"mlqa-translate-train.{language}", _HUB_SPLITS[split])
    )
