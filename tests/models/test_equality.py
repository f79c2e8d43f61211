"""The fused forward against PEFT's own: same loss, same prompt gradient, same logits, on ragged batches."""

import copy

import peft
import pytest
import torch
from helpers import CONFIGS, DECODERS, batch, build

import fastprompt
from fastprompt import PromptConfig, PromptModel

P = 5
CASES = [(f, "AutoModel") for f in CONFIGS] + [(f, "AutoModelForCausalLM") for f in DECODERS]
TASKS = {
    "AutoModel": "FEATURE_EXTRACTION",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
}


def peft_model(backbone, auto: str, kind: str, **config):
    settings = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}
    if kind == "p-tuning":
        made = peft.PromptEncoderConfig(task_type=TASKS[auto], num_virtual_tokens=P, encoder_hidden_size=24)
    else:
        made = settings[kind](task_type=TASKS[auto], num_virtual_tokens=P, **config)
    model = peft.get_peft_model(backbone, made).to(backbone.dtype)
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter)
    return model


def prompt_gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.prompt_encoder.parameters()])


def relative(ours: torch.Tensor, stock: torch.Tensor) -> float:
    ours, stock = ours.detach(), stock.detach()
    return float((ours - stock).abs().max() / stock.abs().max())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize(("family", "auto"), CASES)
def test_fuse_equals_peft(family, auto, kind, dtype, training):
    backbone = build(family, auto, dtype)
    stock = peft_model(copy.deepcopy(backbone), auto, kind).train(training)
    fused = fastprompt.fuse(copy.deepcopy(stock)).train(training)
    inputs = batch()
    valid = inputs["attention_mask"].bool()
    length = valid.shape[1]
    if auto == "AutoModelForCausalLM":
        inputs["labels"] = inputs["input_ids"].masked_fill(~valid, -100)
        expected, got = stock(**inputs), fused(**inputs)
        assert (got.logits is None) == training
        everything = fused(**inputs, return_logits=True)
        expected_rows, rows = expected.logits[:, -length:][valid], everything.logits[valid]
        expected_loss, loss = expected.loss, got.loss
        assert relative(everything.loss, got.loss) < 1e-6
    else:
        expected_rows = stock(**inputs).last_hidden_state[:, -length:][valid]
        rows = fused(**inputs).last_hidden_state[valid]
        weight = torch.randn_like(rows)
        expected_loss, loss = (expected_rows * weight).sum(), (rows * weight).sum()
    expected_loss.backward()
    loss.backward()
    # Llama and Gemma normalise in float32 whatever the dtype.
    eps = 5e-5 if dtype == torch.float32 else 1e-6 if family in DECODERS else 1e-12
    assert relative(rows, expected_rows) < eps
    assert relative(loss, expected_loss) < eps * 10
    assert relative(prompt_gradient(fused), prompt_gradient(stock)) < eps
    assert all(p.grad is None for p in fused.get_base_model().parameters())


