"""Question answering: spans against plain loops, words against stock transformers, and what a table may hold."""

import json
import logging
import random

import numpy as np
import pytest
import torch
from encoder_decoders import build_seq2seq
from helpers import build, questions, translations
from stock_model import StockModel, loss_without_values
from stock_writer import packed, stock_loss, word_tokenizer
from tokenizers import processors

from fastprompt.data.examples import Answer, Question
from fastprompt.tasks.base import InputConfig
from fastprompt.tasks.qa import Qa
from fastprompt.tasks.spans import placed


def ask(number, question, context, *answers):
    return Question(number, question, context, [Answer(each, context.index(each)) for each in answers])


QUESTIONS = [ask(0, "w1 w2", "w3 w4 w5 w6 w7", "w5 w6"), ask("b", "w8", "w9 w10 w11", "w9")]
NONE = Question("none", "w12", "w13 w14", [])


def made(backbone, tokenizer=None, prefix_text="", max_length=40, stride=8, examples=(), **settings) -> Qa:
    task = Qa(**settings)
    task.fit(examples)
    inputs = InputConfig(max_length=max_length, stride=stride, prefix_text=prefix_text)
    task.build(backbone, tokenizer or word_tokenizer(), inputs)
    return task.double()


@pytest.fixture
def spans():
    """A task with weights that are not its first ones, and a model for it."""

    def make(family="bert", **settings):
        backbone = build(family)
        task = made(backbone, **settings)
        for parameter in task.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return task, StockModel(backbone)

    return make


@pytest.mark.parametrize("unanswerable", [False, True])
def test_spans_are_the_formula_in_plain_loops(spans, unanswerable):
    """Likeness to the question beside a linear head, each input by itself: logits, loss and gradients."""
    task, _ = spans(unanswerable=unanswerable)
    items = task.encode([*questions(3), *QUESTIONS, *([NONE] if unanswerable else [])])
    assert len(items) == 5 + unanswerable and [task.count(item) for item in items] == [1] * len(items)
    rows = [torch.randn(len(item.ids), 48, dtype=torch.float64, requires_grad=True) for item in items]
    segments, wanted = packed(rows), [*rows, *task.parameters()]
    logits, losses = task.spans.logits(segments, items), []
    for row, item, got in zip(rows, items, logits, strict=True):
        asked, (target, count) = row[1 : item.second].mean(0), item.target
        expected = torch.full_like(got, -torch.inf)
        for n in [*([0] if unanswerable else []), *range(item.second, item.second + count)]:
            likeness = [torch.cosine_similarity(row[n], match @ asked, dim=0) for match in task.spans.match]
            expected[n] = task.spans.head(row[n]) + 10 * torch.stack(likeness)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        losses += [-expected.log_softmax(0)[place, side] / 2 for side, place in enumerate(target)]
    loss, expected = task.loss(segments, items), sum(losses)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    found, truth = (torch.autograd.grad(each, wanted) for each in (loss, expected))
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    if unanswerable:
        assert items[-1].target[0] == (0, 0)


def test_a_loss_reads_nothing_of_its_device():
    for unanswerable in (False, True):
        task = made(build("bert"), unanswerable=unanswerable).float()
        assert loss_without_values(task, task.encode(questions(3)), 48).dtype == torch.float32


def test_predictions_do_not_depend_on_batches(spans):
    for family, unanswerable in (("bert", False), ("xlm-roberta", True)):
        task, model = spans(family, unanswerable=unanswerable, max_length=24, stride=4)
        examples, told = [*questions(7), Question("empty", "w1", "", None)], []
        predictions = [task.predict(model, examples, size, told.append) for size in (1, 4, 64)]
        assert predictions[0] == predictions[1] == predictions[2] and len(predictions[0]) == 8
        assert sum(told) % 3 == 0 and predictions[0][-1]["prediction"] == ""
        assert len({each["prediction"] for each in predictions[0]}) > 2
        assert all(each["prediction"] in example.context
                   for each, example in zip(predictions[0], examples, strict=True))  # fmt: skip
        assert (predictions[0][-1]["score"] is None) != unanswerable
        blind = [question._replace(answers=None) for question in examples]
        assert task.predict(model, blind) == predictions[0]


