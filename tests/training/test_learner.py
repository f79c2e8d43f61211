"""Learner: what one pass gives, against plain torch, and where gradients go."""

import random

import pytest
import torch
import transformers
from helpers import build, paraphrases, save_backbone, translations
from simple_task import Classes

from fastprompt.models.load import load_backbone
from fastprompt.models.methods import AdapterConfig
from fastprompt.tasks.base import Aligned, InputConfig, Item, joined
from fastprompt.training import AlignmentConfig, Learner
from fastprompt.training.teacher import Digest, teacher_vectors

INPUTS = InputConfig(max_length=40)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(family: str) -> str:
        if family not in made:
            made[family] = save_backbone(family, tmp_path_factory.mktemp(family))
        return str(made[family])

    return folder


@pytest.fixture
def learner(folders):
    def make(family="bert", task=True, alignment=None, inputs=INPUTS, **adapter) -> Learner:
        torch.manual_seed(0)
        task = Classes(["0", "1"]) if task else None
        adapter = AdapterConfig(**{"num_virtual_tokens": 3} | adapter)
        return Learner(*load_backbone(folders(family), "cpu"), adapter, inputs, task, alignment)

    return make


def aligned(made: Learner, pairs, task=False) -> list[Aligned]:
    """The alignment's inputs, sentence by sentence or in the task's form."""
    if task:
        return made.task.align(pairs, range(len(pairs)), random.Random(0))
    return [Aligned(Item(ids, len(ids)), [(0, len(ids), n)])
            for n, ids in enumerate(made.tokenize([pair.target for pair in pairs]))]  # fmt: skip


def losses(made: Learner, items=(), inputs=(), teacher=None, **more) -> dict:
    numbers = [pair for each in inputs for *_, pair in each.parts]
    teacher = teacher[numbers] if inputs else None
    return made(made.collate(items, inputs, teacher=teacher, share=1 / max(len(items), 1), **more))


def gradients(made: Learner, loss) -> dict:
    found = torch.autograd.grad(loss, [*made.trained().values()], allow_unused=True, materialize_grads=True)
    return dict(zip(made.trained(), found, strict=True))


@pytest.mark.parametrize("form", ["sentence", "task"])
@pytest.mark.parametrize("method", ["prefix", "prompt", "lora"])
def test_both_losses_of_one_pass_are_those_of_two(learner, form, method):
    made = learner(alignment=AlignmentConfig(form=form), method=method).double()
    items, pairs = made.task.encode(paraphrases(5)), translations(7)
    inputs, teacher = aligned(made, pairs, form == "task"), torch.randn(7, 48, dtype=torch.float64)
    both = losses(made, items, inputs, teacher, weight=0.3)
    task, alone = losses(made, items), losses(made, (), inputs, teacher, weight=0.3)
    assert set(both) == {"loss", "task", "alignment"} and set(task) == {"loss", "task"}
    assert set(alone) == {"loss", "alignment"}
    for name in ("task", "alignment"):
        torch.testing.assert_close(both[name], (task | alone)[name] if name == "task" else alone[name])
    torch.testing.assert_close(both["loss"], task["loss"] + alone["loss"])
    torch.testing.assert_close(both["loss"], both["task"] + 0.3 * both["alignment"])
    want = [gradients(made, each["loss"]) for each in (task, alone)]
    for name, found in gradients(made, both["loss"]).items():
        torch.testing.assert_close(found, want[0][name] + want[1][name], msg=name)


