"""Tables of every form as rows, and as the examples of a task."""

import codecs
import csv
import io
import itertools
import json
import logging
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprompt.data.examples import Pair, Question, Tagged, Text, Written
from fastprompt.data.files import is_quoted
from fastprompt.data.parallel import read_pairs
from fastprompt.data.reading import iter_lines
from fastprompt.data.table import iter_examples, iter_rows, read_examples, read_rows


class Task:
    """As tasks are, but it takes everything that is not missing."""

    optional = ("id", "text_pair")

    def __init__(self, kind, *labels):
        self.kind, self.labels = kind, labels
        self.columns = dict.fromkeys(kind._fields, "")

    def example(self, row, where, number, *, labelled=True):
        for name in self.kind._fields:
            if name not in row and name not in self.optional and (labelled or name not in self.labels):
                raise ValueError(f"{where}, {name}: missing")
        return self.kind(**{name: row.get(name, number if name == "id" else None) for name in self.kind._fields})


TEXTS, WORDS, QUESTIONS, PAIRS = Task(Text, "label"), Task(Tagged, "tags"), Task(Question, "answers"), Task(Pair)
ROWS = [
    {"text": 'Say "no", she said', "label": "NA"},
    {"text": "a\u2028b", "label": "null"},
    {"text": "ü", "label": "1"},
]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(rows, delimiter=",", **options):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], delimiter=delimiter, lineterminator="\n", **options)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


