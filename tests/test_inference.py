"""fastprompt.load: predictions, vectors, text and search, with what was trained."""

import sys
import threading
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import tokenizers
import torch
import transformers
from encoder_decoders import build_seq2seq
from helpers import build, tokenizer_file

from fastprompt import inference
from fastprompt.data.examples import Text
from fastprompt.inference import Adapter, Hit, Index, index
from fastprompt.models.methods import AdapterConfig
from fastprompt.tasks.base import InputConfig, Item, Task, run_sorted
from fastprompt.training import AlignmentConfig, run
from fastprompt.training.learner import Learner


class Sign(Task):
    """Whether the first feature of the first token's state is positive."""

    name, metric = "sign", "accuracy"
    columns = {"id": "", "text": "", "text_pair": "", "label": ""}
    labels, optional = ("label",), ("id", "text_pair")

    def settings(self):
        return {"labels": ["no", "yes"]}

    def example(self, row, where, number, *, labelled=True):
        if not isinstance(row.get("text"), str) or (labelled and "label" not in row):
            raise ValueError(f"{where}: got {row}")
        return Text(number, row["text"], row.get("text_pair") or None, row.get("label"))

    def build(self, backbone, tokenizer, inputs):
        self.tokenizer, self.prefix_text = tokenizer, inputs.prefix_text

    def predict(self, model, examples, batch_size=32, on_batch=None):
        texts = [f"{self.prefix_text}{example.text} {example.text_pair or ''}" for example in examples]
        items = [Item(ids, len(ids)) for ids in self.tokenizer(texts)["input_ids"]]
        found = run_sorted(model, items, lambda segments, _: segments.pooled("mean")[:, 0], batch_size, on_batch)
        return [{"prediction": ["no", "yes"][int(x > 0)], "score": float(x)} for x in found]

    def scores(self, examples, predictions, language="en"):
        hits = [example.label == each["prediction"] for example, each in zip(examples, predictions, strict=True)]
        return {"accuracy": 100 * sum(hits) / len(hits), "language": language}


def made(backbone=None, task=None, alignment=None):
    backbone = build("bert", dtype=torch.float32) if backbone is None else backbone
    tokenizer = transformers.PreTrainedTokenizerFast(  # without a pad token, as many a decoder's
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer_file().decode()), unk_token="<unk>"
    )
    inputs = InputConfig(prefix_text="w9 ", max_length=30)
    return Adapter(Learner(backbone, tokenizer, AdapterConfig("prefix", 4), inputs, task, alignment))


def llama():
    return build("llama", "AutoModelForCausalLM", torch.float32)


TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w10 w11", "w12 w1", "w4"]


@pytest.fixture(scope="module")
def adapter():
    return made(task=Sign())


def test_rows_in_every_form(adapter, tmp_path):
    import datasets

    expected = adapter.predict(TEXTS, batch_size=2)
    assert len({each["score"] for each in expected}) == 4
    rows = [{"text": text, "label": None} for text in TEXTS]
    (tmp_path / "rows.csv").write_text("sentence\n" + "".join(text + "\n" for text in TEXTS))
    forms = [
        rows, iter(rows), tuple(TEXTS), iter(TEXTS), [(text,) for text in TEXTS], np.array(TEXTS), pandas.Series(TEXTS),
        pandas.DataFrame(rows), datasets.Dataset.from_list(rows), tmp_path / "rows.csv", str(tmp_path / "rows.csv"),
        [Text(n, text) for n, text in enumerate(TEXTS)], [(text, None) for text in TEXTS],
    ]  # fmt: skip
    for data in forms:
        assert adapter.predict(data, batch_size=2) == expected
    named = [{"what": text} for text in TEXTS]
    assert adapter.predict(named, columns={"text": "what"}, batch_size=2) == expected
    assert list(adapter.predict_stream(iter(TEXTS), chunk=5, batch_size=2)) == expected
    close = list(adapter.predict_stream((text for text in TEXTS), chunk=2))
    assert [each["prediction"] for each in close] == [each["prediction"] for each in expected]
    assert adapter.predict([]) == adapter.predict(iter([])) == list(adapter.predict_stream([])) == []
    (pair,), (joined,) = adapter.predict([("w1", "w2")]), adapter.predict(["w1 w2"])
    assert pair["score"] == pytest.approx(joined["score"], rel=1e-4)


