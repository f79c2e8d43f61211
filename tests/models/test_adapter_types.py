"""Every type of adapter that `fuse` takes, against PEFT's own forward: loss, logits, gradients; others are refused."""

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from helpers import batch, build

import fastprompt
from fastprompt import PromptConfig, PromptModel

P = 5
AUTOS = {
    "CAUSAL_LM": ("llama", "AutoModelForCausalLM"),
    "SEQ_CLS": ("bert", "AutoModelForSequenceClassification"),
    "FEATURE_EXTRACTION": ("bert", "AutoModel"),
}
TYPES: dict[str, Callable] = {
    "cartridge": lambda **task: peft.CartridgeConfig(num_frozen_tokens=2, num_virtual_tokens=P, **task),
    "projected prefix": lambda **task: peft.PrefixTuningConfig(
        prefix_projection=True, encoder_hidden_size=8, num_virtual_tokens=P, **task
    ),
    "multitask": lambda **task: peft.MultitaskPromptTuningConfig(
        num_tasks=4, num_ranks=2, num_virtual_tokens=P, **task
    ),
}
CPT = dict(
    cpt_token_ids=[7, 8, 9, 10, 11, 12, 13, 14],
    cpt_tokens_type_mask=[4, 2, 3, 4, 5, 6, 8, 8],  # two examples, the first of whose labels has one at the beginning
    opt_projection_epsilon=0.5,
    opt_projection_format_epsilon=2.0,
)


def peft_model(kind: str, task: str) -> peft.PeftModel:
    family, auto = AUTOS[task]
    torch.manual_seed(0)
    model = peft.get_peft_model(build(family, auto), TYPES[kind](task_type=task)).double()
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter)
    return model


def inputs_of(kind: str, task: str) -> dict[str, torch.Tensor]:
    inputs = batch()
    if task == "CAUSAL_LM":
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    elif task == "SEQ_CLS":
        inputs["labels"] = torch.tensor([0, 1, 1, 0])
    if kind == "multitask":
        inputs["task_ids"] = torch.tensor([2, 0, 2, 3])
    return inputs


