"""Tagging against plain formulas in float64, of short sentences and of long ones in windows."""

import json
import logging
import random

import pytest
import torch
import transformers
from helpers import WORDS, build, warned
from stock_model import StockModel, loss_without_values

from fastprompt import tasks
from fastprompt.data.examples import Tagged
from fastprompt.tasks.base import InputConfig
from fastprompt.tasks.tagging import Tagging

TAGS = ["O", "B-PER", "I-PER", "B-LOC"]


@pytest.fixture(scope="module")
def tokenizer():
    """WordPiece: "w12" is "w", "##12"; and "¶" is no token at all."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "w", *(f"##{n}" for n in range(43))]
    made = Tokenizer(models.WordPiece({word: n for n, word in enumerate(vocabulary)}, unk_token="<unk>"))
    made.normalizer = normalizers.Replace("¶", "")
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("<s>", 0), ("</s>", 2)]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>")


def sentences(count: int = 6, longest: int = 6) -> list[Tagged]:
    rng = random.Random(0)
    lengths = [rng.randint(1, longest) for _ in range(count)]
    return [Tagged(f"s{n}", rng.choices(WORDS, k=k), rng.choices(TAGS, k=k)) for n, k in enumerate(lengths)]


def made(model, tokenizer, examples, **inputs) -> Tagging:
    task = Tagging()
    task.fit(examples)
    task.build(model, tokenizer, InputConfig(**({"max_length": 60} | inputs)))
    for parameter in task.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return task.double()


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_head_on_each_word(tokenizer, family):
    """On its first token; of a causal model on its last."""
    model, examples = build(family), sentences()
    task = made(model, tokenizer, examples, prefix_text="w41 w42 ")
    items, total, shares = task.encode(examples), 0, []
    for example, item in zip(examples, items, strict=True):
        parts = [["w", f"##{word[1:]}"] for word in ("w41", "w42", *example.words)]
        ids = tokenizer.convert_tokens_to_ids(["<s>", *(token for part in parts for token in part), "</s>"])
        hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        assert item.ids == ids and task.count(item) == len(example.words)
        for n, tag in enumerate(example.tags):
            row = hidden[1 + 2 * (2 + n) + (family == "llama")]
            share = (task.head.weight @ row + task.head.bias).softmax(0)
            total = total - share[task.tags.index(tag)].log()
            shares.append(share)
    loss = task.loss(StockModel(model)(items), items)
    torch.testing.assert_close(loss, total, rtol=1e-10, atol=1e-10)
    grads = [torch.autograd.grad(each, task.head.weight, retain_graph=True)[0] for each in (loss, total)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-10)
    for size in (1, 64):
        found = task.predict(StockModel(model), examples, size)
        assert [len(each["prediction"]) for each in found] == [len(example.words) for example in examples]
        assert [tag for each in found for tag in each["prediction"]] == [task.tags[int(s.argmax())] for s in shares]
        assert [p for each in found for p in each["probability"]] == pytest.approx([s.max().item() for s in shares])


def test_a_loss_reads_nothing_of_the_device(tokenizer):
    task = made(build("bert"), tokenizer, sentences())
    assert loss_without_values(task.float(), task.encode(sentences()), 48).shape == ()


def test_words_of_every_kind_of_tokenizer(tokenizer):
    """By bytes, where a word's first token begins with the space before it, or by pieces with a mark."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["ab", "c", "日本", "é", "ab"]
    for kind in (pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Metaspace()):
        marks = sorted({*pre_tokenizers.ByteLevel.alphabet(), "▁", "a", "b", "c", "日", "本", "é"})
        vocabulary = {token: n for n, token in enumerate([*marks, "ab"])}
        plain = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
        plain.pre_tokenizer, plain.decoder = kind, decoders.ByteLevel()
        by = transformers.PreTrainedTokenizerFast(tokenizer_object=plain)
        task = made(build("bert", vocab_size=400), by, [Tagged(0, words, ["X", "Y", "X", "Y", "X"])])
        (item,) = task.encode([Tagged(0, words, ["X", "Y", "X", "Y", "X"])])
        text, spans = " ".join(words), by(" ".join(words), return_offsets_mapping=True)["offset_mapping"]
        starts = [text.index(word) for word in words[:-1]] + [text.rindex("ab")]
        for row, start in zip(item.target.rows, starts, strict=True):
            begin, end = spans[row]
            assert begin <= start < end and (row == 0 or spans[row - 1][1] <= start)
        assert item.target.tags == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(("max_length", "stride"), [(24, 8), (17, 0), (8, 128)])
