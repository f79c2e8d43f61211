"""Reading and splitting parallel text."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprompt.data.examples import Pair
from fastprompt.data.parallel import read_catalogue, read_pairs, split_pairs

# Everything that ends a line for str.splitlines() but not for a file of sentences, and no surrounding white space.
SENTENCE = st.text(
    st.characters(codec="utf-8", exclude_characters="\0\t\r\n") | st.sampled_from("\u2028\x85\x0b\x1c"), min_size=1
).filter(lambda text: text == text.strip())


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@given(
    st.lists(st.tuples(SENTENCE, SENTENCE, SENTENCE), min_size=1),
    st.booleans(),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.booleans(),
)
def test_table_round_trip(folder, rows, labelled, end, mark, last_end):
    if all(any(map(str.isdigit, row[0])) for row in rows):  # what may be taken for scores or ids
        rows = [*rows, ("A sentence", "Brawddeg", "label")]
    expected = [Pair(*row) if labelled else Pair(*row[:2]) for row in rows]
    third = "label" if labelled else None
    text = end.join("\t".join(cell for cell in pair if cell is not None) for pair in expected) + end * last_end
    path = write(folder / "pairs.tsv", b"\xef\xbb\xbf" * mark + text.encode())
    if text.startswith("\ufeff") and not mark:  # then it is the mark
        expected[0] = Pair(*read_pairs(path, third_column=third)[0])
        assert expected[0].target == rows[0][1]
    assert read_pairs(path, third_column=third) == expected
    if labelled:
        assert read_pairs(path, third_column="ignore") == [pair._replace(label=None) for pair in expected]
        with pytest.raises(ValueError, match=r"a third column, such as .*, and nothing says what it is: --"):
            read_pairs(path)
    else:
        assert read_pairs(path, third_column="ignore") == expected
        with pytest.raises(ValueError, match="third_column must not be 'label', as there is none"):
            read_pairs(path, third_column="label")


def test_aligned_files(tmp_path):
    english = write(tmp_path / "a.en", " One two\r\nThree\r\n")
    target = write(tmp_path / "a.cy", "Un dau\nTri ")
    assert read_pairs(english, target) == [Pair("One two", "Un dau"), Pair("Three", "Tri")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no pairs"),
        ("a\tb\nno tab here\n", r"pairs\.tsv, line 2: no tab in 'no tab here', expected English, tab, translation"),
        ("a\tb\n\nc\td\n", "line 2: no tab in ''"),
        ("a\tb\tc\td\n", "line 1: 3 tabs"),
        ("a\tb\n \tb\n", "line 2: the English side is empty"),
        ("a\tb\nc\t\n", "line 2: the translation is empty"),
        ("a\tb\t \n", "line 1: the label is empty"),
        ("a\tb\nc\td\tyes\n", "line 2: a third column, but line 1 has none"),
        ("a\tb\tyes\nc\td\n", "line 2: no third column, but line 1 has one"),
        ("1.003\ta b\tc d\n1.0e-1\te f\tg h\n", "the English side is a number in every row, such as '1.003'"),
        ("17\teen zin\tx\n", "the English side is a number in every row, such as '17'"),
        ("99.5%\teen zin\tx\n", "the English side is a number in every row"),
        ("en-1\ta b\tc d\nen-2\te f\tg h\n", "the English side is an id in every row, such as 'en-1'"),
        (b"a\tb\nc\td\xff\n", "line 2, byte 4: 0xff is not UTF-8"),
        (b"\xef\xbb\xbfa\tb\xc3\n", "line 1, byte 4: 0xc3 is not UTF-8"),
        ("a\tb\n".encode("utf-16-le"), "line 1, byte 2: 0x00 is no text; expected UTF-8, or UTF-16 with its mark"),
    ],
)
def test_table_errors(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(write(tmp_path / "pairs.tsv", content), third_column="label")


def test_numbers_among_sentences(tmp_path):
    pairs = [Pair("17", "dix-sept"), Pair("One", "un deux"), Pair("F16", "un avion F16")]
    assert read_pairs(write(tmp_path / "pairs.tsv", "".join(f"{a}\t{b}\n" for a, b, _ in pairs))) == pairs
    scored = write(tmp_path / "scored.tsv", "1.05\ta b\tc d\n")
    with pytest.raises(ValueError, match="the English side is a number in every row"):
        read_pairs(scored)
    with pytest.raises(ValueError, match="third_column must be one of .* got 'labels'"):
        read_pairs(tmp_path / "pairs.tsv", third_column="labels")


def test_aligned_errors(tmp_path):
    two, three = write(tmp_path / "two", "a\nb\n"), write(tmp_path / "three", "a\nb\nc\n")
    with pytest.raises(ValueError, match=r"two has 2 lines, .*three has 3"):
        read_pairs(two, three)
    with pytest.raises(ValueError, match="line 2: the translation is empty"):
        read_pairs(two, write(tmp_path / "blank", "a\n  \n"))
    with pytest.raises(ValueError, match="no pairs"):
        read_pairs(write(tmp_path / "none", ""), write(tmp_path / "none either", ""))
    with pytest.raises(ValueError, match="holds both languages"):
        read_pairs(write(tmp_path / "cy.po", ""), two)


@pytest.mark.parametrize("name", ["missing.tsv", "missing.po"])
def test_missing_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        read_pairs(tmp_path / name)


CATALOGUE = r"""
msgid ""
msgstr ""
"Content-Type: text/plain; charset=UTF-8\n"
"Plural-Forms: nplurals=3; plural=(n==0 ? 0 : n==1 ? 1 : 2);\n"