@pytest.mark.parametrize("kind", ["prefix", "p-tuning"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_fuse_runs_pefts_encoders(family, kind):
    """An MLP that makes the prefix, and the P-tuning encoder, are evaluated once and get the same gradients."""
    config = {"prefix_projection": True, "encoder_hidden_size": 24} if kind == "prefix" else {}
    stock = peft_model(build(family), "AutoModel", kind, **config).train()
    fused = fastprompt.fuse(copy.deepcopy(stock))
    inputs = batch()
    valid = inputs["attention_mask"].bool()
    weight = torch.randn(int(valid.sum()), 48, dtype=torch.float64)
    for model in (stock, fused):
        (model(**inputs).last_hidden_state[:, -valid.shape[1] :][valid] * weight).sum().backward()
    assert relative(prompt_gradient(fused), prompt_gradient(stock)) < 1e-6


@pytest.mark.parametrize("family", CONFIGS)
def test_fuse_prefix_with_classification_head(family):
    auto = "AutoModelForSequenceClassification"
    stock = peft_model(build(family, auto), auto, "prefix")
    fused = fastprompt.fuse(copy.deepcopy(stock))
    inputs = batch() | {"labels": torch.tensor([0, 1, 1, 0])}
    if family == "bert":
        inputs["token_type_ids"] = torch.randint(2, inputs["input_ids"].shape)
    expected, got = stock.eval()(**inputs), fused.eval()(**inputs)
    assert relative(got.logits, expected.logits) < 1e-6
    assert relative(got.loss, expected.loss) < 1e-6


def test_fuse_keeps_the_model_peft_knows(tmp_path):
    stock = peft_model(build("llama", "AutoModelForCausalLM"), "AutoModelForCausalLM", "prefix").eval()
    inputs = batch(lengths=(6, 6))
    before = stock.generate(**inputs, max_new_tokens=4, do_sample=False)
    parameters = dict(stock.named_parameters())
    fused = fastprompt.fuse(stock)
    assert fused is stock
    assert all(p is parameters[name] for name, p in fused.named_parameters())
    assert torch.equal(fused.generate(**inputs, max_new_tokens=4, do_sample=False), before)
    with fused.disable_adapter():
        plain = fused(**inputs).logits
    torch.testing.assert_close(plain, fused.get_base_model()(**inputs).logits)
    fused.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build("llama", "AutoModelForCausalLM"), tmp_path).eval()
    assert relative(fused(**inputs).logits, again(**inputs).logits) < 1e-5


def test_fuse_rejects_what_it_cannot_fuse():
    with pytest.raises(TypeError, match=r"peft_model must be a peft.PeftModel, got BertModel"):
        fastprompt.fuse(build("bert"))
    lora = peft.get_peft_model(build("bert"), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"active adapter must be one of .*got LORA"):
        fastprompt.fuse(lora)


def test_num_items_in_batch_as_transformers_counts_it():
    stock = peft_model(build("llama", "AutoModelForCausalLM"), "AutoModelForCausalLM", "prefix").train()
    fused = fastprompt.fuse(copy.deepcopy(stock))
    inputs = batch()
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    expected = stock(**inputs, num_items_in_batch=11).loss
    assert relative(fused(**inputs, num_items_in_batch=11).loss, expected) < 1e-6


@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_fuse_pools_the_row_that_peft_pools(family, kind):
    """A classification head over an encoder, and the base model's own pooler, read the first virtual token."""
    inputs = batch()
    for auto in ("AutoModelForSequenceClassification", "AutoModel"):
        stock = peft_model(build(family, auto), auto, kind).train()
        fused = fastprompt.fuse(copy.deepcopy(stock))
        if auto == "AutoModel":
            expected, got = (model(**inputs).pooler_output.square().sum() for model in (stock, fused))
        else:
            more = inputs | {"labels": torch.tensor([0, 1, 1, 0])}
            expected, got = stock(**more), fused(**more)
            assert relative(got.logits, expected.logits) < 1e-12
            expected, got = expected.loss, got.loss
        assert relative(got, expected) < 1e-12
        expected.backward()
        got.backward()
        assert relative(prompt_gradient(fused), prompt_gradient(stock)) < 1e-12
        head = [[p.grad for p in model.get_base_model().parameters() if p.grad is not None] for model in (stock, fused)]
        assert all(relative(own, their) < 1e-12 for their, own in zip(*head, strict=True))


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_the_row_that_is_pooled_is_chosen(family, tmp_path):
    """The text's first token, or the prompt's; a checkpoint keeps its own, and PEFT loads no other than its own."""
    auto, inputs = "AutoModelForSequenceClassification", batch()
    stock = peft_model(build(family, auto), auto, "prompt").eval()
    stock.save_pretrained(tmp_path / "theirs")
    loaded = PromptModel.from_pretrained(build(family, auto), tmp_path / "theirs").eval()
    expected = stock(**inputs).logits
    assert relative(loaded(**inputs).logits, expected) < 1e-6 and loaded.prompt_config.pools_prompt
    loaded.save_pretrained(tmp_path / "again")
    for made in (
        peft.PeftModel.from_pretrained(build(family, auto), tmp_path / "again").double().eval(),
        PromptModel.from_pretrained(build(family, auto), tmp_path / "again").eval(),
    ):
        assert relative(made(**inputs).logits, expected) < 1e-6
    own = PromptModel(build(family, auto), PromptConfig("prompt", P)).eval()
    with pytest.raises(ValueError, match="pools_prompt of the prompt in .* must be False, as the model's, got True"):
        own.load_prompt("theirs", tmp_path / "theirs")
    fused, head = fastprompt.fuse(stock, pools_prompt=False), own.backbone.classifier
    own.prompt.weight.data.copy_(stock.prompt_encoder["default"].embedding.weight)
    head.load_state_dict(stock.get_base_model().classifier.modules_to_save["default"].state_dict())
    state = own(**inputs, output_hidden_states=True).hidden_states[-1][:, 0]
    text = head(own.backbone.base_model.pooler(state.unsqueeze(1)) if family == "bert" else state.unsqueeze(1))
    assert relative(text, expected) > 0.1
    for model in (own, fused, copy.deepcopy(fused)):
        assert relative(model(**inputs).logits, text) < 1e-6
    assert relative(fastprompt.fuse(fused)(**inputs).logits, expected) < 1e-6
    own.save_pretrained(tmp_path / "ours")
    assert (
        relative(PromptModel.from_pretrained(build(family, auto), tmp_path / "ours").eval()(**inputs).logits, text)
        < 1e-6
    )
    with pytest.raises((KeyError, ValueError), match="FASTPROMPT_POOLS_TEXT"):
        peft.PeftModel.from_pretrained(build(family, auto), tmp_path / "ours")


@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
def test_fuse_pools_the_texts_last_token_over_a_decoder(kind):
    """As PEFT does where nothing is padded; on the right PEFT pools padding."""
    auto = "AutoModelForSequenceClassification"
    stock = peft_model(build("llama", auto), auto, kind).eval()
    fused = fastprompt.fuse(copy.deepcopy(stock))
    whole, ragged = batch((6, 6)), batch((6, 3))
    assert relative(fused(**whole).logits, stock(**whole).logits) < 1e-6
    alone = stock(input_ids=ragged["input_ids"][1:, :3]).logits[0]
    assert relative(fused(**ragged).logits[1], alone) < 1e-6
    assert relative(stock(**ragged).logits[1], alone) > 1e-2


@pytest.mark.parametrize("auto", ["AutoModelForTokenClassification", "AutoModelForQuestionAnswering"])
def test_heads_that_read_every_row_have_the_texts_length(auto):
    """Also under left padding, where no other row stands in for the first token."""
    model = PromptModel(build("bert", auto), PromptConfig("prompt", P)).eval()
    right, left = batch((5, 3)), batch((5, 3), side="left")
    left["input_ids"][left["attention_mask"].bool()] = right["input_ids"][right["attention_mask"].bool()]
    for x, y in zip(model(**right).values(), model(**left).values(), strict=True):
        assert relative(y[left["attention_mask"].bool()], x[right["attention_mask"].bool()]) < 1e-12
        torch.testing.assert_close(y[1, :2], x[1, 3:])  # rows of zeros