def test_a_long_sentence_is_read_in_windows(tokenizer, max_length, stride):
    """Every word once, in a window of its neighbours: no window longer than max_length, none of its words cut."""
    model, examples = build("bert"), sentences(4, 40)
    task = made(model, tokenizer, examples, max_length=max_length, stride=stride, prefix_text="w42 ")
    items = task.encode(examples)
    assert len(items) > 8 and max(len(item.ids) for item in items) <= max_length
    assert not any(item.cut for item in items)
    asked = sorted((item.example, n) for item in items for n in item.target.numbers)
    assert asked == [(n, word) for n, example in enumerate(examples) for word in range(len(example.words))]
    for item in items:
        assert tokenizer.convert_ids_to_tokens(item.ids[:3]) == ["<s>", "w", "##42"]
        for row, n, tag in zip(*item.target, strict=True):
            word = examples[item.example].words[n]
            assert tokenizer.convert_ids_to_tokens(item.ids[row : row + 2]) == ["w", f"##{word[1:]}"]
            assert task.tags[tag] == examples[item.example].tags[n]
        words = len(examples[item.example].words)
        begin = item.target.numbers[0] - (item.target.rows[0] - 3) // 2
        end = begin + (len(item.ids) - 4) // 2
        for n in item.target.numbers:
            if stride == 8:  # four words are shared, and each is read where it has two on either side
                assert (begin == 0 or n - begin >= 2) and (end == words or end - 1 - n >= 2)
    found = task.predict(StockModel(model), examples)
    assert [len(each["prediction"]) for each in found] == [len(example.words) for example in examples]
    assert min(p for each in found for p in each["probability"]) > 0


def test_words_without_a_token(tokenizer, caplog):
    model = build("bert")
    examples = [Tagged(0, ["w1", "¶", "w2"], ["B-PER", "I-PER", "O"]), Tagged(1, ["¶"], ["B-PER"])]
    task = made(model, tokenizer, examples)
    (item,) = task.encode(examples)
    assert item.target.numbers == [0, 2] and task.count(item) == 2
    with caplog.at_level(logging.WARNING, "fastprompt"):
        found = task.predict(StockModel(model), examples)
    assert found[0]["prediction"][1] == "O" and found[1] == {"prediction": ["O"], "probability": [0.0]}
    assert warned(caplog) == ["2 words have no token of their own, and are predicted to be O"]
    assert task.predict(StockModel(model), []) == []


def test_entities_are_scored_by_seqeval(tokenizer, caplog):
    task = Tagging(TAGS)
    truth = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    given = [["B-PER", "I-PER", "O", "O"], ["B-LOC", "B-LOC"]]
    examples = [Tagged(n, ["w"] * len(tags), tags) for n, tags in enumerate(truth)]
    scores = task.scores(examples, [{"prediction": tags} for tags in given])
    # of three entities two are found, and one is none
    assert scores == pytest.approx({"f1": 200 / 3, "precision": 200 / 3, "recall": 200 / 3, "accuracy": 400 / 6})
    nothing = task.scores([Tagged(0, ["w"], ["O"])], [{"prediction": ["O"]}])
    assert nothing == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 100.0}
    assert task.metric == "f1" and not warned(caplog)
    task.scores([Tagged(0, ["w"], ["B-NEW"])], [{"prediction": ["O"]}])
    assert warned(caplog) == [
        "1 of 1 words have a tag that training did not have, such as 'B-NEW', and are scored as wrong"
    ]
    with pytest.raises(ValueError, match="prediction of example 0 must have 1 tags, got 2"):
        task.scores([Tagged(0, ["w"], ["O"])], [{"prediction": ["O", "O"]}])