FORMS = {
    "a.csv": table(ROWS),
    "semicolons.csv": table(ROWS, ";"),
    "all_quoted.csv": table(ROWS, quoting=csv.QUOTE_ALL),
    "quoted.tsv": table(ROWS, "\t"),
    "all_quoted.tsv": table(ROWS, "\t", quoting=csv.QUOTE_ALL),
    "plain.tsv": "".join("\t".join(each) + "\n" for each in (ROWS[0], *(row.values() for row in ROWS))),
    "header.txt": table(ROWS),
    "a.jsonl": lines(ROWS),
    "lines.json": lines(ROWS),
    "list.json": json.dumps(ROWS, indent=1),
    "data.json": json.dumps({"version": 1, "data": ROWS}),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", FORMS)
def test_forms(tmp_path, name, end, encoding):
    file = write(tmp_path / name, FORMS[name].replace("\n", end).encode(encoding))
    assert read_rows(file) == ROWS
    assert read_rows(f"{file}[1:2]") == ROWS[1:2]
    assert read_examples(TEXTS, str(file), columns={"id": "text", "text": "label", "label": "text"})[2] == Text(
        "ü", "1", None, "ü"
    )


@pytest.mark.parametrize("name", [*FORMS, "plain"])
def test_standard_input(monkeypatch, name):
    class Stdin:
        buffer = io.BytesIO(FORMS.get(name, "One, two\n\nthree\n").encode())

    monkeypatch.setattr(sys, "stdin", Stdin)
    if name == "plain":
        assert read_rows("-") == [{"text": "One, two"}, {"text": "three"}]
    elif name == "semicolons.csv":
        assert read_rows("-", format="csv") == ROWS
    else:
        assert read_rows("-[1:]") == ROWS[1:]


def test_rows_come_as_they_are_read(tmp_path):
    def endless():
        yield b"text,label\n"
        for n in itertools.count():
            yield b"a,%d\n" % n

    class Pipe:
        buffer = io.BufferedReader(Raw(endless()), 16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", Pipe)
        assert [example.label for example in itertools.islice(iter_examples(TEXTS, "-"), 3)] == ["0", "1", "2"]


class Raw(io.RawIOBase):
    """A pipe: what has been written comes, not what will be."""

    def __init__(self, parts):
        self.parts = parts

    def readable(self):
        return True

    def readinto(self, buffer):
        part = next(self.parts, b"")
        buffer[: len(part)] = part
        return len(part)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_that_come_in_byte_by_byte(end, encoding):
    expected = ["ü, a", "", "b\u2028"]
    for content, more in ((end.join(expected), []), (end.join([*expected, "c", ""]), ["c"])):
        pipe = io.BufferedReader(Raw(bytes([each]) for each in content.encode(encoding)))
        assert list(iter_lines(pipe, "pipe")) == expected + more
    assert list(iter_lines(io.BytesIO(b"a\rb\nc\r"), "file")) == ["a\rb", "c\r"], "a CR among LF is text"


CELL = st.text(st.sampled_from('ab "„\u2028'), min_size=1)


@given(st.lists(st.tuples(CELL, CELL), min_size=1), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
def test_quoted_tsv_round_trip(folder, rows, quoting):
    """Whatever a writer of CSV quotes is read back; a plain TSV is read as it stands if any quotation mark shows it."""
    rows = [dict(zip(("text", "label"), row, strict=True)) for row in rows]
    write(folder / "a.tsv", table(rows, "\t", quoting=quoting))
    assert read_rows(folder / "a.tsv") == rows
    write(
        folder / "a.tsv",
        "".join(f"{a}\t{b}\n" for a, b in [("text", "label"), ('"a" b', '"'), *map(dict.values, rows)]),
    )
    assert read_rows(folder / "a.tsv")[1:] == rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("table")


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ('id\ttext\n1\t"He said ""no"", twice."\n', True),  # SIB-200
        ('id\ttext\n1\t"A whole sentence, quoted."\n2\tAnother.\n', False),
        ('id\ttext\n1\t"""Both"" said"\n2\t"Nein", sagte sie.\n', False),
        ('id\ttext\n1\t"It begins.\n2\tIt ends."\n', False),
        ('id\ttext\n1\t"two\nlines"\n2\tone\n', True),
        ('id\ttext\n1\t"a\tb"\n', True),
        ('id\ttext\n1\t"a\tb\n', False),
        ('"id"\t"text"\n"1"\t"a"\n', True),
    ],
)
def test_whether_a_tsv_is_quoted(text, quoted):
    assert is_quoted(lambda: text.splitlines()) == quoted


CONLL = """-DOCSTART- O

# id = 1
# Yoruba
Ana B-PER
# O
sings O

in O
Oyo\u00a0State B-LOC
"""


def test_conll(tmp_path, caplog):
    expected = [
        {"words": ["Ana", "#", "sings"], "tags": ["B-PER", "O", "O"]},
        {"words": ["in", "Oyo\u00a0State"], "tags": ["O", "B-LOC"]},
    ]
    for name in ("train.txt", "train.conll"):
        assert read_rows(write(tmp_path / name, CONLL)) == expected
    assert "train.conll: 3 of 10 lines, comments and -DOCSTART-, are left out" in caplog.text
    four = "EU NNP B-NP B-ORG\nrejects VBZ O O\n"
    assert read_examples(WORDS, write(tmp_path / "a.txt", four)) == [Tagged(0, ["EU", "rejects"], ["B-ORG", "O"])]
    alone = write(tmp_path / "b.conll", "EU\nrejects\n\nit\n")
    assert [each.words for each in read_examples(WORDS, alone, labelled=False)] == [["EU", "rejects"], ["it"]]
    prose = write(tmp_path / "prose.txt", "Blood group O\nVitamin A\n")
    assert [row["text"] for row in read_rows(prose)] == ["Blood group O", "Vitamin A"]
    with pytest.raises(ValueError, match=r"a.txt, line 3: 1 field in 'it', expected 4 as in most lines"):
        read_rows(write(tmp_path / "a.txt", four + "it\n"), format="conll")


def test_squad(tmp_path):
    about = [
        {"id": 7, "question": "Who?", "answers": [{"text": "Ana", "answer_start": 0}]},
        {"id": 7, "question": "When?", "is_impossible": True, "answers": [], "plausible_answers": [{"text": "Ana"}]},
        {"question": "Why?"},
    ]
    content = {"data": [{"paragraphs": [{"context": "Ana sings.", "qas": about}]}]}
    rows = read_rows(write(tmp_path / "named_as_you_like", json.dumps(content)))
    assert rows == [
        {"id": 7, "question": "Who?", "context": "Ana sings.", "answers": {"text": ["Ana"], "answer_start": [0]}},
        {"id": 7, "question": "When?", "context": "Ana sings.", "answers": {"text": [], "answer_start": []}},
        {"question": "Why?", "context": "Ana sings."},
    ]
    del about[1]["is_impossible"], about[2]
    assert read_rows(write(tmp_path / "a.json", json.dumps(content))) == rows[:2]
    about[0] |= {"is_impossible": True}
    with pytest.raises(
        ValueError, match=r"a.json, data\[0\].paragraphs\[0\].qas\[0\].answers: got 'Ana', expected none"
    ):
        read_rows(write(tmp_path / "a.json", json.dumps(content)))


@pytest.fixture
def classes(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    kinds = datasets.ClassLabel(names=["neg", "pos"]), datasets.ClassLabel(names=["O", "B-PER"])
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": kinds[0], "tokens": datasets.List(datasets.Value("string")),
         "ner_tags": datasets.List(kinds[1])}
    )  # fmt: skip
    rows = [
        {"sentence": "Ana sings", "label": 1, "tokens": ["Ana", "sings"], "ner_tags": [1, 0]},
        {"sentence": "Sings", "label": 0, "tokens": ["Sings"], "ner_tags": [0]},
        {"sentence": "It", "label": -1, "tokens": ["It"], "ner_tags": [0]},
    ]
    return datasets.Dataset.from_list(rows, features)


