"""XQuAD, from a folder of its files and from a dataset as on the hub."""

import pytest

from fastprompt.data import xquad
from fastprompt.data.examples import Answer, Question

GREEK = [Question("1", "Ποιος ψαρεύει;", "Ο θείος μου ψαρεύει.", [Answer("Ο θείος μου", 0)])]
THAI = [Question("1", "ใครจับปลา", "ลุงของฉันจับปลา", [Answer("ลุงของฉัน", 0)])]


def test_folder(write_squad):
    folder = write_squad("xquad/xquad.el.json", GREEK).parent
    write_squad("xquad/xquad.th.json", THAI)
    assert xquad.read(folder, "el") == GREEK
    assert xquad.read(str(folder), "th") == THAI
    with pytest.raises(FileNotFoundError, match=r"xquad has neither xquad\.de\.json, nor parquet files"):
        xquad.read(folder, "de")


def test_dataset(write_dataset):
    folder = write_dataset({"xquad.el": {"validation": GREEK}, "xquad.th": {"validation": THAI}})
    assert xquad.read(folder, "el") == GREEK
    assert xquad.read(folder, "th") == THAI
    with pytest.raises(ValueError, match=r"config xquad\.de, split validation: "):
        xquad.read(folder, "de")


def test_unknown_language(tmp_path):
    with pytest.raises(ValueError, match="language must be one of en, ar, .*, zh, ro, got 'cy'"):
        xquad.read(tmp_path, "cy")