@pytest.mark.parametrize(("family", "method"), [("bert", "prefix"), ("llama", "prefix"), ("llama", "lora")])
def test_alignment_of_a_middle_layer(learner, folders, tmp_path, family, method):
    """Against stock hidden states, one sentence at a time, in plain torch."""
    made = learner(family, alignment=AlignmentConfig(layer=1, distance="mse"), method=method)
    model, _ = load_backbone(folders(family), "cpu")
    source, target = (made.tokenize([pair[side] for pair in translations(6)]) for side in (0, 1))
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

    inputs = [Aligned(Item(ids, len(ids)), [(int(len(ids) > 1), len(ids), n)]) for n, ids in enumerate(target)]
    for items in ([], made.task.encode(paraphrases(3))):
        loss = losses(made, items, inputs, teacher)["alignment"]
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
    made = learner(alignment=AlignmentConfig(layer=1))
    assert made.standardized(torch.tensor([[1.0, 5.0], [3.0, 5.0]])).tolist() == [[-1.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_the_task_loss_is_that_of_plain_torch(learner, pooling):
    """Token types and all, whatever stands behind the task's inputs in the row."""
    made = learner(method="head", inputs=InputConfig(max_length=40, pooling=pooling), alignment=AlignmentConfig())
    items, want = made.task.encode(paraphrases(5)), []
    for item in items:
        kinds = torch.tensor([[0] * item.second + [1] * (len(item.ids) - item.second)])
        hidden = made.backbone(input_ids=torch.tensor([item.ids]), token_type_ids=kinds).last_hidden_state[0]
        vector = {"mean": hidden.mean(0), "first": hidden[0], "last": hidden[-1]}[pooling]
        want.append(torch.nn.functional.cross_entropy(made.task.head(vector)[None], torch.tensor([item.target])))
    for inputs in ((), aligned(made, translations(3))):
        found = losses(made, items, inputs, torch.randn(3, 48))["task"]
        torch.testing.assert_close(found, torch.stack(want).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_token_types(learner, family):
    """Only of backbones that have two of them; as the tokenizer has them."""
    made = learner(family, method="head")
    example = paraphrases(3)[0]
    batch = made.collate(made.task.encode(paraphrases(3)))
    assert ("token_type_ids" in batch.inputs) == (family == "bert")
    if family == "bert":
        kinds = made.tokenizer(example.text, example.text_pair, return_token_type_ids=True)["token_type_ids"]
        assert batch.inputs["token_type_ids"][0, : batch.bounds[1]].tolist() == kinds and sum(kinds) > 0


def test_gradients_reach_what_they_should(learner):
    made = learner(alignment=AlignmentConfig(), norms=True)
    both = losses(made, made.task.encode(paraphrases(4)), aligned(made, translations(5)), torch.randn(5, 48))

    def reached(part):
        found = torch.autograd.grad(part, [*made.trained().values()], retain_graph=True, allow_unused=True)
        return {name for name, grad in zip(made.trained(), found, strict=True) if grad is not None and grad.any()}

    alignment, task = reached(both["alignment"]), reached(both["task"])
    assert {name for name in alignment if "adapted" not in name} == {"alignment.weight"}
    assert {name for name in task if "adapted" not in name} == {"task.head.weight", "task.head.bias"}
    assert {n for n in alignment if "adapted" in n} == {n for n in task if "adapted" in n}
    assert "adapted.prompted.prompt.weight" in task and len(task) > 4
    assert not [n for n, p in made.named_parameters() if p.requires_grad and n not in task | alignment]


def test_parts_are_the_rows_of_their_sentences(learner):
    tokenizer = learner().tokenizer
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


def test_parts_get_the_vectors_of_their_pairs(learner):
    made = learner(alignment=AlignmentConfig(form="task", distance="cosine"), method="head")
    inputs, teacher = aligned(made, translations(4), task=True), torch.zeros(4, 48)
    for each in inputs:
        kinds = (torch.arange(len(each.item.ids)) >= each.item.second).long()[None]
        rows = made.backbone(input_ids=torch.tensor([each.item.ids]), token_type_ids=kinds).last_hidden_state[0]
        for begin, end, pair in each.parts:
            teacher[pair] = rows[begin:end].mean(0).detach()
    for items in ((), made.task.encode(paraphrases(3))):
        assert losses(made, items, inputs, teacher)["alignment"] < 1e-5  # the projection begins as the identity
        assert losses(made, items, inputs, teacher.roll(1, 0))["alignment"] > 1e-3


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_vectors_are_those_of_the_sentences_one_by_one(learner, family, caplog):
    """Of translations adapted and projected; of English sentences those of the frozen backbone."""
    inputs = InputConfig(prefix_text="w9 ", max_length=9, pooling="mean")
    made = learner(family, task=False, alignment=AlignmentConfig(), inputs=inputs)
    torch.nn.init.normal_(made.alignment.weight)
    texts = ["w1", "w2 w3 w4 w5", " ".join(["w6"] * 20), "w7 w8"]
    for source in (False, True):
        found = made.vectors(texts, source=source)
        assert found.dtype == torch.float32 and found.device.type == "cpu" and not found.requires_grad
        for text, vector in zip(texts, found, strict=True):
            ids = torch.tensor([made.tokenizer("w9 " + text, truncation=True, max_length=9)["input_ids"]])
            hidden = (made.backbone if source else made.adapted.prompted)(input_ids=ids).last_hidden_state[0].mean(0)
            expected = hidden if source else made.alignment.weight @ hidden
            torch.testing.assert_close(vector, expected.detach(), rtol=1e-4, atol=1e-4)
    assert "1 of 4 sentences have more than max_length 9 tokens, and are cut" in caplog.text
    with pytest.raises(ValueError, match="source must be False for a run that trained weights of the backbone"):
        learner(family, method="lora").vectors(texts, source=True)
    with pytest.raises(ValueError, match="predict needs a task, and this run has none"):
        made.predict(paraphrases(1))


def test_predictions_do_not_depend_on_batches(learner):
    made, told = learner(), []
    torch.nn.init.normal_(made.task.head.weight)
    predictions = [made.predict(paraphrases(9), batch_size, told.append) for batch_size in (1, 4, 64)]
    for found in predictions[1:]:
        assert [each["prediction"] for each in found] == [each["prediction"] for each in predictions[0]]
    assert told == [1] * 9 + [4, 4, 1] + [9]


def test_save_and_load(learner, tmp_path):
    settings = dict(alignment=AlignmentConfig(layer=1), norms=True)
    made, again = learner(**settings), learner(**settings)
    made.standardized(torch.randn(4, 48))
    for parameter in made.trained().values():
        torch.nn.init.normal_(parameter, std=0.3)
    made.save(tmp_path)
    again.load(tmp_path)
    assert again.predict(paraphrases(3)) == made.predict(paraphrases(3)) and torch.equal(again.mean, made.mean)
    assert torch.equal(again.deviation, made.deviation)
    for name, parameter in again.trained().items():
        assert torch.equal(parameter, made.trained()[name]), name
    with pytest.raises(ValueError, match="does not fit the backbone and configuration"):
        learner(alignment=AlignmentConfig(layer=1)).load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none holds no trained\.safetensors"):
        again.load(tmp_path / "none")


def test_a_bare_model_is_taken_as_it_comes(folders):
    """Not only what load_backbone gives: any model of a family, with a pooler."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders("bert"))
    model = build("bert", dtype=torch.float32)
    made = Learner(model, tokenizer, AdapterConfig("full"), INPUTS, Classes(["0", "1"]))
    losses(made, made.task.encode(paraphrases(2)))["loss"].backward()
    assert model.encoder.layer[0].output.dense.weight.grad.any()


def test_a_prompt_begins_as_a_text(learner):
    made = learner(method="prompt", init_text="w1 w2")
    words = made.adapted.backbone.get_input_embeddings().weight[[5 + 1, 5 + 2, 5 + 1]]  # after five special tokens
    torch.testing.assert_close(made.adapted.prompted.prompt.weight, words)
    begun = [learner(init_text=text).adapted.prompted.prompt.weight for text in ("w1", "w1", "w2")]
    assert torch.equal(begun[0], begun[1]) and not torch.equal(begun[0], begun[2])


def test_first_layers_only(learner):
    made = learner(num_layers=2)
    assert len(made.adapted.layers) == 2 and made.adapted.prompted.prompt.layers == [0, 1]
    assert made.backbone.config.num_hidden_layers == 2


def test_it_stays_in_evaluation_mode(folders):
    """Dropout of the backbone would only blur a few examples; gradient checkpointing asks the layers themselves."""
    model = build("bert", dtype=torch.float32, hidden_dropout_prob=0.5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders("bert"))
    made = Learner(model, tokenizer, AdapterConfig(), INPUTS, Classes(["0", "1"])).train()
    items = made.task.encode(paraphrases(3))
    assert torch.equal(losses(made, items)["loss"], losses(made, items)["loss"]) and not made.training
    made.activation_checkpointing_enable()
    assert all(layer.training for layer in made.train().adapted.layers) and not made.backbone.embeddings.training
    assert not any(layer.training for layer in made.eval().adapted.layers)