def gradients(model: peft.PeftModel, inputs: dict) -> dict[str, torch.Tensor]:
    model(**inputs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_as_peft_has_it(task, kind):
    stock = peft_model(kind, task)
    fused, inputs = fastprompt.fuse(copy.deepcopy(stock)), inputs_of(kind, task)
    with torch.no_grad():
        expected, got = stock.eval()(**inputs).logits, fused.eval()(**inputs).logits
    if task == "CAUSAL_LM":
        mask = inputs["attention_mask"].bool()
        expected, got = expected[:, -mask.shape[1] :][mask], got[mask]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    expected, got = gradients(stock.train(), inputs), gradients(fused.train(), inputs)
    assert got.keys() == expected.keys() and any("prompt_encoder" in name for name in got)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


def test_a_batch_reads_only_its_tasks(monkeypatch):
    """Two prompts for four sentences of two tasks; what PEFT's other classes do not pass on is taken too."""
    fused, inputs = fastprompt.fuse(peft_model("multitask", "FEATURE_EXTRACTION")), batch()
    rows, encode = [], type(fused).get_prompt
    monkeypatch.setattr(type(fused), "get_prompt", lambda *a, **k: rows.append(encode(*a, **k)) or rows[-1])
    got = fused(**inputs, task_ids=torch.tensor([3, 1, 1, 3], dtype=torch.int32)).last_hidden_state
    assert rows[0].shape[:2] == (2, P)
    alone = fused(**{name: value[1:2] for name, value in inputs.items()}, task_ids=torch.tensor([1]))
    torch.testing.assert_close(got[1], alone.last_hidden_state[0])


def test_task_ids_that_do_not_fit():
    model, x = fastprompt.fuse(peft_model("multitask", "CAUSAL_LM")), batch()
    for ids, error, message in (
        (None, ValueError, "task_ids must be given with MULTITASK_PROMPT_TUNING, .* got none"),
        ([0, 1, 2, 3], TypeError, "task_ids must be a tensor of torch.int32 or torch.int64, got list"),
        (torch.zeros(4), TypeError, "got torch.float32"),
        (torch.zeros(3, dtype=torch.long), ValueError, r"task_ids must be \(4,\), one a sentence, got \(3,\)"),
        (torch.tensor([0, 1, 4, 0]), IndexError, r"task_ids must be in \[0, 4\), got 4"),
        (torch.tensor([0, -1, 3, 0]), IndexError, r"task_ids must be in \[0, 4\), got -1"),
    ):
        with pytest.raises(error, match=message):
            model(**x, task_ids=ids)
    with pytest.raises(ValueError, match="task_ids must be given with .* got some with CARTRIDGE"):
        fastprompt.fuse(peft_model("cartridge", "CAUSAL_LM"))(**x, task_ids=torch.zeros(4, dtype=torch.long))


def type_masks() -> dict[str, torch.Tensor | None]:
    """Of the four texts: none; examples of their own, in other numbers; a sample without any."""
    mixed = torch.randint(0, 13, (4, 12))
    mixed[1] = 0
    return {"none": None, "mixed": mixed}


@pytest.mark.parametrize("types", type_masks())
@pytest.mark.parametrize("decay", [None, 0.7])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_context_aware_prompt_tuning(family, decay, types):
    """Loss and gradients in both modes, with and without logits; examples of the context weigh what they do there."""
    weighted = {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": decay} if decay else {}
    config = peft.CPTConfig(task_type="CAUSAL_LM", **CPT, **weighted)
    # Not a copy: the hook that keeps labels as they are stays behind.
    backbones = [build(family, "AutoModelForCausalLM") for _ in range(2)]
    stock, fused = (peft.get_peft_model(backbone, copy.deepcopy(config)).double() for backbone in backbones)
    deltas = [model.prompt_encoder["default"].delta_embedding.weight for model in (stock, fastprompt.fuse(fused))]
    deltas[1].data.copy_(torch.nn.init.normal_(deltas[0]))
    inputs, types = inputs_of("", "CAUSAL_LM"), type_masks()[types]
    mask = inputs["attention_mask"].bool()

    def given() -> dict:  # PEFT adds to the mask, in place
        return inputs if types is None else inputs | {"input_type_mask": types.clone()}

    for training in (True, False):
        outputs = [model.train(training)(**given()) for model in (stock, fused)]
        (expected,), (got,) = (
            torch.autograd.grad(out.loss, [delta]) for out, delta in zip(outputs, deltas, strict=True)
        )
        torch.testing.assert_close(outputs[1].loss, outputs[0].loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
        assert (outputs[1].logits is None) == training
    assert (deltas[1].norm(dim=1) < 1).all() and torch.equal(*deltas)  # projected
    logits = fused.train()(**given(), return_logits=True)
    torch.testing.assert_close(logits.loss, outputs[0].loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.logits[mask], outputs[0].logits[:, 8:][mask], rtol=1e-5, atol=1e-5)
    del inputs["labels"]
    torch.testing.assert_close(fused(**given()).logits[mask], outputs[0].logits[:, 8:][mask], rtol=1e-5, atol=1e-5)


def test_what_does_not_go_with_context_aware_prompt_tuning():
    config = peft.CPTConfig(task_type="CAUSAL_LM", **CPT)
    model = fastprompt.fuse(peft.get_peft_model(build("llama", "AutoModelForCausalLM"), config).double())
    inputs = inputs_of("", "CAUSAL_LM")
    with pytest.raises(ValueError, match=r"input_type_mask must be \(4, 12\), as labels, got \(4, 3\)"):
        model(**inputs, input_type_mask=torch.ones(4, 3))
    with pytest.raises(ValueError, match="samples that share a row are not for CPT's loss"):
        model(**inputs, seq_idx=(torch.arange(12) > 1).long().expand(4, -1))
    with pytest.raises(ValueError, match="label_smoothing must not be given with CPT's loss, got 0.1"):
        model(**inputs, label_smoothing=0.1)


@pytest.mark.parametrize("nested", [False, True], ids=["injected", "a PeftModel of it"])
def test_lora_beside_a_prompt(nested):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    backbone = build("llama", "AutoModelForCausalLM")
    backbone = peft.get_peft_model(backbone, config) if nested else peft.inject_adapter_in_model(config, backbone)
    stock = peft.get_peft_model(backbone, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)).double()
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_("lora" in name or "prompt" in name)  # the prompt's own making froze LoRA
    fused, inputs = fastprompt.fuse(copy.deepcopy(stock)), inputs_of("", "CAUSAL_LM")
    expected, got = gradients(stock.train(), inputs), gradients(fused.train(), inputs)
    assert got.keys() == expected.keys() and len(got) == 1 + 2 * 2 * 3
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))
    if nested:
        with pytest.raises(TypeError, match="backbone must be a transformers model, got PeftModel"):
            PromptModel(backbone, PromptConfig("prompt", P))


def test_prompts_beneath_prompts_are_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    twice = peft.get_peft_model(peft.get_peft_model(build("llama", "AutoModelForCausalLM"), config), config)
    with pytest.raises(ValueError, match="must hold no other prompts beneath its own, got PROMPT_TUNING"):
        fastprompt.fuse(twice)