def test_batches_are_of_like_length(adapter):
    told, passes = [], []

    def note(module, args, inputs) -> None:
        assert not torch.is_grad_enabled() and not any(module.training for module in adapter.learner.modules())
        passes.append(inputs["cu_seq_lens_q"].diff().tolist())

    hook = adapter.learner.adapted.prompted.register_forward_pre_hook(note, with_kwargs=True)
    adapter.predict(TEXTS, batch_size=2, on_batch=told.append)
    adapter.encode(TEXTS, batch_size=2)
    assert told == [2, 2, 1]
    assert passes == [[4, 4], [5, 6], [9]] * 2
    adapter.encode(TEXTS * 8, batch_size=40)
    assert len(passes) == 7, "one pass, if it is asked for"
    hook.remove()


def test_scores(adapter):
    labelled = [(text, each["prediction"]) for text, each in zip(TEXTS, adapter.predict(TEXTS), strict=True)]
    labelled[0] = (TEXTS[0], "other")
    assert adapter.score(labelled, language="gd", batch_size=2) == {"accuracy": 80.0, "language": "gd"}
    assert adapter.score([{"text": text, "label": label} for text, label in labelled])["language"] == "en"
    assert adapter.score([(text, None, label) for text, label in labelled])["accuracy"] == 80.0


def test_a_run_without_a_task_finds_translations():
    adapter = made(alignment=AlignmentConfig())
    scores = adapter.score([("w1 w2", "w1 w2"), ("w3", "w3"), ("w4 w5", "w4 w5")])
    assert set(scores) == {"r@1", "r@5", "cosine"}
    for call in (adapter.predict, adapter.predict_stream):
        with pytest.raises(ValueError, match="^predict(_stream)? needs a task, and this run has none"):
            call(TEXTS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: a.predict([("w1", "w2", "w3")]), r"^data must have text in each row, got \('w1', .* in row 0"),
        (lambda a: a.predict(["w1", ("w1", "w2", "w3")]), "in row 1$"),
        (lambda a: a.predict([{"text": 3}]), "row 0: got"),
        (lambda a: a.predict([{"text": "w1"}, {"text": None}]), "row 1, column text: got null, expected a value"),
        (lambda a: a.predict(5), "^data must be rows, or the path of a table, got 5"),
        (lambda a: a.predict(["w1"], batch_size=0), "^batch_size must be a positive integer, got 0"),
        (lambda a: a.predict_stream(["w1"], chunk=0), "^chunk must be"),
        (lambda a: a.score([]), "^data must have at least one row"),
        (lambda a: a.score(["w1"]), "^data must have text, label in each row, got"),
        (lambda a: a.encode("w1"), "^texts must be a list of texts, got 'w1'"),
        (lambda a: a.encode(["w1", None]), "^texts must be a list of texts, got None at 1"),
        (lambda a: a.encode(["w1"], batch_size=1.0), "^batch_size must be"),
        (lambda a: a.search("w1", ["w1"]), "^queries must be a list"),
        (lambda a: a.search(["w1"], "w1"), "^corpus must be a list"),
        (lambda a: a.search(["w1"], ["w1"], top_k=0), "^top_k must be a positive integer, got 0"),
        (lambda a: a.generate(["w1"]), "^generate needs a model that writes, with its head, got BertModel"),
    ],
)
def test_bad_inputs(adapter, call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(adapter)


def test_vectors(adapter):
    learner = adapter.learner
    for module in learner.modules():  # as after a training run
        module.training = True
    found = adapter.encode(TEXTS, batch_size=2)
    assert all(module.training for module in learner.modules())
    learner.eval()
    assert (found.dtype, found.shape) == (np.float32, (5, 48))
    for source, vectors in ((False, found), (True, adapter.encode(TEXTS, source=True))):
        alone = np.concatenate([adapter.encode([text], source=source) for text in TEXTS])
        np.testing.assert_allclose(vectors, alone, atol=2e-5)
    assert np.abs(found - adapter.encode(TEXTS, source=True)).max() > 0.01
    unit = adapter.encode(TEXTS, normalize=True)
    np.testing.assert_allclose((unit**2).sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(unit, found / np.linalg.norm(found, axis=1, keepdims=True), atol=1e-6)
    assert adapter.encode([]).shape == (0, 48)


def test_vectors_are_finite():
    adapter = made()
    adapter.learner.backbone.get_input_embeddings().weight.data[8] = float("nan")  # of w3
    with pytest.raises(ValueError, match="^texts give NaN or infinity in 1 of 5 .* torch.float32, .* for 'w1 w2 w3'$"):
        adapter.encode(TEXTS)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_text(family):
    adapter = made(build_seq2seq("t5", torch.float32, num_layers=4) if family == "t5" else llama())
    learner, tokenizer = adapter.learner, adapter.learner.tokenizer
    learner.backbone.generation_config.eos_token_id = 7
    found = adapter.generate(TEXTS, batch_size=2, max_new_tokens=4)
    for text, got in zip(TEXTS, found, strict=True):
        (ids,) = learner.tokenize([text])
        ids = torch.tensor([ids if family == "t5" else ids[:-1]])  # no </s> before what is written
        mask = torch.ones_like(ids)
        whole = learner.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, pad_token_id=0)
        written = whole[0, 1 if family == "t5" else ids.shape[1] :].tolist()
        written = written[: written.index(7)] if 7 in written else written
        assert got == tokenizer.decode(written, skip_special_tokens=True)
    assert len(set(found)) > 1
    if family == "t5":
        with pytest.raises(ValueError, match="^encode needs an encoder or a decoder, got T5ForConditionalGeneration"):
            adapter.encode(TEXTS)
    first = tokenizer.convert_tokens_to_ids(found[0].split()[0])
    assert adapter.generate(TEXTS[:1], eos_token_id=[first], max_new_tokens=4) == [""]
    config = transformers.GenerationConfig(max_new_tokens=2)
    assert adapter.generate(TEXTS[:1], generation_config=config) == [" ".join(found[0].split()[:2])]
    assert adapter.generate([]) == []
    with pytest.raises(ValueError, match="^options must not have num_return_sequences"):
        adapter.generate(TEXTS, num_return_sequences=2)


def test_threads_take_turns():
    """transformers' generate with a prompt hooks the base model: two at once would read each other's prompts."""
    adapter = made(llama())
    expected, found = [adapter.generate([text], max_new_tokens=4) for text in TEXTS], {}

    def work(n):
        found[n] = adapter.generate([TEXTS[n]], max_new_tokens=4)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(TEXTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(len(TEXTS))] == expected


def brute_force(queries, vectors, top_k):
    queries, vectors = (x.astype(np.float64) for x in (queries, vectors))
    queries, vectors = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300) for x in (queries, vectors))
    scores = queries @ vectors.T
    return np.argsort(-scores.round(10), axis=1, kind="stable")[:, :top_k], scores


