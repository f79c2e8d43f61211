"""Gradient checkpointing, switched on in every way: the prompt gets its gradient, or the call is refused."""

import peft
import pytest
import torch
import transformers
from helpers import batch, build

import fastprompt
from fastprompt import PromptConfig, PromptModel

P = 3
SWITCHES = {
    "as it comes": lambda backbone: backbone.gradient_checkpointing_enable(),
    "not reentrant": lambda backbone: backbone.gradient_checkpointing_enable({"use_reentrant": False}),
    "reentrant": lambda backbone: backbone.gradient_checkpointing_enable({"use_reentrant": True}),
    "torch's default": lambda backbone: backbone.gradient_checkpointing_enable({}),
    "torch's own function": lambda backbone: backbone._set_gradient_checkpointing(),
    "on and off": lambda backbone: (
        backbone.gradient_checkpointing_enable({}),
        backbone.gradient_checkpointing_disable(),
    ),
    "for few bits": lambda backbone: (
        setattr(backbone, "is_loaded_in_8bit", True),
        peft.prepare_model_for_kbit_training(backbone),
    ),
    "for few bits, not reentrant": lambda backbone: (
        setattr(backbone, "is_loaded_in_8bit", True),
        peft.prepare_model_for_kbit_training(backbone, gradient_checkpointing_kwargs={"use_reentrant": False}),
    ),
}
REENTRANT = ("reentrant", "torch's default", "torch's own function", "for few bits")


def wrapped(backbone, maker: str):
    kind, *rest = maker.removeprefix("fused ").split()
    if not maker.startswith("fused"):
        more = {"adapter_size": 4} if "adapters" in rest else {"encoder": rest[0] if rest else None}
        model = PromptModel(backbone, PromptConfig(kind, P, init_scale=1.0, **more))
        for parameter in model.adapters.parameters() if "adapters" in rest else ():
            torch.nn.init.normal_(parameter, std=0.2)
        return model
    task = "CAUSAL_LM" if backbone.config.model_type == "llama" else "SEQ_CLS"
    if kind == "p-tuning":
        config = peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=P)
    else:
        config = (peft.PrefixTuningConfig if kind == "prefix" else peft.PromptTuningConfig)(
            task_type=task, num_virtual_tokens=P
        )
    return fastprompt.fuse(peft.get_peft_model(backbone, config))


def gradients(model, inputs) -> list[torch.Tensor]:
    model.zero_grad()
    model.train()(**inputs).loss.backward()
    return [p.grad.clone() for p in of_prompts(model)]


def of_prompts(model) -> list[torch.nn.Parameter]:
    if not isinstance(model, PromptModel):
        return list(model.prompt_encoder.parameters())
    return [*model.prompt.parameters(), *(() if model.adapters is None else model.adapters.parameters())]


@pytest.mark.parametrize(
    "maker", ["prefix", "prompt", "prefix mlp", "prompt mlp", "fused prefix", "fused p-tuning", "prompt and adapters"]
)
@pytest.mark.parametrize(("family", "embeddings"), [("bert", True), ("llama", False)])
def test_a_gradient_or_a_refusal(family, embeddings, maker):
    auto = "AutoModelForCausalLM" if family == "llama" else "AutoModelForSequenceClassification"
    inputs = batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    inputs["labels"] = labels if family == "llama" else torch.tensor([0, 1, 0, 1])
    torch.manual_seed(0)
    model = wrapped(build(family, auto, torch.float32), maker)
    backbone = model.backbone if isinstance(model, PromptModel) else model.get_base_model()
    if embeddings:
        inputs["inputs_embeds"] = backbone.get_input_embeddings()(inputs.pop("input_ids")).detach()
    expected = gradients(model, inputs)
    assert all(each.abs().sum() > 0 for each in expected)
    for name, switch in SWITCHES.items():
        for before in (False, True):
            if before and maker == "fused prefix":
                continue  # PEFT refuses it
            torch.manual_seed(0)
            backbone = build(family, auto, torch.float32)
            if before:
                switch(backbone)
            model = wrapped(backbone, maker)
            if not before:
                switch(backbone)
                for parameter in of_prompts(model):
                    parameter.requires_grad_(True)  # the preparation for few bits freezes what is there
            backbone.enable_input_require_grads()
            if name in REENTRANT and "prefix" in maker:
                with pytest.raises(ValueError, match="gradient checkpointing needs use_reentrant=False"):
                    model.train()(**inputs)
                model.eval()(**inputs)  # which checkpoints nothing
                continue
            for got, own in zip(gradients(model, inputs), expected, strict=True):
                torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-6)


def test_layers_that_train_without_a_prompt_that_does():
    """What is in the layers gets its gradient from the hidden states that enter them, if they have one."""
    model, inputs = wrapped(build("llama", "AutoModelForCausalLM", torch.float32), "prompt and adapters"), batch()
    model.backbone.gradient_checkpointing_enable({"use_reentrant": True})
    model.freeze_prompt("default")
    with pytest.raises(ValueError, match="gradient checkpointing needs use_reentrant=False"):
        model.train()(**inputs)
    model.adapters.requires_grad_(False)
    model.train()(**inputs)
    model.backbone.model.layers[1].requires_grad_(True)
    with pytest.raises(ValueError, match="gradient checkpointing needs use_reentrant=False"):
        model.train()(**inputs)
    embeds = model.backbone.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_(True)
    model.train()(inputs_embeds=embeds, **inputs).logits.sum().backward()
    assert embeds.grad.abs().sum() > 0 and model.backbone.model.layers[1].mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("maker", ["prefix", "fused prompt"])
def test_the_trainers_own_switch(maker, tmp_path):
    data = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4
    for kwargs in (None, {"use_reentrant": True}):
        model = wrapped(build("llama", "AutoModelForCausalLM", torch.float32), maker)
        start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        settings = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=1, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs, **settings
        )
        run = transformers.Trainer(
            model, arguments, train_dataset=data, data_collator=transformers.default_data_collator
        )
        if kwargs is not None and maker == "prefix":
            with pytest.raises(ValueError, match="gradient checkpointing needs use_reentrant=False"):
                run.train()
            continue
        run.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(not torch.equal(p, own) for p, own in zip(trained, start, strict=True))
