"""PromptModel.generate: words and logits are those of the packed forward, step by step."""

from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from helpers import DECODERS, batch, build

from fastprompt import PromptConfig, PromptModel
from fastprompt.models import PromptInputs
from fastprompt.models.generation import generate as generate_with

GREEDY = {"do_sample": False, "pad_token_id": 1, "eos_token_id": None}


def prompted(family, kind, **config):
    backbone = build(family, "AutoModelForCausalLM")
    torch.manual_seed(1)
    model = PromptModel(backbone, PromptConfig(kind, 4, init_scale=1.0, **config)).eval()
    if model.adapters is not None:
        for parameter in model.adapters.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def step_by_step(model, inputs, steps, **options):
    """Ids (B, L + steps) and the logits (steps, B, V) they come from."""
    ids, mask, logits = inputs["input_ids"], inputs["attention_mask"], []
    for _ in range(steps):
        logits.append(model(input_ids=ids, attention_mask=mask, **options).logits[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1)[:, None]], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return ids, torch.stack(logits)


def generate(model, inputs, steps, **options):
    options |= {"max_new_tokens": steps, "return_dict_in_generate": True, "output_logits": True}
    output = model.generate(**inputs, **options, **GREEDY)
    return output.sequences, torch.stack(output.logits)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("prefix", {}),
        ("prompt", {}),
        ("prefix", {"adapter_size": 4}),
        ("prompt", {"adapter_size": 4}),
        ("prefix", {"position_offset": "none"}),
        ("prefix", {"prefix_in_window": True}),
        ("prompt", {"prefix_in_window": True}),
        ("prefix", {"layers": [-1, 0]}),
    ],
)
@pytest.mark.parametrize("family", DECODERS)
def test_equals_the_packed_forward(family, kind, config):
    """Left-padded and ragged, longer than Gemma's window of 8, each sample with its own prompt."""
    model = prompted(family, kind, **config)
    model.add_prompt("other")
    inputs, ids = batch((7, 1, 12, 5), "left"), torch.tensor([0, 1, 1, 0])
    words, logits = step_by_step(model, inputs, 10, prompt_ids=ids)
    for cached in (True, False):
        got, scores = generate(model, inputs, 10, prompt_ids=ids, use_cache=cached)
        assert torch.equal(got, words)
        torch.testing.assert_close(scores, logits, rtol=1e-5, atol=1e-5, check_dtype=False)
    assert (step_by_step(model, inputs, 1)[1] - logits[0]).abs().max() > 1e-2  # the prompts do matter


def test_without_padding_and_mask():
    model = prompted("llama", "prefix")
    ids = torch.randint(5, 61, (2, 6))
    words, _ = step_by_step(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 6)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=6, **GREEDY), words)


def test_beams_of_a_ragged_batch():
    """A beam's sample reads the sample's prompt: a batch gives what its samples give alone."""
    model = prompted("llama", "prompt")
    model.add_prompt("other")
    inputs, ids = batch((7, 3), "left"), torch.tensor([1, 0])
    options = {"max_new_tokens": 6, "num_beams": 3, **GREEDY}
    together = model.generate(**inputs, prompt_ids=ids, **options)
    for n in range(2):
        alone = {name: rows[n : n + 1, rows.shape[1] - (7, 3)[n] :] for name, rows in inputs.items()}
        assert torch.equal(model.generate(**alone, prompt_ids=ids[n : n + 1], **options)[0, -6:], together[n, -6:])


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_equals_peft(kind, tmp_path):
    model = prompted("llama", kind)
    model.save_pretrained(tmp_path)
    stock = peft.PeftModel.from_pretrained(build("llama", "AutoModelForCausalLM"), tmp_path).eval()
    inputs = batch((6, 6), "left")
    assert torch.equal(
        model.generate(**inputs, max_new_tokens=8, **GREEDY)[:, -8:],
        stock.generate(**inputs, max_new_tokens=8, **GREEDY)[:, -8:],
    )


