"""MLQA, from folders of its files and from a dataset as on the hub."""

import pytest

from fastprompt.data import mlqa
from fastprompt.data.examples import Answer, Question

GERMAN = [Question("1", "Who fishes?", "Der Onkel angelt.", [Answer("Der Onkel", 0)])]
HINDI = [Question("2", "मछली कौन पकड़ता है?", "चाचा मछली पकड़ते हैं।", [Answer("चाचा", 0)])]


def test_folder(write_squad, tmp_path):
    write_squad("MLQA_V1/dev/dev-context-de-question-en.json", GERMAN)
    write_squad("MLQA_V1/test/test-context-hi-question-hi.json", HINDI)
    for data in (tmp_path, str(tmp_path / "MLQA_V1")):
        assert mlqa.read(data, "de", "en", "dev") == GERMAN
        assert mlqa.read(data, "hi", "hi", "test") == HINDI
    with pytest.raises(FileNotFoundError, match=r"neither MLQA_V1/dev/dev-context-en-question-de\.json"):
        mlqa.read(tmp_path, "en", "de", "dev")


def test_translate_train_folder(write_squad, tmp_path):
    write_squad("mlqa-translate-train/hi_squad-translate-train-train-v1.1.json", HINDI)
    write_squad("mlqa-translate-train/de_squad-translate-train-dev-v1.1.json", GERMAN)
    for data in (tmp_path, tmp_path / "mlqa-translate-train"):
        assert mlqa.read_translate_train(data, "hi", "train") == HINDI
        assert mlqa.read_translate_train(data, "de", "dev") == GERMAN
    with pytest.raises(FileNotFoundError, match="zh_squad-translate-train-dev"):
        mlqa.read_translate_train(tmp_path, "zh", "dev")


def test_dataset(write_dataset):
    folder = write_dataset(
        {
            "mlqa.de.en": {"validation": GERMAN, "test": HINDI},
            "mlqa-translate-train.hi": {"train": HINDI, "validation": GERMAN},
        }
    )
    assert mlqa.read(folder, "de", "en", "dev") == GERMAN
    assert mlqa.read(folder, "de", "en", "test") == HINDI
    assert mlqa.read_translate_train(folder, "hi", "train") == HINDI
    assert mlqa.read_translate_train(folder, "hi", "dev") == GERMAN


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="context_language must be one of en, de, es, ar, zh, vi, hi, got 'ru'"):
        mlqa.read(tmp_path, "ru", "en", "dev")
    with pytest.raises(ValueError, match="question_language must be one of .*, got 'ru'"):
        mlqa.read(tmp_path, "en", "ru", "dev")
    with pytest.raises(ValueError, match="split must be one of dev, test, got 'train'"):
        mlqa.read(tmp_path, "en", "en", "train")
    with pytest.raises(ValueError, match="language must be one of de, es, ar, zh, vi, hi, got 'en'"):
        mlqa.read_translate_train(tmp_path, "en", "train")
    with pytest.raises(ValueError, match="split must be one of train, dev, got 'test'"):
        mlqa.read_translate_train(tmp_path, "de", "test")