msgid " Log in\n"
msgstr "Mewngofnodi"

msgctxt "month"
msgid "May"
msgstr "Mai"

msgid "Untranslated"
msgstr ""

msgid "Blank"
msgstr " "

#, fuzzy
msgid "Fuzzy"
msgstr "Niwlog"

msgid "one day"
msgid_plural "many days"
msgstr[0] "dim"
msgstr[1] "un diwrnod"
msgstr[2] "llawer"

#~ msgid "Obsolete"
#~ msgstr "Hen"
"""


def test_catalogue(tmp_path, caplog):
    expected = [Pair("Log in", "Mewngofnodi"), Pair("May", "Mai"), Pair("one day", "un diwrnod")]
    assert read_pairs(write(tmp_path / "cy.po", CATALOGUE)) == expected
    assert "cy.po: 3 of 6 entries, not translated or fuzzy, are left out" in caplog.text
    assert read_catalogue(write(tmp_path / "empty.po", 'msgid ""\nmsgstr ""\n')) == []


def test_catalogue_in_the_charset_of_its_header(tmp_path):
    text = CATALOGUE.replace("UTF-8", "ISO-8859-1").replace("Mewngofnodi", "Â")
    assert read_pairs(write(tmp_path / "cy.po", text.encode("latin-1")))[0].target == "Â"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CATALOGUE.replace('msgid "May"', "a line of prose"), "cy.po: not a readable gettext catalogue"),
        (CATALOGUE.encode() + b"\xff", "cy.po: not a readable gettext catalogue"),
        (CATALOGUE.replace("plural=(n==0", "plural=(x==0"), "Plural-Forms"),
        (CATALOGUE.replace("msgstr[1]", "msgstr[4]"), r"no msgstr\[1\]"),
        (CATALOGUE.replace("Log in\\n", ""), "the English side is empty"),
        ('msgid ""\nmsgstr ""\n', "no pairs"),
    ],
)
def test_catalogue_errors(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(write(tmp_path / "cy.po", content))


def test_split():
    pairs = [Pair(str(n), str(-n)) for n in range(23)]
    before = list(pairs)
    test, train = split_pairs(pairs, test=5, train=11, seed=3)
    random.Random(3).shuffle(before)
    assert (test, train) == (before[:5], before[5:16])
    assert pairs == sorted(pairs, key=lambda pair: int(pair.source)), "the list given must stay as it is"
    assert split_pairs(pairs, test=0, train=23, seed=4)[1] != pairs


@pytest.mark.parametrize(("test", "train"), [(10, 14), (24, 0)])
def test_split_of_too_few(test, train):
    with pytest.raises(ValueError, match="test and train must be at most 23 pairs together"):
        split_pairs([Pair("a", "b")] * 23, test=test, train=train, seed=0)


def test_split_of_a_negative_number():
    with pytest.raises(ValueError, match="negative, got -1"):
        split_pairs([Pair("a", "b")] * 23, test=-1, train=3, seed=0)
