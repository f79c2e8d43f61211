"""Reading SQuAD's form, and each way in which a file can be wrong."""

import copy
import json
import re
import sys

import pytest

from fastprompt.data.examples import Answer, Question
from fastprompt.data.squad import questions_from_hub, read_squad

QUESTIONS = [
    Question("en", "Who keeps bees?", "My aunt keeps bees. So does he.", [Answer("My aunt", 0), Answer("aunt", 3)]),
    Question("emoji", "Where is the cat?", "🐈 sits on the 🏠 roof.", [Answer("🏠 roof", 14)]),
    Question("ar", "أين يعيش السمك؟", "يعيش السمك في الماء.", [Answer("في الماء", 11)]),
    Question("hi", "नदी कहाँ है?", "नदी गाँव के पास है।", [Answer("गाँव के पास", 4)]),
    Question("zh", "谁在写信?", "我的朋友在写信。", [Answer("我的朋友", 0)]),
    Question("vi", "Ai bán cá?", "Bà tôi bán cá ở chợ.", [Answer("Bà tôi", 0)]),
    Question("nobody", "Who sells fish?", "Nobody does.", []),
]


def test_round_trip(write_squad):
    questions = read_squad(write_squad("bees.json", QUESTIONS))
    assert questions == QUESTIONS
    assert [question.exact_answers for question in questions] == [question.answers for question in QUESTIONS]


def test_byte_order_mark(write_squad):
    file = write_squad("bees.json", QUESTIONS)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_squad(str(file)) == QUESTIONS


def test_offsets_that_do_not_fit_their_text(write_squad):
    """They are read as they are, and told apart: answers in the wrong place or case, running over the end, empty."""
    answers = [Answer("bees", 8), Answer("bees", 9), Answer("Bees", 8), Answer("bees and", 8), Answer("", 2)]
    [question] = read_squad(write_squad("bees.json", [Question("q", "What?", "We keep bees", answers)]))
    assert question.answers == answers
    assert question.exact_answers == [Answer("bees", 8)]


def test_ids_that_repeat(write_squad):
    """TyDi QA's English training file has such ids; the same question twice is a mistake."""
    first, second = QUESTIONS[0], QUESTIONS[1]._replace(id="en")
    assert read_squad(write_squad("tydi.json", [first, second])) == [first, second]
    place = (
        r"tydi\.json, data\[0\]\.paragraphs\[2\]\.qas\[0\]\.id: got 'en' .* data\[0\]\.paragraphs\[0\]\.qas\[0\]\.id"
    )
    with pytest.raises(ValueError, match=place):
        read_squad(write_squad("tydi.json", [first, second, first]))


ANSWER = "data[0].paragraphs[0].qas[0].answers[1]"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (ANSWER + ".answer_start", None, ANSWER + ".answer_start: missing, expected an integer"),
        (ANSWER + ".answer_start", "3", ANSWER + ".answer_start: got '3', expected an integer"),
        (ANSWER + ".answer_start", 3.0, ANSWER + ".answer_start: got 3.0, expected an integer"),
        (ANSWER + ".answer_start", True, ANSWER + ".answer_start: got True, expected an integer"),
        (ANSWER + ".answer_start", -1, ANSWER + ".answer_start: got -1, expected 0 to 30, a character of the context"),
        (ANSWER + ".answer_start", 31, ANSWER + ".answer_start: got 31, expected 0 to 30, a character of the context"),
        (ANSWER + ".text", 7, ANSWER + ".text: got 7, expected a string"),
        (ANSWER, "aunt", ANSWER + ": got 'aunt', expected an object with text"),
        ("data[0].paragraphs[0].qas[0].answers", {}, "data[0].paragraphs[0].qas[0].answers: got {}, expected a list"),
        ("data[0].paragraphs[0].qas[0].id", 12, "data[0].paragraphs[0].qas[0].id: got 12, expected a string"),
        ("data[0].paragraphs[1].qas[0].question", None, "paragraphs[1].qas[0].question: missing, expected a string"),
        ("data[0].paragraphs[1].context", None, "data[0].paragraphs[1].context: missing, expected a string"),
        ("data[0].paragraphs[1].qas", "x" * 99, "qas: got '" + "x" * 58 + "..., expected a list"),
        ("data[0].paragraphs", None, "data[0].paragraphs: missing, expected a list"),
        ("data", None, "bees.json, data: missing, expected a list"),
        ("data", [], "bees.json: no questions in it"),
    ],
)
def test_structure(write_squad, place, value, message):
    file = write_squad("bees.json", QUESTIONS)
    content = json.loads(file.read_text(encoding="utf-8"))
    *way, last = [int(key) if key.isdigit() else key for key in re.findall(r"\w+", place)]
    record = content
    for key in way:
        record = record[key]
    if value is None:
        del record[last]
    else:
        record[last] = value
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"bees\.json") as raised:
        read_squad(file)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"data": [\n{"paragraphs": [}]}', r"bees\.json, line 2, column 17: not JSON: "),
        (b"", r"bees\.json, line 1, column 1: not JSON: "),
        (b'{"data": [\n"\xe9"]}', r"bees\.json, line 2, byte 2: 0xe9 is not UTF-8"),
        (b"[]", r"bees\.json: got \[\], expected an object with data"),
    ],
)
def test_no_json(tmp_path, content, message):
    (tmp_path / "bees.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_squad(tmp_path / "bees.json")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        read_squad(tmp_path / "none.json")


def test_dataset(write_dataset):
    folder = write_dataset({"bees.en": {"train": QUESTIONS[:2], "test": QUESTIONS[2:]}, "bees.de": {"test": QUESTIONS}})
    assert questions_from_hub(folder, "bees.en", "train") == QUESTIONS[:2]
    assert questions_from_hub(str(folder), "bees.en", "test") == QUESTIONS[2:]
    assert questions_from_hub(folder, "bees.de", "test") == QUESTIONS
    with pytest.raises(ValueError, match=r"dataset, config bees\.fr, split test: .*bees\.fr"):
        questions_from_hub(folder, "bees.fr", "test")
    with pytest.raises(ValueError, match=r"dataset, config bees\.de, split train: .*train"):
        questions_from_hub(folder, "bees.de", "train")


def broken_columns(columns: dict) -> dict[str, tuple[dict, str]]:
    unlike, outside, untold, unasked = (copy.deepcopy(columns) for _ in range(4))
    unlike["answers"][0]["text"].append("bees")
    outside["answers"][0]["answer_start"][1] = 31
    untold["answers"][1] = None
    del unasked["question"]
    return {
        "unlike": (unlike, r"row 0: answers: 3 text, 2 answer_start, expected equally many"),
        "outside": (outside, r"row 0: answers\[1\]\.answer_start: got 31, expected 0 to 30"),
        "untold": (untold, r"row 1: answers: got None, expected an object"),
        "unasked": (unasked, "no column question, only id, context, answers"),
    }


@pytest.mark.parametrize("case", ["unlike", "outside", "untold", "unasked"])
def test_dataset_errors(write_dataset, case):
    answers = [{"text": [a.text for a in q.answers], "answer_start": [a.start for a in q.answers]} for q in QUESTIONS]
    plain = {name: [getattr(q, name) for q in QUESTIONS] for name in ("id", "context", "question")}
    columns, message = broken_columns(plain | {"answers": answers})[case]
    with pytest.raises(ValueError, match=f"dataset, config bees, split test[:,] {message}"):
        questions_from_hub(write_dataset({"bees": {"test": columns}}), "bees", "test")


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'fastprompt\[train\]'"):
        questions_from_hub("google/xquad", "xquad.en", "validation")