@pytest.mark.parametrize("way", ["faiss", "torch"])
def test_both_ways_give_the_same_hits(way, monkeypatch):
    """Ties among them, more than a search takes for candidates, and over several parts of corpus and queries."""
    monkeypatch.setattr(index, "_ROWS", 64)
    monkeypatch.setattr(index, "_QUERIES", 7)
    if way == "torch":
        monkeypatch.setattr(index, "_faiss", lambda: None)
    rng = np.random.default_rng(0)
    vectors, queries = (rng.normal(size=(n, 24)).round(3).astype(np.float32) for n in (203, 20))
    vectors[173:] = vectors[5]  # a product need not give equal rows equal results
    vectors[150] = 0
    queries[3], queries[4] = vectors[5] * 2, 0
    made = Index(vectors, [f"text {n}" for n in range(203)])
    for top_k in (1, 5, 12, 203):
        expected, scores = brute_force(queries, vectors, top_k)
        found = made.search(queries, top_k)
        assert [[hit.index for hit in hits] for hits in found] == expected.tolist()
        for n, hits in enumerate(found):
            assert all(hit.text == f"text {hit.index}" for hit in hits)
            np.testing.assert_allclose([hit.score for hit in hits], scores[n, expected[n]], atol=1e-6)
    assert [len(hits) for hits in made.search(torch.from_numpy(queries).double(), 1000)] == [203] * 20
    assert made.search(queries[:0]) == []
    assert Index(vectors[:0]).search(queries[:2]) == [[], []]
    huge = np.array([[1e30, 1e30], [1e30, 0]], np.float32)
    assert Index(huge).search(huge[1:], 1) == [[Hit(1, 1.0, None)]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: Index(x.astype(int)), "^vectors must be floating point, got int64"),
        (lambda x: Index(x[0]), r"^vectors must have shape \(N, D\), got \(4,\)"),
        (lambda x: Index(np.where(x > 0, np.nan, x)), "^vectors must be finite, got NaN or infinity in . of 3 rows"),
        (lambda x: Index(x, ["one"]), "^texts must be one for each of 3 vectors, got 1"),
        (lambda x: Index(x).search(x[:, :3]), "^queries must have the index's 4 features, got 3"),
        (lambda x: Index(x).search(x * np.inf), "^queries must be finite"),
        (lambda x: Index(x).search(x, 0), "^top_k must be a positive integer"),
    ],
)
def test_bad_vectors(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make(np.random.default_rng(0).normal(size=(3, 4)))


def test_search(adapter):
    corpus = ["w5 w6", *TEXTS]
    found = adapter.search(TEXTS[:2], corpus, top_k=3)
    ready = Index(adapter.encode(corpus, source=True), corpus)
    for one, other in zip(found, adapter.search(TEXTS[:2], ready, top_k=3), strict=True):
        assert [hit.text for hit in one] == [hit.text for hit in other]
        assert all(hit.text == corpus[hit.index] for hit in one)
    expected, _ = brute_force(adapter.encode(TEXTS[:2]), adapter.encode(corpus, source=True), 3)
    assert [[hit.index for hit in hits] for hits in found] == expected.tolist()
    assert adapter.search(TEXTS[:2], []) == [[], []]
    assert len(adapter.search(TEXTS[:1], corpus, top_k=50)[0]) == 6


def test_an_index_in_a_file(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(3, 4))
    texts = ["two\nlines", "\u2028 é", ""]
    made = Index(vectors, texts)
    for name in ("en.v1", "en.v1.npy"):
        made.save(tmp_path / "new" / name)
        read = Index.load(tmp_path / "new" / name)
        assert read.texts == texts
        np.testing.assert_allclose(read.vectors, made.vectors, rtol=1e-6)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["en.v1.jsonl", "en.v1.npy"]
    Index(vectors[:2]).save(tmp_path / "new" / "en.v1")
    assert Index.load(tmp_path / "new" / "en.v1").texts is None
    file, lines = tmp_path / "other.npy", tmp_path / "other.jsonl"
    np.save(file, vectors)
    np.testing.assert_allclose(Index.load(file).vectors, made.vectors, rtol=1e-6)
    for content, message in (('{"text": "one"}\n', "other.npy: texts must be one for each"), ("one\n", "is damaged")):
        lines.write_text(content)
        with pytest.raises(ValueError, match=message):
            Index.load(file)
    lines.unlink()
    for content in (b"", file.read_bytes()[:140], b"text"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="other.npy is damaged"):
            Index.load(file)
    with pytest.raises(FileNotFoundError):
        Index.load(tmp_path / "none")


def test_load(adapter, tmp_path, monkeypatch):
    seen = []

    def load_learner(folder, **options):
        seen.append((folder, options))
        return adapter.learner

    monkeypatch.setattr(run, "load_learner", load_learner)
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    assert inference.load(folder).info is None  # as of PEFT's
    info = run.RunInfo({"name": "bert"}, AdapterConfig(), InputConfig(), language="gd")
    run.write_run(tmp_path, info)
    (tmp_path / "exported").mkdir()
    assert inference.load(tmp_path / "exported").info is None, "the run's folder around it says nothing of it"
    seen.pop()
    loaded = inference.load(str(folder), device="cpu", backbone="elsewhere")
    assert seen[1] == (folder, {"device": "cpu", "dtype": None, "backbone": "elsewhere", "task": None})
    assert (loaded.task, loaded.labels, loaded.language, loaded.backbone) == ("sign", ["no", "yes"], "gd", "")
    assert loaded.info == inference.load(tmp_path).info == info
    assert repr(loaded) == (
        "Adapter(task='sign', labels=['no', 'yes'], method='prefix', backbone='', language='gd', device='cpu', "
        "1,152 trained parameters)"
    )
    with pytest.raises(FileNotFoundError, match="^folder must be that of a run, got '.*none', which is no folder"):
        inference.load(tmp_path / "none")


def test_export(adapter, monkeypatch):
    seen = []
    stub = SimpleNamespace(export=lambda *args, **options: seen.append((args, options)))
    monkeypatch.setitem(sys.modules, "fastprompt.export", stub)
    adapter.export("peft", "there", copy_backbone=True)
    assert seen == [((adapter.learner, "peft", "there"), {"info": None, "scores": {}, "copy_backbone": True})]
