"""Classification against plain formulas in float64, from the stock model one text at a time."""

import json
import logging
import random

import pytest
import torch
import torch.nn.functional as F
import transformers
from encoder_decoders import build_seq2seq
from helpers import WORDS, build, paraphrases, tokenizer_file, translations, warned
from stock_model import StockModel, loss_without_values

from fastprompt import tasks
from fastprompt.data.examples import Text
from fastprompt.tasks.base import InputConfig
from fastprompt.tasks.classification import Classification, PawsX
from fastprompt.tasks.verbaliser import Verbaliser

CLM = "AutoModelForCausalLM"
LABELS = {"single": ["w1", "w2", "w3"], "multi": [["w1"], ["w1", "w3"], []], "regression": [-1.5, 3.0, 2]}


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(tokenizer_file().decode())
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>")


def texts(problem: str = "single", pair: bool = False, count: int = 9) -> list[Text]:
    rng = random.Random(0)
    return [
        Text(
            f"t{n}",
            " ".join(rng.sample(WORDS, rng.randint(1, 6))),
            " ".join(rng.sample(WORDS, rng.randint(1, 6))) if pair else None,
            LABELS[problem][n % 3],
        )
        for n in range(count)
    ]


def made(model, tokenizer, examples, inputs=None, **settings) -> Classification:
    """A task that fits examples and has a head of random numbers, in float64."""
    task = Classification(**settings)
    task.fit(examples)
    task.build(model, tokenizer, inputs or InputConfig(max_length=60))
    for parameter in task.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return task.double()


def plain_loss(logits: torch.Tensor, label, problem: str, examples) -> torch.Tensor:
    if problem == "single":
        return -torch.log(logits.exp() / logits.exp().sum())[LABELS["single"].index(label)]
    if problem == "multi":
        shares = 1 / (1 + (-logits).exp())  # of w1 and w3
        return -sum(torch.log(p if name in label else 1 - p) for p, name in zip(shares, ("w1", "w3"), strict=True)) / 2
    numbers = torch.tensor([example.label for example in examples], dtype=torch.float64)
    return (logits[0] - (label - numbers.mean()) / numbers.var(correction=0).sqrt()) ** 2


@pytest.mark.parametrize(
    ("family", "pooling", "problem", "pair"),
    [
        ("bert", "mean", "single", True),
        ("bert", "first", "multi", True),
        ("xlm-roberta", "last", "regression", False),
        ("llama", "mean", "single", True),
        ("gemma3_text", "mean", "multi", False),
    ],
)
def test_a_head_is_the_plain_formula(tokenizer, family, pooling, problem, pair):
    model, examples = build(family), texts(problem, pair)
    inputs = InputConfig(prefix_text="w42 ", max_length=60, pooling=pooling)
    task = made(model, tokenizer, examples, inputs, problem=problem)
    items = task.encode(examples)
    logits = []
    for example in examples:
        texts_of = (f"w42 {example.text}", example.text_pair) if pair else (f"w42 {example.text}",)
        if family == "llama":  # a causal model reads one text after the other, and its last state is what counts
            texts_of = ("\n".join(texts_of),)
        encoded = tokenizer(*texts_of, return_tensors="pt", return_token_type_ids=family == "bert")
        hidden = model(**encoded).last_hidden_state[0]
        which = "last" if family in ("llama", "gemma3_text") else pooling
        vector = {"mean": hidden.mean(0), "first": hidden[0], "last": hidden[-1]}[which]
        logits.append(task.head.weight @ vector + task.head.bias)
    pairs = zip(logits, examples, strict=True)
    expected = sum(plain_loss(each, example.label, problem, examples) for each, example in pairs)
    loss = task.loss(StockModel(model)(items), items)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-8)
    grads = [torch.autograd.grad(each, task.head.weight, retain_graph=True)[0] for each in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7)
    for size in (2, 64):
        for got, each in zip(task.predict(StockModel(model), examples, size), logits, strict=True):
            if problem == "single":
                best = int(each.argmax())
                assert got == {
                    "prediction": LABELS["single"][best],
                    "probability": pytest.approx(each.softmax(0)[best].item()),
                }
            elif problem == "multi":
                shares = dict(zip(("w1", "w3"), each.sigmoid().tolist(), strict=True))
                assert got["probability"] == pytest.approx(shares)
                assert got["prediction"] == [name for name, share in shares.items() if share > 0.5]
            else:
                mean, deviation = task.known.scale
                assert got == {"prediction": pytest.approx(each.item() * deviation + mean)}