def test_a_question_without_an_answer_is_no_window_s(spans):
    task, model = spans(unanswerable=True, max_length=14, stride=2)
    long = ask(1, "w1", " ".join(f"w{n}" for n in range(2, 30)), "w12")
    items = task.encode([long])
    held = [item.target[0] != (0, 0) for item in items]
    assert len(items) > 2 and any(held) and not all(held)
    whole = ask(2, "w1", long.context, long.context)
    assert task.encode([whole]) == []  # it has an answer, which no window holds
    assert Qa(**task.settings()).unanswerable and not Qa().unanswerable
    task = Qa()
    task.fit([NONE._replace(answers=None), *QUESTIONS])
    assert not task.unanswerable
    task.fit([*QUESTIONS, NONE])
    assert task.unanswerable
    bare = word_tokenizer()
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1")
    with pytest.raises(ValueError, match="unanswerable needs a tokenizer whose inputs begin with a special token"):
        made(build("bert"), bare, unanswerable=True)


def test_answers_that_do_not_stand_where_they_say(spans, caplog):
    """One that stands once is taken; others train nothing, and are told of by their absence."""
    task, _ = spans()
    right, wrong = QUESTIONS[0], QUESTIONS[0]._replace(answers=[Answer("w5 w6", 2)])
    unknown = wrong._replace(answers=[Answer("w5 w6", -1)])
    twice = Question(3, "w1", "w2 w3 w2", [Answer("w2", 4)])
    absent = Question(4, "w1", "w2 w3", [Answer("yes", -1)])
    with caplog.at_level(logging.WARNING, "fastprompt"):
        items = task.encode([twice, right, absent, wrong, unknown, NONE, NONE._replace(answers=None)])
    assert [item.example for item in items] == [1, 3, 4] and len({item.target for item in items}) == 1
    assert "2 of 7 questions have an answer that does not stand where it says" in caplog.text
    assert Question(0, "", "w1 a", [Answer("a", -1)]).exact_answers == []  # which is not the context's end


@pytest.mark.parametrize(
    ("context", "answer", "place"),
    [
        ("I do not know; no one does.", "no", 15),
        ("I do not know.", "no", None),
        ("In 1921, at age 21.", "21", 16),
        ("我的朋友在这里", "朋友", 2),  # no spaces between words
        ("aa b aa", "aa", None),
        ("old mill", "Mill", None),
    ],
)
def test_where_an_answer_may_have_been_meant(context, answer, place):
    found, was_found = placed(Question(0, "", context, [Answer(answer, 1)]))
    assert (found.answers if found else None) == ([Answer(answer, place)] if place is not None else None)
    assert was_found == (place is not None)


def test_alignment(spans):
    task, _ = spans(prefix_text="w42 ")
    pairs, chosen = translations(12), [7, 3, 11, 0, 5, 2, 9]
    inputs = task.align(pairs, chosen, random.Random(3))
    read = task.spans.tokenizer.decode
    languages = set()
    for each in inputs:
        for begin, end, pair in each.parts:
            assert read(each.item.ids[begin:end]) in pairs[pair][:2]
            languages.add(read(each.item.ids[begin:end]) == pairs[pair].source)
        assert read(each.item.ids[1]) == "w42" and each.parts[0][1] <= each.item.second <= each.parts[1][0]
    found = [[pair for *_, pair in each.parts] for each in inputs]
    assert [each[1:] for each in found] == [[7, 3, 11, 0, 5], [2, 9]] and languages == {True, False}
    assert all(each[0] in each[1:] for each in found)
    with pytest.raises(ValueError, match="alignment form must be 'sentence' where the answer is written, got 'task'"):
        made(build("llama", "AutoModelForCausalLM")).align(pairs, chosen, random.Random(3))


def test_words_loss_and_gradients_are_those_of_transformers():
    backbone, tokenizer = build("llama", "AutoModelForCausalLM"), word_tokenizer()
    task = made(backbone, tokenizer, prefix_text="w40 ")
    misplaced = QUESTIONS[0]._replace(answers=[Answer("yes", -1)])
    items = task.encode([*QUESTIONS, misplaced, NONE, NONE._replace(answers=None)])
    counts = [task.count(item) for item in items]
    assert counts == [3, 2, 2] and [item.example for item in items] == [0, 1, 2]  # words of the answer, and the end
    assert tokenizer.decode(items[1].ids).split()[:5] == ["<s>", "w40", "w9", "w10", "w11"]
    expected, gradient = stock_loss(backbone, items, counts)
    backbone.requires_grad_(False)
    segments = StockModel(backbone)(items)
    segments.hidden.requires_grad_(True)
    loss = task.loss(segments, items)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-9, atol=1e-9)
    (found,) = torch.autograd.grad(loss, segments.hidden)
    torch.testing.assert_close(found[: len(gradient)], gradient, rtol=1e-9, atol=1e-12)