def test_datasets(classes, tmp_path, caplog):
    classes.to_parquet(tmp_path / "a.parquet")
    classes.save_to_disk(tmp_path / "saved")
    both = type(classes.train_test_split(0.5))(train=classes, validation=classes)
    both.save_to_disk(tmp_path / "splits")
    sources = [(classes, {}), (tmp_path / "a.parquet", {}), (tmp_path / "saved", {}), (both, {"split": "dev"})]
    for source, options in [*sources, (str(tmp_path / "splits"), {"split": "train"}), (list(classes), {})]:
        caplog.clear()
        tagged = read_examples(WORDS, source, **options)
        if isinstance(source, list):  # which no longer knows the names
            assert tagged[0].tags == [1, 0]
            continue
        assert tagged[0] == Tagged(0, ["Ana", "sings"], ["B-PER", "O"])
        assert read_examples(TEXTS, source, **options) == [
            Text(0, "Ana sings", None, "pos"),
            Text(1, "Sings", None, "neg"),
        ]
        assert "1 of 3 rows, without label (the first is row 2), are left out" in caplog.text
    assert [row["sentence"] for row in read_rows(both, split="train[1:2]")] == ["Sings"]
    with pytest.raises(ValueError, match="split must be one of train, validation, of rows, got None"):
        read_rows(both)
    with pytest.raises(ValueError, match="source must be a file, a dataset, its name, or rows, got int"):
        read_rows(3)
    with pytest.raises(ValueError, match="subset must be left out for rows in memory, got 'de'"):
        read_rows([{}], subset="de")
    with pytest.raises(ValueError, match="format must be left out for a saved dataset, .*saved, got 'csv'"):
        read_rows(tmp_path / "saved", format="csv")
    with pytest.raises(ValueError, match="rows, row 1: got 'a', expected an object, or dict"):
        read_rows([{}, "a"])