def own_head(model: torch.nn.Module, kind: str) -> torch.nn.Module:
    head = model.get_output_embeddings()
    if kind == "bias":
        model.set_output_embeddings(torch.nn.Linear(head.in_features, head.out_features, dtype=torch.float64))
    elif kind == "hooked":
        head.register_forward_hook(lambda module, args, output: 2 * output)
    return model


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", ""), ("llama", "bias"), ("llama", "hooked"), ("gemma3_text", ""), ("granite", ""), ("cohere", "")],
)
def test_words_read_the_model_s_own_logits(tokenizer, family, kind):
    """Whatever the head is, and what is made of its product."""
    model, examples = own_head(build(family, CLM), kind), texts()
    task = made(model, tokenizer, examples)
    assert task.verbaliser is not None and not list(task.parameters())
    items, words = task.encode(examples), tokenizer.convert_tokens_to_ids(LABELS["single"])
    with torch.no_grad():
        expected = torch.stack([model(input_ids=torch.tensor([item.ids])).logits[0, -1, words] for item in items])
    targets = torch.tensor([LABELS["single"].index(example.label) for example in examples])
    loss = task.loss(StockModel(model)(items), items)
    torch.testing.assert_close(loss, F.cross_entropy(expected, targets, reduction="sum"), rtol=1e-6, atol=1e-7)
    for got, logits in zip(task.predict(StockModel(model), examples), expected, strict=True):
        assert got["prediction"] == LABELS["single"][int(logits.argmax())]
        assert got["probability"] == pytest.approx(logits.softmax(0).max().item(), abs=1e-7)


