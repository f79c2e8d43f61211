"""Labels that are no token: an error, as the stock model gives, whatever is computed from them."""

import functools

import peft
import pytest
import torch
from helpers import VOCABULARY, batch, build

import fastprompt
from fastprompt import PromptConfig, PromptModel


@functools.cache
def models() -> dict[str, torch.nn.Module]:
    def backbone():
        return build("gemma3_text", "AutoModelForCausalLM", torch.float32)

    made = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    found = {kind: PromptModel(backbone(), PromptConfig(kind, 3)) for kind in ("prefix", "prompt")}
    return found | {"fused": fastprompt.fuse(peft.get_peft_model(backbone(), made))}


@pytest.mark.parametrize("bad", [-1, VOCABULARY, -101])
def test_labels_out_of_range(bad):
    inputs = batch(side="left")
    text = inputs["attention_mask"] == 1
    mixed = inputs["input_ids"].masked_fill(torch.rand(text.shape) < 0.1, bad)
    mixed[2, 5] = bad
    everywhere, padding = torch.full_like(mixed, bad), inputs["input_ids"].masked_fill(~text, bad)
    for name, model in models().items():
        for training, grad, more in (
            (True, True, {}),
            (True, False, {}),
            (False, True, {}),
            (True, True, {} if name == "fused" else {"return_logits": True}),
        ):
            model.train(training)
            for labels in (everywhere, mixed, padding):
                with torch.set_grad_enabled(grad), pytest.raises(IndexError, match=rf"labels must be .*, got {bad}"):
                    model(**inputs, labels=labels, **more)
            good = inputs["input_ids"].masked_fill(~text, -100)
            assert model(**inputs, labels=good, **more).loss.isfinite()