def test_folders(write_dataset, tmp_path):
    for name in ("train", "valid", "test"):
        write(tmp_path / f"own/{name}.csv", f"text,label\n{name},NA\n")
    assert read_rows(tmp_path / "own", split="validation") == [{"text": "valid", "label": "NA"}]
    for n in range(2):
        write(tmp_path / f"shards/train-0000{n}-of-00002.jsonl", lines([{"text": str(n)}]))
    assert read_rows(tmp_path / "shards") == [{"text": "0"}, {"text": "1"}]
    with pytest.raises(ValueError, match=r"split must be one of test, train, valid, of .*own, got 'dev2'"):
        read_rows(tmp_path / "own", split="dev2")
    with pytest.raises(ValueError, match="split must be left out for a file, .*test.csv, got 'test'"):
        read_rows(tmp_path / "own/test.csv", split="test")
    hub = write_dataset({"de": {"train": {"text": ["a"]}}, "fr": {"train": {"text": ["b"]}, "test": {"text": ["c"]}}})
    assert read_rows(hub, subset="fr", split="test") == [{"text": "c"}]
    assert read_rows(hub, subset="de") == [{"text": "a"}]
    tables = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a/*.csv\n"
    write(tmp_path / "tables/README.md", f"---\n{tables}---\n")
    write(tmp_path / "tables/a/x.csv", "text,label\nnull,NA\n")
    assert read_rows(tmp_path / "tables") == [{"text": "null", "label": "NA"}]


@pytest.mark.parametrize(
    ("task", "row", "columns", "expected", "told"),
    [
        (TEXTS, {"Review ": "a", "Stars": "5"}, {"label": "Stars"}, Text(0, "a", None, "5"),
         "read Stars as label, Review  as text; not read: none"),
        (TEXTS, {"index_id": "9", "category": "x", "text": "a"}, {}, Text("9", "a", None, "x"), "index_id as id"),
        (TEXTS, {"premise": "a", "hypothesis": "b", "label": "x"}, {}, Text(0, "a", "b", "x"), "premise as text, hyp"),
        (TEXTS, {"text": "a", "sentence2": "b", "label": "x"}, {}, Text(0, "a", None, "x"), "not read: sentence2"),
        (TEXTS, {"text": "a", "review": "b", "label": "x"}, {"text": "review"}, Text(0, "b", None, "x"), "read: text"),
        (PAIRS, {"translation": {"en": "a", "yo": "b"}}, {"source": "translation.en", "target": "translation.yo"},
         Pair("a", "b"), "translation.yo as target; not read: translation.x"),
        (QUESTIONS, {"query": "a", "context": "b", "answer_pivot": {"text": ["b"], "answer_start": [0]}}, {},
         Question(0, "a", "b", {"text": ["b"], "answer_start": [0]}), "answer_pivot as answers"),
        (WORDS, {"tokens": ["a"], "ner_tags": ["O"]}, {}, Tagged(0, ["a"], ["O"]), "tokens as words"),
    ],
)  # fmt: skip
def test_columns(task, row, columns, expected, told, caplog):
    if "translation" in row:
        row["translation"]["x"] = "c"
        task = Task(Pair)
        task.optional = ("label",)
    with caplog.at_level(logging.INFO, "fastprompt"):
        assert read_examples(task, [row, row], columns=columns)[0] == expected
    assert caplog.text.count("rows: read") == 1 and told in caplog.text


@pytest.mark.parametrize(
    ("task", "row", "columns", "message"),
    [
        (TEXTS, {"review": "a", "content": "b", "label": "x"}, {},
         "rows, row 0: review and content could each be text, of 'review', 'content', 'label'; name it: --columns"),
        (QUESTIONS, {"question_lang": "a", "question_translated": "b", "context": "c", "answers": []}, {},
         "question_translated and question_lang could each be question"),
        (WORDS, {"tokens": [], "ner_tags": [], "pos_tags": []}, {}, "ner_tags and pos_tags could each be tags"),
        (TEXTS, {"body": "a", "label": "x"}, {}, "no column for text, only 'body', 'label'; name it: --columns text="),
        (TEXTS, {"text": "a"}, {}, "no column for label, only 'text'"),
        (TEXTS, {"text": "a", "label": "x"}, {"text": "txt"}, "no column 'txt' for text, only 'text', 'label'"),
        (TEXTS, {"text": "a"}, {"txt": "text"}, "columns must give a column's name for any of id, text,"),
    ],
)  # fmt: skip
def test_columns_that_are_not_there(task, row, columns, message):
    with pytest.raises(ValueError) as raised:
        read_examples(task, [row], columns=columns)
    assert message in str(raised.value)


def test_a_column_that_another_may_stand_for():
    class Writing(Task):
        optional = ("id", "prompt", "completion")

        def example(self, row, where, number, *, labelled=True):
            raise ValueError(f"{where}, column prompt: got None, expected a text, or a column messages")

    with pytest.raises(
        ValueError, match="a column messages. There are only 'instruction', 'input'; name it: --columns p"
    ):
        read_examples(Writing(Written), [{"instruction": "a", "input": "b"}])


def test_without_labels():
    row = {"text": "a", "category": "x", "class": "y"}
    assert read_examples(TEXTS, [row, {"text": "b"}], labelled=False) == [Text(0, "a"), Text(1, "b")]
    assert read_examples(TEXTS, [{"text": "a"}], labelled=False, columns={"label": "stars"}) == [Text(0, "a")]
    assert read_rows([{"a": {"b": {"c": 1}}}, {}], columns={"x": "a.b.c"}) == [{"a": {"b": {"c": 1}}, "x": 1}, {}]
    with pytest.raises(ValueError, match="rows, row 0: no column 'b' for x, only 'a'"):
        read_rows([{"a": 1}], columns={"x": "b"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv: no rows in it"),
        ("a.csv", "text,label\n", "a.csv: no rows in it"),
        ("a.csv", "\na,b\n", "line 1: blank, expected the names of the columns"),
        ("a.csv", "a,a\nb,c\n", "line 1: the column 'a' twice"),
        ("a.csv", 'text,label\n"a\nb",x\n\nb\n', "line 5: 1 cell, 'b', expected 2: text, label"),
        ("a.csv", 'text,label\na,x\n"b,x\nc,x\n', "line 3: not quoted as in CSV: unexpected end of data"),
        ("a.csv", 'text,label\na,x\n"b"b,x\n', "line 3: not quoted as in CSV: ',' expected after '\"'"),
        ("a.csv", "text,label\na,x\nb\rc,x\n", "line 3: not quoted as in CSV: new-line character"),
        ("a.tsv", 'text\tlabel\n"a\tx\ty\n', "line 2: 3 cells, .* expected 2: text, label"),
        ("a.csv", b"text,label\r\na,x\r\nb\xff,x\r\n", "line 3, byte 2: 0xff is not UTF-8"),
        ("a.csv", "text\na\n".encode("utf-16-be"), "line 1, byte 1: 0x00 is no text"),
        ("a.txt", codecs.BOM_UTF16_LE + "a\nb".encode("utf-16-le") + b"\x00\xd8", "line 2, byte 3: 0x00 is not UTF-16"),
        ("a.jsonl", '{"text": "a"}\n\n["b"]\n', r"line 3: got \['b'\], expected an object, one a line"),
        ("a.jsonl", '{"text": "a"}\n{"text" "b"}\n', "line 2, column 9: not JSON"),
        ("a.jsonl", '{"text": "\\ud83d\\ude00"}\n{"text": "\\ud83d"}\n', r"line 2 on: \\ud83d is half a character"),
        ("a.json", '[{"text": "a"},\n 3]', "a.json, row 1: got 3, expected an object"),
        ("a.json", '[{"text": "a"},\n 3', "a.json, line 2, column 3: not JSON"),
        ("a.json", '"text"', "a.json: got 'text', expected a list of objects"),
        ("a.parquet", "PAR1", "a.parquet: not a readable Parquet file"),
    ],
)  # fmt: skip
def test_errors(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=message):
        read_rows(write(tmp_path / name, content))


def test_blank_lines_are_told(tmp_path, caplog):
    assert len(read_rows(write(tmp_path / "a.txt", "a\n \nb\n"))) == 2
    assert "a.txt: 1 of 3 lines, blank, are left out" in caplog.text
    with pytest.raises(FileNotFoundError):
        list(iter_rows(tmp_path / "none.csv"))
    with pytest.raises(FileNotFoundError, match="'It is cold today.': no such file or folder, and no owner/name"):
        list(iter_rows("It is cold today."))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        list(iter_rows(tmp_path / "none"))
    with pytest.raises(ValueError, match="format must be one of csv, tsv, .* got 'xlsx'"):
        read_rows(tmp_path / "a.txt", format="xlsx")


def test_parallel(tmp_path):
    rows = [{"translation": {"en": f" A{n} b", "yor": "c"}, "kind": "x"} for n in range(3)]
    file = write(tmp_path / "a.json", lines(rows))
    columns = {"source": "translation.en", "target": "translation.yor"}
    assert read_pairs(file, columns=columns) == [Pair(f"A{n} b", "c") for n in range(3)]
    assert read_pairs(f"{file}[1:2]", columns=columns | {"label": "kind"}) == [Pair("A1 b", "c", "x")]
    named = write(tmp_path / "a.csv", 'source,target,label\n"One, two",un,x\n')
    assert read_pairs(named) == [Pair("One, two", "un")]
    with pytest.raises(ValueError, match="a.csv, line 2: the translation is empty"):
        read_pairs(write(tmp_path / "a.csv", "source,target\na,\n"))
    with pytest.raises(ValueError, match="no column for target, only 'source', 'cy'; name it: --columns target=COLUMN"):
        read_pairs(write(tmp_path / "a.csv", "source,cy\na,b\n"))
    with pytest.raises(ValueError, match="a table of named columns, got target_path or third_column with it"):
        read_pairs(file, columns=columns, third_column="label")
