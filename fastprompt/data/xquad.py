"""XQuAD: 1190 of SQuAD's questions and their paragraphs, translated by people."""

from pathlib import Path

from .examples import Question
from .reading import check_choice, find_file
from .squad import questions_from_hub, read_squad

LANGUAGES = ("en", "ar", "de", "el", "es", "hi", "ru", "th", "tr", "vi", "zh", "ro")


def read(data: str | Path, language: str) -> list[Question]:
    """Read the questions of a language; question n is the same in every language.

    Args:
        data: a folder with xquad.{language}.json, or a dataset with configs xquad.{language}: its name on the hub, such
            as "google/xquad", or a folder laid out like it.

    Raises:
        ValueError: an unknown language, or as `read_squad` and `questions_from_hub` have it.
        FileNotFoundError: a folder without the file.
    """
    check_choice("language", language, LANGUAGES)
    file = find_file(data, [f"xquad.{language}.json"])
    return read_squad(file) if file else questions_from_hub(data, f"xquad.{language}", "validation")