def test_an_answer_is_empty_only_where_it_may_be():
    """The end is the likeliest from the beginning, and w7 the likeliest word."""
    backbone, tokenizer = build("llama", "AutoModelForCausalLM"), word_tokenizer()
    likely = torch.zeros(backbone.config.vocab_size)
    likely[tokenizer.eos_token_id], likely[tokenizer.convert_tokens_to_ids("w7")] = 2e3, 1e3
    backbone.get_output_embeddings().register_forward_hook(lambda module, args, logits: logits + likely)
    examples = [*QUESTIONS, NONE]
    for unanswerable, text in ((False, "w7"), (True, "")):
        task, told = made(backbone, tokenizer, unanswerable=unanswerable), []
        assert task.own_pass  # of a head that is hooked
        assert task.predict(StockModel(backbone), examples, 2, told.append) == [{"prediction": text}] * 3
        assert told == [2, 1] and [item.example for item in task.encode(examples)] == [0, 1, 2][: 2 + unanswerable]
    assert task.encode([NONE])[0].target == 1  # the end alone


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_words_are_those_of_generate(family):
    seq2seq = family == "t5"
    backbone = build_seq2seq("t5", num_decoder_layers=3) if seq2seq else build("llama", "AutoModelForCausalLM")
    tokenizer, expected = word_tokenizer(), []
    task, model = made(backbone, tokenizer, max_new_tokens=4), StockModel(backbone)
    for question in QUESTIONS:
        text = f"{question.context}\nQuestion: {question.question}\nAnswer:"
        text = f"question: {question.question} context: {question.context}" if seq2seq else text
        ids = torch.tensor([tokenizer(text)["input_ids"][: None if seq2seq else -1]])
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1, "eos_token_id": 2}
        options |= {} if seq2seq else {"min_new_tokens": 1}
        written = backbone.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0]
        text = tokenizer.decode(written if seq2seq else written[ids.shape[1] :], skip_special_tokens=True)
        expected.append({"prediction": text})
    assert task.predict(model, QUESTIONS) == expected and any(each["prediction"] for each in expected)
    if seq2seq:
        items = task.encode([*QUESTIONS, NONE])
        assert task.own_pass and [task.count(item) for item in items] == [4, 3]
        losses = [
            backbone(input_ids=torch.tensor([item.ids]), labels=torch.tensor([item.target])).loss * len(item.target)
            for item in items
        ]
        torch.testing.assert_close(task.loss_alone(model, items), sum(losses), rtol=1e-9, atol=1e-9)


def test_a_long_context_leaves_room():
    backbone, tokenizer = build("llama", "AutoModelForCausalLM"), word_tokenizer()
    task = made(backbone, tokenizer, max_length=12, max_new_tokens=3)
    long = ask(2, "w1", " ".join(f"w{n}" for n in range(2, 40)), "w2")
    (item,) = task.encode([long])
    read = tokenizer.decode(item.ids).replace("<unk> ", "").split()
    assert len(item.ids) == 12 and item.cut and read[:2] == ["<s>", "w2"] and read[-3:] == ["w1", "w2", "</s>"]
    asked, cut = task.words._asked(long._replace(question=long.context), 3)
    assert len(asked) == 9 and cut and asked[-2:] == task.words.writer.ids("\nAnswer:")  # of a long question, too
    assert task.encode([ask(3, "w1", long.context, long.context)]) == []  # the answer leaves no room
    with pytest.raises(ValueError, match="max_new_tokens must be below max_length, 12"):
        made(backbone, tokenizer, max_length=12)


def test_learns_to_mark_and_to_write_the_answers():
    examples = [*QUESTIONS, NONE]
    for family, auto in (("bert", "AutoModel"), ("llama", "AutoModelForCausalLM")):
        backbone = build(family, auto, torch.float32)
        task, model = made(backbone, max_new_tokens=4, examples=examples).float(), StockModel(backbone)
        items = task.encode(examples)
        optimizer = torch.optim.Adam([*backbone.parameters(), *task.parameters()], 2e-3)
        for _ in range(60):
            optimizer.zero_grad()
            task.loss(model(items), items).backward()
            optimizer.step()
        with torch.no_grad():
            predictions = task.predict(model, examples)
        assert [each["prediction"] for each in predictions] == ["w5 w6", "w9", ""]
        scores = task.scores(examples, predictions)
        assert scores.keys() == {"exact_match", "f1", "HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1"}
        assert set(scores.values()) == {100.0}