def test_the_backbone_generates_as_before():
    backbone, inputs = build("llama", "AutoModelForCausalLM"), batch((6, 4), "left")
    before = backbone.generate(**inputs, max_new_tokens=6, **GREEDY)
    model = PromptModel(backbone, PromptConfig("prefix", 4, init_scale=1.0))
    model.generate(**inputs, max_new_tokens=6, **GREEDY)
    assert torch.equal(backbone.generate(**inputs, max_new_tokens=6, **GREEDY), before)


def test_what_cannot_generate():
    inputs = batch((3,))
    with pytest.raises(ValueError, match="causal language model with its head, got LlamaModel"):
        PromptModel(build("llama"), PromptConfig("prefix", 4)).generate(**inputs)
    with pytest.raises(ValueError, match="causal language model with its head, got BertModel"):
        PromptModel(build("bert"), PromptConfig("prefix", 4)).generate(**inputs)
    with pytest.raises(ValueError, match="shared_prefix_ids must not be given to generate"):
        prompted("llama", "prefix").generate(**inputs, shared_prefix_ids=torch.tensor([5]))


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", DECODERS)
def test_a_static_cache_and_guesses_that_are_taken_back(family, kind):
    """A static cache has room behind the text when transformers leaves the mask out."""
    model, inputs = prompted(family, kind), batch((12,), "left")
    words, logits = step_by_step(model, inputs, 8)
    got, scores = generate(model, inputs, 8, cache_implementation="static")
    assert torch.equal(got, words)
    torch.testing.assert_close(scores, logits, rtol=1e-5, atol=1e-5, check_dtype=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, prompt_lookup_num_tokens=3, **GREEDY), words)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_in_training_mode_it_writes_the_same(kind):
    """Neither dropout nor gradient checkpointing, which keeps no cache, takes part; the modes stay as they were."""
    model, inputs = prompted("llama", kind, dropout=0.5), batch((7, 3), "left")
    words, _ = generate(model, inputs, 8)
    model.backbone.gradient_checkpointing_enable()
    model.train().backbone.lm_head.eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(generate(model, inputs, 8)[0], words)
    assert [module.training for module in model.modules()] == modes


def test_several_sequences_of_a_text_read_its_prompt():
    model, inputs, ids = prompted("llama", "prefix"), batch((7, 3), "left"), torch.tensor([1, 0])
    model.add_prompt("other")
    words, _ = step_by_step(model, inputs, 6, prompt_ids=ids)
    options = GREEDY | {"do_sample": True, "top_k": 1, "num_return_sequences": 3, "max_new_tokens": 6}
    assert torch.equal(model.generate(**inputs, **options, prompt_ids=ids), words.repeat_interleave(3, 0))


def test_prompts_and_models_that_do_not_fit():
    model, inputs = prompted("llama", "prefix"), batch((7, 3, 4, 2), "left")
    model.add_prompt("other")
    for count in (2, 8):  # neither is taken for beams
        with pytest.raises(ValueError, match=rf"prompt_ids must be \(4,\), one a text, got \({count},\)"):
            model.generate(**inputs, prompt_ids=torch.zeros(count, dtype=torch.long))
    backbone = build("gemma3_text", "AutoModelForCausalLM")
    with pytest.raises(ValueError, match=r"prefix must have keys and values \(N, 1, P, 16\).* got \(1, 2, 4, 8\)"):
        generate_with(backbone, model.prompt_inputs(), **inputs)
    with pytest.raises(ValueError, match="prefix must be of the backbone's 2 layers"):
        generate_with(build("llama", "AutoModelForCausalLM", num_hidden_layers=2), model.prompt_inputs(), **inputs)
    with pytest.raises(ValueError, match=r"prompt must be \(N, P, 48\), as the backbone's, got \(1, 4, 32\)"):
        generate_with(backbone, PromptInputs(prompt=torch.zeros(1, 4, 32)), **inputs)
    with pytest.raises(ValueError, match="adapters must have been made for this backbone of 3 layers"):
        adapters = prompted("llama", "prefix", adapter_size=4).adapters
        generate_with(build("llama", "AutoModelForCausalLM"), PromptInputs(adapters=adapters), **inputs)
    with pytest.raises(IndexError, match=r"index must be in \[0, 1\), got 0 to 1"):
        twice = replace(model.prompt_inputs(), index=np.array([0, 1, 1, 0]))
        generate_with(model.backbone, twice, **inputs)
