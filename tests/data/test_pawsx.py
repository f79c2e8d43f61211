"""PAWS-X, in the official layout, XTREME's and the hub's."""

import csv
import io

import pytest

from fastprompt.data import pawsx
from fastprompt.data.examples import Text

HEADER = "id\tsentence1\tsentence2\tlabel\n"
# Quotation marks of every kind; U+2028 and U+0085 end no line.
ROWS = [
    ("4", "Die Tante backt.", "Es backt die Tante.", "1"),
    ("6", "NS", "Er sagte „ja“.", "0"),
    ("9", '"Nein", sagte sie.', 'Sie sagte "nein".', "1"),
    ("12", "Hans kam vor Eva\u2028an.", "Eva kam vor\x85Hans an.", "0"),
    ("13", "Das NS steht für Nuss.", "NS", "1"),
    ("15", '"Ganz in Zeichen"', "", "0"),
    ("20", '"', '""', "0"),
]
KEPT = [Text(*ROWS[row]) for row in (0, 2, 3, 6)]


def official(rows) -> str:
    return HEADER + "".join("\t".join(map(str, row)) + "\n" for row in rows)


def xtreme(rows) -> str:
    """As XTREME writes it: by csv.writer, without ids."""
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows(row[1:] for row in rows)
    return text.getvalue()


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_official_layout(tmp_path, end):
    write(tmp_path / "x-final/de/dev_2k.tsv", b"\xef\xbb\xbf" + official(ROWS).replace("\n", end).encode())
    for data in (tmp_path, str(tmp_path / "x-final")):
        assert pawsx.read(data, "de", "dev") == KEPT


def test_official_names(tmp_path):
    names = {("en", "train"): "train", ("de", "train"): "translated_train", ("en", "dev"): "dev_2k"}
    names |= {("de", "test"): "test_2k", ("zh", "test"): "test_2k"}
    for number, ((language, _), name) in enumerate(names.items()):
        write(tmp_path / "x-final" / language / f"{name}.tsv", official([(number, "a", "b", "1")]))
    for number, (language, split) in enumerate(names):
        assert pawsx.read(tmp_path, language, split) == [Text(str(number), "a", "b", "1")]
    with pytest.raises(FileNotFoundError, match=r"neither x-final/fr/dev_2k\.tsv nor .* nor dev-fr\.tsv"):
        pawsx.read(tmp_path, "fr", "dev")


def test_xtreme_layout(tmp_path):
    write(tmp_path / "dev-de.tsv", xtreme(ROWS))
    expected = [Text(str(row + 1), *ROWS[row][1:]) for row in (0, 2, 3, 6)]
    assert pawsx.read(tmp_path, "de", "dev") == expected


def test_xtreme_layout_without_its_quoting(tmp_path):
    """A text that merely begins, or merely ends, with a quotation mark stays as it is."""
    file = write(tmp_path / "dev.tsv", '"Ja", sagte er.\tEr sagte "ja"\t1\n"Ja" und "nein"\tBeides\t0\n')
    expected = [("1", '"Ja", sagte er.', 'Er sagte "ja"', "1"), ("2", '"Ja" und "nein"', "Beides", "0")]
    assert pawsx.read_file(file) == [Text(*row) for row in expected]


@pytest.mark.parametrize("rows", [slice(2), slice(1, 4), slice(3, None), slice(-1, None), slice(None, None, 2)])
def test_rows_are_chosen_before_any_is_left_out(tmp_path, rows):
    expected = [example for example in [Text(*row) for row in ROWS][rows] if example in KEPT]
    write(tmp_path / "de/test_2k.tsv", official(ROWS))
    assert pawsx.read(tmp_path, "de", "test", rows) == expected
    file = write(tmp_path / "test.tsv", xtreme(ROWS))
    assert [example[1:] for example in pawsx.read_file(file, rows)] == [example[1:] for example in expected]


def test_dataset(write_dataset):
    columns = dict(zip(("id", "sentence1", "sentence2", "label"), map(list, zip(*ROWS, strict=True)), strict=True))
    columns |= {name: [int(each) for each in columns[name]] for name in ("id", "label")}
    folder = write_dataset({"de": {"validation": columns}, "fr": {"test": columns | {"label": [1, -1] + [0] * 5}}})
    assert pawsx.read(folder, "de", "dev") == KEPT
    assert pawsx.read(folder, "de", "dev", slice(1, 3)) == KEPT[1:2]
    with pytest.raises(ValueError, match="dataset, config fr, split test, row 1, label: got '-1', expected 0 or 1"):
        pawsx.read(folder, "fr", "test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows in it"),
        (HEADER, "no rows in it"),
        (HEADER + "1\ta\tb\t1\n2\ta\tb\t2\n", r"de\.tsv, line 3, label: got '2', expected 0 or 1"),
        (HEADER + "1\ta\tb\t\n", "line 2, label: got ''"),
        ("a\tb\t1\na\tb\tyes\n", "line 2, label: got 'yes', expected 0 or 1"),
        (HEADER + "1\ta\tb\n", "line 2: 3 columns in .*, expected 4: id, sentence1, sentence2, label"),
        ("a\tb\n", r"line 1: 2 columns in 'a\\tb', expected 3: sentence1, sentence2, label"),
        ("a\tb\t1\n\na\tb\t1\n", "line 2: 1 column in '', expected 3"),
        (b"a\tb\t1\na\t\xff\t1\n", "line 2, byte 3: 0xff is not UTF-8"),
    ],
)
def test_errors(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        pawsx.read_file(write(tmp_path / "de.tsv", content))


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="language must be one of en, fr, es, de, zh, ja, ko, got 'cy'"):
        pawsx.read(tmp_path, "cy", "dev")
    with pytest.raises(ValueError, match="split must be one of train, dev, test, got 'validation'"):
        pawsx.read(tmp_path, "en", "validation")


def test_what_is_left_out_is_told(tmp_path, caplog):
    rows = ["NS\tb\t0", "a\t\t1", "a\tb\t1", "c\td\t0"]
    (tmp_path / "test-de.tsv").write_text("".join(f"{row}\n" for row in rows))
    assert len(pawsx.read(tmp_path, "de", "test", slice(1, 4))) == 2
    assert "test-de.tsv: 1 of 3 pairs, with NS or without a text, are left out" in caplog.text
    caplog.clear()
    pawsx.read(tmp_path, "de", "test", slice(2, 4))
    assert not caplog.text
