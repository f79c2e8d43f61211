"""A text common to all samples, run once, against the same text at the start of every sample; label smoothing."""

import copy

import peft
import pytest
import torch
import transformers
from helpers import DECODERS, PAD, batch, build

import fastprompt
from fastprompt import PromptConfig, PromptModel, _native

P = 5
TEXT = torch.tensor([9, 33, 7])
SETTINGS = [("prefix", "peft"), ("prefix", "none"), ("prompt", "peft")]


def model_of(family: str, kind: str, auto: str = "AutoModelForCausalLM", **config) -> PromptModel:
    return PromptModel(build(family, auto), PromptConfig(kind, P, init_scale=1.0, **config)).eval()


def labelled(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def with_text(inputs: dict[str, torch.Tensor], text: torch.Tensor = TEXT) -> dict[str, torch.Tensor]:
    """The same samples, padded on the right, each with `text` before it, unlabelled."""
    whole = {}
    for name, pad, begin in (("input_ids", PAD, text), ("attention_mask", 0, None), ("labels", -100, None)):
        if name not in inputs:
            continue
        valid = [row[mask != 0] for row, mask in zip(inputs[name], inputs["attention_mask"], strict=True)]
        begin = torch.full_like(text, 1 if name == "attention_mask" else -100) if begin is None else begin
        rows = [torch.cat([begin, row]) for row in valid]
        whole[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    return whole


def results(model: PromptModel, inputs: dict[str, torch.Tensor], **options):
    """Loss in training, logits in evaluation, and the prompt's gradient."""
    model.zero_grad()
    loss = model.train()(**inputs, **options).loss
    loss.backward()
    return loss, model.eval()(**inputs, **options).logits, model.prompt.weight.grad


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("kind", "offset"), SETTINGS)
@pytest.mark.parametrize("family", DECODERS)
def test_it_is_the_text_in_every_sample(family, kind, offset, side):
    model = model_of(family, kind, position_offset=offset, prefix_in_window=True)
    inputs = labelled(batch(side=side))
    loss, logits, gradient = results(model, inputs, shared_prefix_ids=TEXT)
    whole = with_text(inputs)
    expected_loss, expected, expected_gradient = results(model, whole)
    assert logits.shape[:2] == inputs["input_ids"].shape
    own = [row[mask != 0][len(TEXT) :] for row, mask in zip(expected, whole["attention_mask"], strict=True)]
    eps = 1e-10 if _native.available("cpu") else 1e-6  # the models' own norms run in float32 whatever the dtype
    torch.testing.assert_close(logits[inputs["attention_mask"] != 0], torch.cat(own), rtol=eps, atol=eps)
    torch.testing.assert_close(loss, expected_loss, rtol=eps, atol=eps)
    scale = float(expected_gradient.abs().max())
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=eps * scale)
    assert (loss - model(**inputs).loss).abs() > 1e-3


@pytest.mark.parametrize("family", DECODERS)
def test_states_and_a_long_text(family):
    """Longer than Gemma's window of 8: what the text's own rows see of it slides, too."""
    model = model_of(family, "prefix", "AutoModel", prefix_in_window=True)
    inputs, text = batch(), torch.randint(5, 61, (13,))
    hidden = model(**inputs, shared_prefix_ids=text, output_hidden_states=True).hidden_states
    whole = with_text(inputs, text)
    expected = model(**whole, output_hidden_states=True).hidden_states
    for ours, theirs in zip(hidden, expected, strict=True):
        own = [row[mask != 0][len(text) :] for row, mask in zip(theirs, whole["attention_mask"], strict=True)]
        torch.testing.assert_close(ours[inputs["attention_mask"] != 0], torch.cat(own), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_a_batch_that_came_packed_and_gradient_checkpointing(family):
    model = model_of(family, "prompt")
    inputs = labelled(batch())
    valid = inputs["attention_mask"] != 0
    expected_loss, _, expected = results(model, inputs, shared_prefix_ids=TEXT)
    positions = torch.cat([torch.arange(n) for n in valid.sum(1)])
    flat = {"input_ids": inputs["input_ids"][valid], "labels": inputs["labels"][valid], "position_ids": positions}
    model.backbone.gradient_checkpointing_enable()
    loss, _, gradient = results(model, {name: x[None] for name, x in flat.items()}, shared_prefix_ids=TEXT)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_by_default_it_stays_in_view_under_a_window(kind):
    """A text within the window gives what the text in every sample gives; late rows see it as they see the prompt."""
    model = model_of("gemma3_text", kind)
    short, long = batch(lengths=(4, 2)), batch(lengths=(30,))
    expected = model(**with_text(short)).logits[0, len(TEXT) :]
    got = model(**short, shared_prefix_ids=TEXT).logits[0]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    expected = model(**with_text(long)).logits[0, len(TEXT) :]
    got = model(**long, shared_prefix_ids=TEXT).logits[0]
    assert not torch.allclose(got[-1], expected[-1], rtol=1e-3)


def test_fuse_takes_it():
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    stock = peft.get_peft_model(build("llama", "AutoModelForCausalLM"), config).eval()
    stock.prompt_encoder["default"].embedding.weight.data.normal_()
    fused = fastprompt.fuse(copy.deepcopy(stock))
    inputs = labelled(batch())
    got = fused(**inputs, shared_prefix_ids=TEXT)
    torch.testing.assert_close(got.loss, stock(**with_text(inputs)).loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_label_smoothing(family):
    model = model_of(family, "prefix")
    inputs = labelled(batch())
    inputs["labels"][:, 0] = -100  # both references leave it out
    logits, labels = model(**inputs).logits, inputs["labels"]
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.2
    )
    smoother = transformers.trainer_pt_utils.LabelSmoother(epsilon=0.2)
    torch.testing.assert_close(smoother({"logits": logits}, labels, shift_labels=True), expected)
    model.zero_grad()
    expected.backward()
    gradient = model.prompt.weight.grad.clone()
    for options in ({}, {"return_logits": True}):
        model.zero_grad()
        loss = model.train()(**inputs, label_smoothing=0.2, **options).loss
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
        loss.backward()
        torch.testing.assert_close(model.prompt.weight.grad, gradient, rtol=1e-5, atol=1e-6)


def test_bad_input():
    model = model_of("llama", "prefix")
    for text, got in ((TEXT[None], r"\(1, 3\)"), (TEXT[:0], r"\(0,\)")):
        with pytest.raises(ValueError, match=rf"shared_prefix_ids must be \(S,\) with S at least 1, got {got}"):
            model(**batch(), shared_prefix_ids=text)
    with pytest.raises(ValueError, match="label_smoothing must be in .* got 1.5"):
        model.train()(**labelled(batch()), label_smoothing=1.5)
    encoder = model_of("bert", "prefix", "AutoModel")
    with pytest.raises(ValueError, match="shared_prefix_ids is for causal models"):
        encoder(**batch(), shared_prefix_ids=TEXT)
    with pytest.raises(ValueError, match="label_smoothing is for causal language models here, got 0.1"):
        encoder(**batch(), label_smoothing=0.1)
