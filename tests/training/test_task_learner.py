"""One step of a task: inputs, losses, gradients, predictions, and the alignment beside it."""

import random

import pytest
import torch
import transformers
from helpers import WORDS, build, paraphrases, questions, save_backbone, translations

from fastprompt.tasks.squad import Answer, Question
from fastprompt.training.encoding import Digest, batch_of, load_backbone, teacher_vectors, tokenize
from fastprompt.training.task_config import TaskConfig
from fastprompt.training.task_learner import TaskLearner
from fastprompt.training.task_loop import sentence
from fastprompt.training.tasks import Aligned, Item, Verbaliser, inputs_of, joined, run_sorted

SMALL = dict(num_virtual_tokens=3, max_length=40, stride=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(family: str):
        if family not in made:
            auto = "AutoModelForCausalLM" if family == "llama" else "AutoModel"
            made[family] = save_backbone(family, tmp_path_factory.mktemp(family), auto)
        return str(made[family])

    return folder


@pytest.fixture
def learner(folders, monkeypatch):
    monkeypatch.setattr(Verbaliser, "WORDS", ("w1", "w2"))

    def make(family: str = "bert", causal_head: bool = True, **settings) -> TaskLearner:
        torch.manual_seed(0)
        loaded = load_backbone(folders(family), causal_head=causal_head)
        return TaskLearner(*loaded, TaskConfig(**(SMALL | settings)))

    return make


def sentences(learner, pairs):
    """The alignment's inputs, sentence by sentence, and teacher's vectors."""
    tokenizer = learner.task.tokenizer
    source, target = (tokenize(tokenizer, [pair[side] for pair in pairs], "", 40) for side in (0, 1))
    aligned = [Aligned(Item(ids, len(ids), None), [(0, len(ids), n)]) for n, ids in enumerate(target)]
    return aligned, torch.stack([torch.randn(48) for _ in source])


@pytest.mark.parametrize("task", ["pawsx", "xquad"])
@pytest.mark.parametrize("form", ["sentence", "task"])
def test_both_losses_of_one_pass_are_those_of_two(learner, task, form):
    made = learner(task=task, alignment=1.0, alignment_form=form)
    torch.manual_seed(1)
    for parameter in made.task.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    items = made.task.encode(paraphrases(5) if task == "pawsx" else questions(4))
    pairs = translations(7)
    aligned, teacher = sentences(made, pairs)
    if form == "task":
        aligned = made.task.align(pairs, range(7), random.Random(0))
    both = made.loss(items, aligned, teacher)
    alone = made.loss(items) | made.loss([], aligned, teacher)
    assert both.keys() == alone.keys() == {"task", "alignment"}
    for name, loss in both.items():
        torch.testing.assert_close(loss, alone[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "method"), [("bert", "prefix"), ("llama", "prefix"), ("llama", "lora")])
def test_alignment_of_a_middle_layer(learner, folders, tmp_path, family, method):
    """Against stock hidden states, one sentence at a time, in plain torch."""
    made = learner(family, alignment=1.0, alignment_layer=1, method=method, distance="mse")
    model, tokenizer = load_backbone(folders(family))
    source, target = (tokenize(tokenizer, [pair[side] for pair in translations(6)], "", 40) for side in (0, 1))
    target[3] = target[3][:1]  # nothing but the first row

    def vector(ids):
        rows = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0]
        return rows[len(ids) > 1 :].mean(0)

    with torch.no_grad():
        stock = torch.stack([vector(ids) for ids in source])
    mean, deviation = stock.mean(0), stock.var(0, correction=0).sqrt()
    teacher = teacher_vectors(Digest(model), source, "mean", "cpu", tmp_path, layer=1)
    torch.testing.assert_close(teacher, stock, rtol=1e-4, atol=1e-5)
    teacher = made.standardized(teacher)
    torch.testing.assert_close(teacher, (stock - mean) / deviation, rtol=1e-3, atol=1e-3)

    aligned = [sentence(ids, n, made.config) for n, ids in enumerate(target)]
    for items in ([], made.task.encode(paraphrases(3))):
        loss = made.loss(items, aligned, teacher)["alignment"]
        made.zero_grad()
        loss.backward()
        prompted = made.adapted.prompted
        model = made.adapted.backbone if prompted is None else prompted
        student = (torch.stack([vector(ids) for ids in target]) - mean) / deviation
        student, unit = (torch.nn.functional.normalize(each, dim=-1) for each in (student, teacher))
        torch.testing.assert_close(loss, (student - unit).square().mean(), rtol=1e-3, atol=1e-5)
        reached = [n for n, p in made.adapted.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
        assert reached and not any("layers.1." in name or "layer.1." in name for name in reached)
        if prompted is not None:
            grad = prompted.prompt.weight.grad.view(3, -1, 2, 48)  # (P, layers, key and value, features)
            assert grad[:, 0].abs().sum() > 0 and grad[:, 1:].abs().sum() == 0


def test_a_feature_that_never_changes_is_left_as_it_is(learner):
    made = learner(alignment=1.0, alignment_layer=1)
    assert made.standardized(torch.tensor([[1.0, 5.0], [3.0, 5.0]])).tolist() == [[-1.0, 0.0], [1.0, 0.0]]


def test_the_task_loss_is_that_of_plain_torch(learner):
    made = learner(task="pawsx", method="head", pooling="first")
    torch.nn.init.normal_(made.task.head.weight)
    examples = paraphrases(5)
    items = made.task.encode(examples)
    losses = []
    for item in items:
        kinds = torch.tensor([[0] * item.second + [1] * (len(item.ids) - item.second)])
        hidden = made.adapted.backbone(input_ids=torch.tensor([item.ids]), token_type_ids=kinds).last_hidden_state
        losses.append(torch.nn.functional.cross_entropy(made.task.head(hidden[:, 0]), torch.tensor([item.target])))
    torch.testing.assert_close(made.loss(items)["task"], torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


def test_gradients_reach_what_they_should(learner):
    made = learner(task="pawsx", alignment=1.0, norms=True)
    torch.nn.init.normal_(made.task.head.weight)
    aligned, teacher = sentences(made, translations(5))
    items = made.task.encode(paraphrases(4))

    def reached(loss):
        made.zero_grad()
        loss.backward()
        return {name for name, p in made.trained().items() if p.grad is not None and p.grad.abs().sum() > 0}

    alignment = reached(made.loss(items, aligned, teacher)["alignment"])
    task = reached(made.loss(items, aligned, teacher)["task"])
    assert {name for name in alignment if "adapted" not in name} == {"alignment.weight"}
    assert {name for name in task if "adapted" not in name} == {"task.head.weight", "task.head.bias"}
    assert {n for n in alignment if "adapted" in n} == {n for n in task if "adapted" in n}
    assert "adapted.prompted.prompt.weight" in task and len(task) > 4
    groups = {group["lr"]: len(group["params"]) for group in made.groups()}
    assert groups == {1e-2: 1, 1e-3: 2, 1e-4: 1} or len(made.groups()) == 4


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_token_types(learner, family):
    """Only of backbones that have two of them."""
    made = learner(family, method="head")
    items = made.task.encode(paraphrases(3))
    seen = []

    def model(**inputs):
        seen.append(inputs)
        return made.adapted(**inputs)

    model.backbone = made.adapted.backbone
    (hidden, *_) = run_sorted(model, items, lambda hidden, mask, batch: hidden, 8, "cpu")
    assert ("token_type_ids" in seen[0]) == (family == "bert")
    if family == "bert":
        inputs = inputs_of(items, "cpu", made.adapted)
        expected = made.adapted.backbone(**inputs).last_hidden_state[0]
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)
        inputs.pop("token_type_ids")
        assert (made.adapted.backbone(**inputs).last_hidden_state[0] - expected).abs().max() > 0.01
        kinds = made.task.tokenizer(paraphrases(3)[0][1], paraphrases(3)[0][2], return_token_type_ids=True)
        assert inputs_of(items, "cpu", made.adapted)["token_type_ids"][0].tolist() == kinds["token_type_ids"]


def test_parts_are_the_rows_of_their_sentences(learner):
    tokenizer = learner(alignment=1.0).task.tokenizer
    texts = [[("w1 w2", 4)], [("w3", 7), ("w4 w5 w6", 2), ("w7 w8", 9)]]

    def read(made: Aligned) -> dict[int, str]:
        return {pair: tokenizer.decode(made.item.ids[begin:end]) for begin, end, pair in made.parts}

    whole = joined(tokenizer, texts, "w40 ", 40)
    assert read(whole) == {4: "w1 w2", 7: "w3", 2: "w4 w5 w6", 9: "w7 w8"}
    assert tokenizer.decode(whole.item.ids) == "<s> w40 w1 w2 </s> w3 w4 w5 w6 w7 w8 </s>"
    assert whole.item.ids[whole.item.second] == tokenizer.convert_tokens_to_ids("w3")
    cut = joined(tokenizer, texts, "", 10)  # of a sentence that is cut what is left stays, of the last one nothing
    assert len(cut.item.ids) == 10 and read(cut) == {4: "w1 w2", 7: "w3", 2: "w4 w5 w6", 9: "w7"}
    assert read(joined(tokenizer, texts, "", 9)) == {4: "w1 w2", 7: "w3", 2: "w4 w5 w6"}


@pytest.mark.parametrize("task", ["pawsx", "xquad"])
def test_alignment_in_the_form_of_the_task(learner, task):
    made = learner(task=task, alignment=1.0, alignment_form="task", prefix_text="w42 ")
    pairs, chosen = translations(12), [7, 3, 11, 0, 5, 2, 9]
    inputs = made.task.align(pairs, chosen, random.Random(3))
    read = made.task.tokenizer.decode
    languages = set()
    for each in inputs:
        for begin, end, pair in each.parts:
            text = read(each.item.ids[begin:end])
            assert text in pairs[pair][:2]
            languages.add(text == pairs[pair].source)
        assert read(each.item.ids[1]) == "w42"
    found = [[pair for *_, pair in each.parts] for each in inputs]
    if task == "pawsx":
        assert found == [[7, 3], [11, 0], [5, 2]]
    else:
        assert [each[1:] for each in found] == [[7, 3, 11, 0, 5], [2, 9]]
        assert all(each[0] in each[1:] for each in found)
        assert all(each.parts[0][1] <= each.item.second <= each.parts[1][0] for each in inputs)
    assert languages == {True, False}
    assert made.task.align(pairs, chosen, random.Random(3)) == inputs


def test_parts_get_the_vectors_of_their_pairs(learner):
    made = learner(alignment=1.0, alignment_form="task", distance="cosine", method="head")
    pairs = translations(4)
    aligned = made.task.align(pairs, range(4), random.Random(0))
    hidden = [made.adapted(**batch_of([each.item.ids], "cpu"), token_type_ids=types(each.item))[0] for each in aligned]
    teacher = torch.zeros(4, 48)
    for rows, each in zip(hidden, aligned, strict=True):
        for begin, end, pair in each.parts:
            teacher[pair] = rows[begin:end].mean(0).detach()
    assert made.loss([], aligned, teacher)["alignment"] < 1e-5  # the projection begins as the identity
    assert made.loss([], aligned, teacher.roll(1, 0))["alignment"] > 1e-3


def types(item: Item) -> torch.Tensor:
    return (torch.arange(len(item.ids)) >= item.second).long()[None]


def test_answers_are_likeness_to_the_question(learner):
    """The formula of SpanAnswers with plain loops."""
    made = learner(task="xquad", method="head")
    torch.nn.init.normal_(made.task.head.weight)
    torch.nn.init.normal_(made.task.match, std=0.3)
    items = made.task.encode(questions(3))
    hidden = torch.randn(len(items), max(len(item.ids) for item in items) + 2, 48)
    logits = made.task.logits(hidden, items)
    for rows, item, got in zip(hidden, items, logits, strict=True):
        asked = rows[1 : item.second].mean(0)
        last = item.second + len(item.target.spans)
        assert got[: item.second].isneginf().all() and got[last:].isneginf().all()
        for n in range(item.second, last):
            for side in (0, 1):
                likeness = torch.cosine_similarity(rows[n], made.task.match[side] @ asked, dim=0)
                expected = made.task.head(rows[n])[side] + 10 * likeness
                torch.testing.assert_close(got[n, side], expected, rtol=1e-4, atol=1e-4)


def test_predictions_do_not_depend_on_batches(learner):
    for task, examples in (("pawsx", paraphrases(9)), ("xquad", questions(7))):
        made = learner(task=task)
        for parameter in made.task.parameters():
            torch.nn.init.normal_(parameter)
        predictions = [made.task.predict(made.adapted, examples, batch_size=size) for size in (1, 4, 64)]
        assert predictions[0] == predictions[1] == predictions[2]
        assert list(predictions[0]) == [example.id for example in examples]
        assert task == "pawsx" or len(set(predictions[0].values())) > 1


def test_a_question_without_context(learner):
    made = learner(task="xquad")
    examples = [*questions(2), Question("none", "w1", "", [Answer("w2", 0)])]
    predictions = made.predict(examples)
    assert set(predictions) == {"q0", "q1"} and len(made.task.encode(examples)) == 2
    assert made.task.scores(examples, predictions, "en")["f1"] <= 200 / 3


def test_verbaliser_reads_the_model_s_own_logits(learner, folders):
    made = learner("llama", method="head", max_length=60)
    stock = load_backbone(folders("llama"), causal_head=True)[0]
    examples = paraphrases(4)
    items = made.task.encode(examples)
    words = made.task.tokenizer.convert_tokens_to_ids(["w1", "w2"])
    inputs = inputs_of(items, "cpu", made.adapted)
    logits = made.task.logits(made.adapted(**inputs), inputs["attention_mask"], items)
    losses = []
    for item, example, got in zip(items, examples, logits, strict=True):
        text = made.task.tokenizer.decode(item.ids).split()
        assert [word for word in text if word in WORDS] == f"{example.sentence1} {example.sentence2}".split()
        expected = stock(input_ids=torch.tensor([item.ids])).logits[0, -1, words]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        losses.append(torch.nn.functional.cross_entropy(expected[None], torch.tensor([example.label])))
    torch.testing.assert_close(made.loss(items)["task"], torch.stack(losses).mean(), rtol=1e-4, atol=1e-4)
    assert not made.trained()
    with pytest.raises(ValueError, match="nothing trains with method 'head' and train_head True"):
        made.groups()
    with pytest.raises(ValueError, match="max_length must hold each input whole: p0 has"):
        learner("llama", max_length=10).task.encode(examples)


def test_verbaliser_needs_two_words(folders):
    model, tokenizer = load_backbone(folders("llama"), causal_head=True)
    with pytest.raises(ValueError, match=r"tokenizer must tell the words \(' No', ' Yes'\) apart .*'<unk>'"):
        TaskLearner(model, tokenizer, TaskConfig(**SMALL))


def test_retrieval(learner, folders, tmp_path):
    made = learner(task="retrieval", alignment=1.0, method="head", causal_head=False)
    pairs = translations(6)
    model, tokenizer = load_backbone(folders("bert"))
    english = tokenize(tokenizer, [pair.source for pair in pairs], "", 40)
    made.task.english = teacher_vectors(Digest(model), english, "mean", "cpu", tmp_path)
    same = [pair._replace(target=pair.source) for pair in pairs]
    scores = made.task.scores(same, made.predict(same), "cy")
    assert scores["r@1"] == 1.0 and scores["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert set(made.trained()) == {"alignment.weight"}
    made.alignment.weight.data.neg_()
    assert made.task.scores(same, made.predict(same), "cy")["cosine"] == pytest.approx(-1.0, abs=1e-5)


def test_save_and_load(learner, tmp_path):
    made = learner(task="xquad", alignment=0.5, norms=True)
    for parameter in made.trained().values():
        torch.nn.init.normal_(parameter, std=0.3)
    made.save(tmp_path)
    again = learner(task="xquad", alignment=0.5, norms=True)
    again.load(tmp_path)
    assert again.predict(questions(3)) == made.predict(questions(3))
    for name, parameter in again.trained().items():
        assert torch.equal(parameter, made.trained()[name]), name
    with pytest.raises(ValueError, match="does not fit the backbone and configuration"):
        learner(task="xquad", alignment=0.5).load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"adapter .*none holds no trained\.safetensors"):
        again.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("bert", {"max_length": 62}, "max_length must be at most 61, what the position table has room for, got 62"),
        ("bert", {"num_layers": 4}, r"num_layers must be in \[1, 3\], the backbone's, got 4"),
        ("bert", {"train_head": False}, "train_head must be True for pawsx with an encoder"),
        ("bert", {"layers": [3]}, "layers must be indices of the backbone's 3 layers, got 3"),
        (
            "llama",
            {"alignment": 1.0, "alignment_form": "task"},
            "alignment_form must be 'sentence' for Verbaliser, got 'task'",
        ),
        (
            "bert",
            {"task": "retrieval", "alignment": 1.0, "alignment_layer": 1},
            "alignment_layer must be None for retrieval, got 1",
        ),
        ("bert", {"alignment_layer": 4}, "alignment_layer must be at most 3, the backbone's layers, got 4"),
        ("bert", {"alignment_layer": 0}, "alignment_layer must be an integer, 1 or more, got 0"),
        (
            "bert",
            {"task": "retrieval", "alignment": 1.0, "alignment_form": "task"},
            "alignment_form must be 'sentence' for Retrieval, got 'task'",
        ),
    ],
)
def test_settings_that_do_not_fit(learner, family, settings, message):
    with pytest.raises(ValueError, match=message):
        learner(family, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "squad"}, r"task must be one of \('xquad', 'mlqa', 'pawsx', 'retrieval'\), got 'squad'"),
        ({"method": "peft"}, "method must be one of .* got 'peft'"),
        ({"steps": 0}, "steps must be an integer, 1 or more, got 0"),
        ({"batch_size": True}, "batch_size must be an integer, got True"),
        ({"examples": 0}, "examples must be an integer, 1 or more, got 0"),
        ({"lr": "1e-2"}, "lr must be a number, got '1e-2'"),
        ({"temperature": "5e-2"}, "temperature must be a number, got '5e-2'"),
        ({"temperature": 0.0}, "temperature must be at least 1e-06 and finite, got 0.0"),
        (
            {"method": "lora", "adapter_size": 4},
            "adapter_size is for methods 'prompt' and 'prefix', got it with 'lora'",
        ),
        ({"task": "retrieval"}, "alignment must be above 0 for retrieval, got 0.0"),
        ({"alignment_first": 3}, "alignment_first needs an alignment above 0, got 3 and 0"),
        ({"alignment_form": "task", "alignment_batch_size": 1}, "alignment_batch_size must be 2 or more for pawsx"),
        ({"method": "prompt", "layers": [0]}, "layers is for kind 'prefix'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TaskConfig(**settings)


def test_a_bare_model_is_taken_as_it_comes(folders):
    """Not only what load_backbone gives: any model of a family, with a pooler."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders("bert"))
    made = TaskLearner(build("bert", dtype=torch.float32), tokenizer, TaskConfig(**SMALL, method="full"))
    loss = made.loss(made.task.encode(paraphrases(2)))["task"]
    loss.backward()
    assert loss.item() == pytest.approx(0.6931, abs=1e-3)


def test_a_prompt_begins_as_a_text(learner):
    made = learner(method="prompt", init_text="w1 w2")
    words = made.adapted.backbone.get_input_embeddings().weight[[5 + 1, 5 + 2, 5 + 1]]  # after five special tokens
    torch.testing.assert_close(made.adapted.prompted.prompt.weight, words)
    begun = [learner(method="prefix", init_text=text).adapted.prompted.prompt.weight for text in ("w1", "w1", "w2")]
    assert torch.equal(begun[0], begun[1]) and not torch.equal(begun[0], begun[2])
    with pytest.raises(ValueError, match="init_text must have at least one token, got none in ' '"):
        learner(method="prefix", init_text=" ")