def test_parts_of_speech_are_scored_word_by_word():
    task = Tagging(["NOUN", "VERB"])
    assert task.scores([Tagged(0, ["w", "w"], ["NOUN", "VERB"])], [{"prediction": ["NOUN"] * 2}]) == {"accuracy": 50.0}
    assert task.metric == "accuracy"


def test_tags_that_training_did_not_have(tokenizer, caplog):
    task = made(build("bert"), tokenizer, sentences())
    (item,) = task.encode([Tagged(0, ["w1", "w2", "w3"], ["O", "B-NEW", "B-PER"]), Tagged(1, ["w1"], ["B-NEW"])])
    assert item.target.numbers == [0, 2] and item.target.rows == [1, 5]
    assert warned(caplog) == [
        "2 of 4 words have a tag that training did not have, such as 'B-NEW', and are left out of the loss"
    ]
    assert task.encode([Tagged(0, ["w1"])])[0].target == ([1], [0], None)


def test_settings_make_it_again(tokenizer):
    model, examples = build("bert"), sentences()
    task = made(model, tokenizer, examples)
    again = tasks.get(task.name, **json.loads(json.dumps(task.settings())))
    again.build(model, tokenizer, InputConfig(max_length=60))
    again.double().load_state_dict(task.state_dict())
    assert again.predict(StockModel(model), examples) == task.predict(StockModel(model), examples)


def test_rows():
    task = Tagging()
    row = {"words": ["a b", "c"], "tags": [3, "O"], "id": 9}
    assert task.example(row, "f, row 2", 1) == Tagged(9, ["a b", "c"], ["3", "O"])
    assert task.example({"words": " a  b ", "tags": "O O"}, "f, row 2", 1) == Tagged(1, ["a", "b"], ["O", "O"])
    assert task.example({"words": ["a"], "tags": []}, "f, row 2", 1, labelled=False) == Tagged(1, ["a"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tags": ["O"]}, "f, row 2: no column 'words', only 'tags'"),
        ({"words": ["a"]}, "f, row 2: no column 'tags', only 'words'"),
        ({"words": [], "tags": []}, r"f, row 2, words: must be a list of texts, or a text .*, got \[\]"),
        ({"words": ["a", None], "tags": ["O", "O"]}, r"row 2, words: must be a list of texts, .* got \['a', None\]"),
        ({"words": ["a", "b"], "tags": ["O"]}, "f, row 2, tags: must be one for each of the 2 words, got 1"),
    ],
)
def test_bad_rows(row, message):
    with pytest.raises(ValueError, match=message):
        Tagging().example(row, "f, row 2", 1)


def test_what_does_not_fit(tokenizer):
    model, inputs = build("bert"), InputConfig()
    with pytest.raises(ValueError, match="tags must be given, or learnt of examples by fit"):
        Tagging().build(model, tokenizer, inputs)
    with pytest.raises(ValueError, match="tokenizer must be a fast one, which knows characters, got str"):
        Tagging(TAGS).build(model, "slow", inputs)
    with pytest.raises(ValueError, match="max_length must be above 2, the tokens beside the words of .* 's1', got 2"):
        made(model, tokenizer, sentences(), max_length=2).encode([Tagged("s1", WORDS)])
    for tags, message in (("O", "names, got 'O'"), ([], r"names, got \[\]"), (["O", "O"], "differ")):
        with pytest.raises(ValueError, match=f"tags must (be )?{message}"):
            Tagging(tags)
    with pytest.raises(ValueError, match=r"tags of example 's' must be of \['O', .*\], got 'X'"):
        Tagging(TAGS).fit([Tagged("s", ["a"], ["X"])])
    with pytest.raises(ValueError, match="example 's' must have tags, got none"):
        Tagging().fit([Tagged("s", ["a"])])