def test_words_of_a_head_that_trains(tokenizer):
    """As one does that is the embeddings: what it has become is read, and it has its gradient."""
    model, examples = build("gemma3_text", CLM).requires_grad_(True), texts()
    task = made(model, tokenizer, examples)
    items, head = task.encode(examples), model.get_output_embeddings().weight
    assert not list(task.parameters()) and not task.state_dict()
    with torch.no_grad():
        head += torch.randn_like(head) / 8
    words = tokenizer.convert_tokens_to_ids(LABELS["single"])
    logits = torch.stack([model(input_ids=torch.tensor([item.ids])).logits[0, -1, words] for item in items])
    expected = F.cross_entropy(logits, torch.tensor([item.target for item in items]), reduction="sum")
    loss = task.loss(StockModel(model)(items), items)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    grads = [torch.autograd.grad(each, head)[0] for each in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_pawsx_asks_as_it_did(tokenizer, monkeypatch):
    monkeypatch.setattr(PawsX, "WORDS", {"0": " w1", "1": " w2"})
    task, examples = tasks.get("pawsx"), paraphrases(4)
    task.fit(examples)
    task.build(build("llama", CLM), tokenizer, InputConfig())
    assert task.verbaliser.written("A.", "B.") == (
        "Sentence 1: A.\nSentence 2: B.\nDo both sentences mean the same? Answer:"
    )
    assert [item.target for item in task.encode(examples)] == [0, 1, 0, 1]
    predictions = [{"prediction": label} for label in ("0", "0", "0", "1")]
    assert task.scores(examples, predictions) == {"accuracy": 75.0}
    assert task.metric == "accuracy" and task.name == "pawsx"
    encoder = tasks.get("pawsx")
    encoder.build(build("bert"), tokenizer, InputConfig())
    assert encoder.head.weight.abs().sum() == 0


def of_words(words, merges=None, ended=False):
    """A tokenizer by byte pairs whose words begin with a mark, as sentencepiece's do."""
    from tokenizers import Tokenizer, models, normalizers, processors

    made = Tokenizer(models.BPE({w: n for n, w in enumerate(words)}, merges or [], unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if ended:
        ids = [("</s>", words.index("</s>"))]
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=ids)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


MARKED = ["<unk>", "</s>", "▁", "N", "o", "Y", "▁N", "▁No", "▁Y", "D", ":", "▁0", "1", "0"]


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize(
    ("merges", "words", "lead", "firsts"),
    [
        # words that begin alike alone, and apart where they are asked for
        ([("▁", "N"), ("▁N", "o"), ("▁", "Y")], (" No", " Yo"), [], ["▁No", "▁Y"]),
        # a mark that stands alone before all of them: it is asked with
        ([], (" 0", " 1", " N"), ["▁"], ["0", "1", "N"]),
        ([("▁", "0")], (" 0", " 1"), [], ["▁0", "▁"]),
    ],
)
def test_words_are_told_apart_by_their_first_own_token(ended, merges, words, lead, firsts):
    """And a special token that a tokenizer puts at the end is not what the answer follows."""
    model = build("llama", CLM)
    asked = Verbaliser(of_words(MARKED, merges, ended), model, "{text} D:", words, InputConfig())
    table = model.get_output_embeddings().weight
    assert torch.equal(asked.weight, table[[MARKED.index(each) for each in firsts]])
    ((ids, cut),) = asked.encode([("N o", None)])
    assert [MARKED[id] for id in ids[-len([":", *lead]) :]] == [":", *lead] and not cut


@pytest.mark.parametrize("words", [(" No", " No"), (" N", " No"), (" x", " z")])
def test_words_that_cannot_be_told_apart(words):
    with pytest.raises(ValueError, match=r"told apart by the first token .* after '.*D:', got '.*answers='head'"):
        Verbaliser(of_words(MARKED), build("llama", CLM), "{text} D:", words, InputConfig())


def test_a_long_text_is_cut_and_the_question_stays(tokenizer, caplog):
    model = build("llama", CLM)
    long = [Text("long", " ".join(WORDS[:30]), "w1 w2", "w1"), Text("short", "w3", "w4 w5", "w2")] * 2
    question = "{text} w40 {text_pair} w41"
    whole = made(model, tokenizer, long, question=question).encode(long)
    assert [len(item.ids) for item in whole] == [35, 6, 35, 6] and not any(item.cut for item in whole)
    task = made(model, tokenizer, long, InputConfig(max_length=12), question=question)
    cut = task.encode(long)
    assert [item.cut for item in cut] == [True, False, True, False]
    assert tokenizer.decode(cut[0].ids) == "<s> w0 w1 w2 w3 w4 w5 w6 w40 w1 w2 w41"
    with caplog.at_level(logging.WARNING, "fastprompt"):
        task.predict(StockModel(model), long)
    assert warned(caplog) == ["2 of 4 examples have more than max_length 12 tokens, and are cut"]
    with pytest.raises(ValueError, match="max_length must hold the question itself, which has 5 tokens .* got 4"):
        made(model, tokenizer, long, InputConfig(max_length=4), question=question).encode(long)
    encoder = made(build("bert"), tokenizer, long, InputConfig(max_length=12))
    assert [(len(item.ids), item.cut) for item in encoder.encode(long)[:2]] == [(12, True), (6, False)]


@pytest.mark.parametrize(
    ("family", "problem"), [("bert", "single"), ("bert", "multi"), ("bert", "regression"), ("llama", "single")]
)
def test_a_loss_reads_nothing_of_the_device(tokenizer, family, problem):
    examples, auto = texts(problem), CLM if family == "llama" else "AutoModel"
    task = made(build(family, auto), tokenizer, examples, problem=problem)
    assert loss_without_values(task.float(), task.encode(examples), 48).shape == ()


@pytest.mark.parametrize("problem", ["single", "multi", "regression"])
def test_settings_make_it_again(tokenizer, problem):
    model, examples = build("bert"), texts(problem, pair=True)
    task = made(model, tokenizer, examples, problem=problem)
    again = tasks.get(task.name, **json.loads(json.dumps(task.settings())))
    again.build(model, tokenizer, InputConfig(max_length=60))
    again.double().load_state_dict(task.state_dict())
    predictions = again.predict(StockModel(model), examples)
    assert predictions == task.predict(StockModel(model), examples)
    assert again.scores(examples, predictions) == task.scores(examples, predictions)
    assert again.metric == task.metric and task.metric in task.scores(examples, predictions)


def test_a_class_that_training_did_not_have_is_told(tokenizer, caplog):
    task = made(build("bert"), tokenizer, texts())
    new = [*texts()[:3], Text("new", "w4", None, "w9")]
    assert [item.example for item in task.encode(new)] == [0, 1, 2]
    scores = task.scores(new, [{"prediction": each.label} for each in new[:3]] + [{"prediction": "w1"}])
    assert scores["accuracy"] == 75.0
    message = "1 of 4 examples have a class that training did not have, such as 'w9', and are"
    assert warned(caplog) == [f"{message} left out of the loss", f"{message} scored as wrong"]
    assert [item.target for item in task.encode([Text(0, "w1")])] == [None]


def test_alignment_in_pairs_of_two(tokenizer):
    examples, pairs, chosen = texts(pair=True), translations(12), [7, 3, 11, 0, 5]
    task = made(build("bert"), tokenizer, examples, InputConfig(prefix_text="w42 ", max_length=60))
    inputs = task.align(pairs, chosen, random.Random(3))
    assert [[pair for *_, pair in each.parts] for each in inputs] == [[7, 3], [11, 0]]
    read = [tokenizer.decode(each.item.ids[begin:end]) for each in inputs for begin, end, _ in each.parts]
    assert all(text in pairs[pair][:2] for text, pair in zip(read, chosen, strict=False))
    assert all(tokenizer.decode(each.item.ids[1]) == "w42" for each in inputs)
    assert all(each.item.second == each.parts[1][0] for each in inputs)
    for family, pair, what in (("bert", False, "one text"), ("llama", True, "a causal model")):
        task = made(build(family), tokenizer, texts(pair=pair))
        with pytest.raises(ValueError, match=f"alignment form must be 'sentence' for classification of {what}"):
            task.align(pairs, chosen, random.Random(3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"problem": "pair"}, r"problem must be one of \('single', 'multi', 'regression'\), got 'pair'"),
        ({"answers": "yes"}, r"answers must be one of \('auto', 'head', 'words'\), got 'yes'"),
        ({"metric": "mse", "problem": "regression"}, "metric must be one of .*'spearman'.*, got 'mse'"),
        ({"texts": 3}, "texts must be one of .*, got 3"),
        ({"labels": "ab"}, "labels must be names of classes, got 'ab'"),
        ({"labels": ["a", "a"]}, r"labels must be several and differ, got \['a', 'a'\]"),
        ({"labels": ["a", "b"], "problem": "regression"}, "labels must be None for problem 'regression'"),
        ({"labels": ["a", "b"], "words": {"a": "A"}}, "words must have one for each of the labels"),
        ({"answers": "words", "problem": "multi"}, "answers must be 'auto' or 'head' for problem 'multi', got 'words'"),
        ({"question": "which?"}, "question must have {text} where the text is to stand, got 'which\\?'"),
        ({"question": 3}, "question must have {text} where the text is to stand, got 3"),
        ({"words": {"a": 1}}, "words must be a word for each label, got {'a': 1}"),
        ({"scale": ["0", "1"], "problem": "regression"}, "scale must be a mean and a deviation"),
        ({"scale": [0.0, 0.0], "problem": "regression"}, "scale must be a mean and a deviation"),
        ({"scale": [0.0, 1.0]}, "scale must be a mean and a deviation, for problem 'regression'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Classification(**settings)


@pytest.mark.parametrize(
    ("family", "auto", "settings", "message"),
    [
        (
            "bert",
            "AutoModel",
            {"answers": "words"},
            "answers must be 'auto' or 'head' for BertModel, which has no head",
        ),
        ("llama", "AutoModel", {"answers": "words"}, "answers must be 'auto' or 'head' for LlamaModel"),
        ("bert", "AutoModel", {"question": "{text}?"}, "words and question must be None where a head answers"),
        ("llama", CLM, {"question": "{text} {text_pair}?"}, "question must not have {text_pair} for one text"),
    ],
)
def test_what_does_not_fit_a_backbone(tokenizer, family, auto, settings, message):
    with pytest.raises(ValueError, match=message):
        made(build(family, auto), tokenizer, texts(), **settings).encode(texts())


def test_it_must_be_fitted_first_and_have_one_stack(tokenizer):
    with pytest.raises(ValueError, match="got an encoder-decoder of family 't5'"):
        made(build_seq2seq("t5"), tokenizer, texts())
    with pytest.raises(ValueError, match="labels must be given, or learnt of examples by fit"):
        Classification().build(build("bert"), tokenizer, InputConfig())