@pytest.mark.parametrize(
    "answers",
    [
        {"answers": {"text": ["b", "c"], "answer_start": [2, 4]}},
        {"answers": {"text": np.array(["b", "c"]), "answer_start": np.array([2, 4])}},
        {"answers": [{"text": "b", "answer_start": 2}, {"text": "c", "answer_start": "4"}]},
        {"answers": [{"text": "b", "answer_start": 2.0}, {"text": "c", "answer_start": np.int64(4), "more": 1}]},
    ],
)
def test_forms_of_answers(answers):
    row = {"question": "a?", "context": "a b c"} | answers
    assert Qa().example(row, "x", 0).answers == [Answer("b", 2), Answer("c", 4)]


def test_examples():
    read, row = Qa().example, {"question": "a?", "context": "a b", "id": ("any", 1)}
    assert read(row, "x", 3, labelled=False) == Question(("any", 1), "a?", "a b", None)
    assert read(row | {"id": None, "answer": "", "answers": None}, "x", 3, labelled=False).answers is None
    assert read(row | {"id": "", "answer": ""}, "x", 3) == Question(3, "a?", "a b", [])
    for answers in ([], {"text": [], "answer_start": []}, {"text": [""], "answer_start": [0]}):
        assert read(row | {"answers": answers}, "x", 3).answers == []
    for answers in ({"text": "b"}, {"text": ["b"]}, [{"text": "b"}], {"text": ["b"], "answer_start": []}):
        assert read(row | {"answers": answers}, "x", 3).answers == [Answer("b", -1)]
    assert read(row | {"answers": {"text": "b", "answer_start": 2}}, "x", 3).answers == [Answer("b", 2)]
    for start, place in ((2, 2), ("2", 2), (None, -1), (float("nan"), -1)):
        assert read(row | {"answer": "b", "answer_start": start}, "x", 3).answers == [Answer("b", place)]
    for more, error in (
        ({"context": None}, "x, row 3, context: must be a text, got None"),
        ({}, "x, row 3, answers: must be text and answer_start, or in columns answer and answer_start, got none"),
        ({"answers": "b"}, "x, row 3, answers: must be text and answer_start, or a list of such answers, got 'b'"),
        ({"answers": ["b"]}, "x, row 3, answers: must be text and answer_start, got 'b'"),
        ({"answers": {"text": ["b"], "answer_start": [1, 2]}}, r"as many answer_start as text, got \[1, 2\] and 1"),
        ({"answers": {"text": [None], "answer_start": [1]}}, "answers: must be text and answer_start, got {'text': N"),
        ({"answer": "b", "answer_start": "two"}, "must have an integer as answer_start, got 'two'"),
        ({"answer": "b", "answer_start": True}, "must have an integer as answer_start, got True"),
    ):
        with pytest.raises(ValueError, match=error):
            read(row | more, "x, row 3", 3)


def test_settings_and_scores():
    task = Qa("mlqa", "words", True, 5, name="mlqa")
    again = Qa(**json.loads(json.dumps(task.settings())), name=task.name)
    assert again.settings() == task.settings() and again.name == "mlqa" and Qa().name == "qa"
    for settings, error in (
        ({"metrics": "bleu"}, "metrics must be one of squad, xquad, mlqa, got 'bleu'"),
        ({"answers": "both"}, "answers must be one of auto, spans, words, got 'both'"),
        ({"unanswerable": "no"}, "unanswerable must be true or false, got 'no'"),
        ({"max_new_tokens": True}, "max_new_tokens must be a positive integer, got True"),
    ):
        with pytest.raises(ValueError, match=error):
            Qa(**settings)
    with pytest.raises(ValueError, match="answers 'words' needs a causal language model .*, got BertModel"):
        made(build("bert"), answers="words")
    with pytest.raises(ValueError, match="answers 'spans' needs an encoder or a decoder, got T5"):
        made(build_seq2seq("t5"), answers="spans")
    assert made(build("llama")).spans is not None  # without its head it does not write
    german = [ask([1], "", "der Hof", "der Hof")]
    for metrics, exact_match, f1 in (("xquad", 0, 200 / 3), ("mlqa", 100, 100)):
        scores = Qa(metrics).scores(german, [{"prediction": "Hof"}], "de")
        assert scores == {"exact_match": exact_match, "f1": pytest.approx(f1)}
    assert Qa().scores([*german, NONE], [{"prediction": "der Hof"}] * 2)["NoAns_f1"] == 0
