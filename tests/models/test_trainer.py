"""transformers' Trainer over a PromptModel or a fused PeftModel: the loss it trains on, and the one it evaluates."""

import peft
import pytest
import torch
import transformers
from helpers import VOCABULARY, build
from torch.nn.functional import cross_entropy

import fastprompt
from fastprompt import PromptConfig, PromptModel

P, SMOOTHING, LENGTHS = 3, 0.1, (6, 4, 5, 6)
TASKS = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
}


def model_of(family: str, auto: str, maker: str):
    backbone, kind = build(family, auto, torch.float32), maker.removeprefix("fused ")
    if kind == maker:
        return PromptModel(backbone, PromptConfig(kind, P, init_scale=1.0))
    config = peft.PrefixTuningConfig if kind == "prefix" else peft.PromptTuningConfig
    return fastprompt.fuse(peft.get_peft_model(backbone, config(task_type=TASKS[auto], num_virtual_tokens=P)))


def examples(auto: str) -> list[dict]:
    made = []
    for n, length in enumerate(LENGTHS):
        ids = torch.randint(5, VOCABULARY, (length,)).tolist()
        pad = max(LENGTHS) - length
        made.append({"input_ids": ids + [1] * pad, "attention_mask": [1] * length + [0] * pad})
        if auto == "AutoModelForQuestionAnswering":
            made[-1] |= {"start_positions": n % 3, "end_positions": 3}
        elif auto == "AutoModelForSequenceClassification":
            made[-1]["labels"] = n % 2
        else:
            labels = ids if auto == "AutoModelForCausalLM" else [i % 2 for i in ids]
            made[-1]["labels"] = labels + [-100] * pad
    return made


def expected_loss(model, auto: str, data: list[dict], smoothing: float) -> float:
    """Over all that is labelled and predicted from the text, as transformers' LabelSmoother takes it."""
    inputs = {name: torch.tensor([each[name] for each in data]) for name in data[0]}
    labels = inputs.pop("labels", None)
    with torch.no_grad():
        if labels is None:
            return float(model.eval()(**inputs).loss)
        logits = model.eval()(**inputs).logits
    if auto == "AutoModelForCausalLM":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return float(cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=smoothing))


def trainer(model, data, folder, **more) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, **more
    )
    return transformers.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data, data_collator=transformers.default_data_collator
    )


CASES = [
    ("llama", "AutoModelForCausalLM"),
    ("gemma3_text", "AutoModelForCausalLM"),
    ("bert", "AutoModelForSequenceClassification"),
    ("xlm-roberta", "AutoModelForTokenClassification"),
    ("bert", "AutoModelForQuestionAnswering"),
]


@pytest.mark.parametrize("maker", ["prefix", "prompt", "fused prefix", "fused prompt"])
@pytest.mark.parametrize(("family", "auto"), CASES)
def test_with_label_smoothing(family, auto, maker, tmp_path):
    model, data = model_of(family, auto, maker), examples(auto)
    run = trainer(model, data, tmp_path, label_smoothing_factor=SMOOTHING)
    before = expected_loss(model, auto, data, SMOOTHING)
    assert run.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-5)
    assert run.train().training_loss == pytest.approx(before, rel=1e-5)
    after = expected_loss(model, auto, data, SMOOTHING)
    assert after != before and run.evaluate()["eval_loss"] == pytest.approx(after, rel=1e-5)


@pytest.mark.parametrize("maker", ["prefix", "fused prompt"])
@pytest.mark.parametrize(("family", "auto"), [CASES[0], *CASES[2:]])
def test_without_it_in_two_pieces(family, auto, maker, tmp_path):
    """Under gradient accumulation the loss is the whole step's, counted as transformers counts labels."""
    model, data = model_of(family, auto, maker), examples(auto)
    run = trainer(model, data, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    evaluated = run.evaluate()["eval_loss"]
    with torch.no_grad():
        inputs = {name: torch.tensor([each[name] for each in data]) for name in data[0]}
        more = {}
        if auto == "AutoModelForCausalLM":
            more["num_items_in_batch"] = int((inputs["labels"][:, 1:] != -100).sum())
        expected = float(model.eval()(**inputs, **more).loss)
    assert evaluated == pytest.approx(expected, rel=1e-5)
    if auto == "AutoModelForCausalLM":
        assert run.train().training_loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("auto", ["AutoModelForCausalLM", "AutoModelForSequenceClassification"])
def test_a_loss_of_ones_own(auto, tmp_path):
    model, data = model_of("llama", auto, "prefix"), examples(auto)
    run, seen = trainer(model, data, tmp_path), []
    run.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: (
        seen.append((outputs.logits.shape, labels.shape)) or outputs.logits.square().mean()
    )
    run.train()
    assert seen == [((4, 6, VOCABULARY), (4, 6)) if auto == "AutoModelForCausalLM" else ((4, 2), (4,))]


def test_its_name_is_its_own():
    model = model_of("bert", "AutoModelForQuestionAnswering", "prefix")
    assert repr(model).startswith("PromptModelForQuestionAnswering(\n  (backbone): BertForQuestionAnswering(")
    assert isinstance(model, PromptModel)
    assert repr(model_of("llama", "AutoModelForCausalLM", "prompt")).startswith("PromptModel(\n  (backbone): Llama")
