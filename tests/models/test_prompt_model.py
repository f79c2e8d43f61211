"""PromptModel: lengths, padding, heads, packed batches, initialisation, checkpointing."""

import pytest
import torch
import transformers
from helpers import CONFIGS, DECODERS, ENCODERS, PAD, batch, build

from fastprompt import PromptConfig, PromptModel

P = 5


def model_of(family: str, kind: str, auto: str = "AutoModel", **config) -> PromptModel:
    return PromptModel(build(family, auto), PromptConfig(kind, P, init_scale=1.0, **config)).eval()


def gradient(model: PromptModel, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return model.prompt.weight.grad


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", CONFIGS)
def test_left_padding_gives_what_right_padding_gives(family, kind):
    model = model_of(family, kind)
    right = batch(side="right")
    mask = right["attention_mask"].bool()
    left = {name: torch.full_like(x, PAD if name == "input_ids" else 0) for name, x in right.items()}
    for name, x in left.items():
        x[mask.flip(1)] = right[name][mask]
    out_right = model(**right).last_hidden_state
    out_left = model(**left).last_hidden_state
    assert out_right.shape == out_left.shape == (*mask.shape, 48)
    torch.testing.assert_close(out_left[mask.flip(1)], out_right[mask])
    assert not out_right[~mask].any()


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", CONFIGS)
def test_batch_is_its_sentences_one_by_one(family, kind):
    """No leak between samples; the prompt's gradient is the sum over them."""
    model = model_of(family, kind)
    inputs = batch()
    mask = inputs["attention_mask"].bool()
    weight = torch.randn(*mask.shape, 48, dtype=torch.float64)
    together = model(**inputs).last_hidden_state
    whole = gradient(model, (together * weight)[mask].sum())
    parts = torch.zeros_like(whole)
    for row, length in enumerate(mask.sum(1)):
        alone = model(input_ids=inputs["input_ids"][row : row + 1, :length]).last_hidden_state
        torch.testing.assert_close(together[row, :length], alone[0])
        parts += gradient(model, (alone[0] * weight[row, :length]).sum())
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-6 * float(whole.abs().max()))


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", DECODERS)
def test_batch_that_came_packed(family, kind):
    """DataCollatorWithFlattening: one row, positions that begin anew, no mask."""
    model = model_of(family, kind, "AutoModelForCausalLM").train()
    padded = batch()
    rows = [ids[mask.bool()] for ids, mask in zip(padded["input_ids"], padded["attention_mask"], strict=True)]
    padded["labels"] = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)
    padded["labels"][:, 0] = -100  # the collator marks each first token so
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    flat = collate([{"input_ids": ids.tolist()} for ids in rows])
    loss, expected = model(**flat).loss, model(**padded).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(model, loss), gradient(model, expected), rtol=1e-5, atol=1e-7)
    del flat["position_ids"]  # cu_seq_lens_q tell the same
    torch.testing.assert_close(model(**flat).loss, loss)
    with pytest.raises(ValueError, match="cu_seqlens must begin at 0"):
        model(**flat | {name: flat[name] - 1 for name in ("cu_seq_lens_q", "cu_seq_lens_k")})


@pytest.mark.parametrize("family", DECODERS)
def test_causal_logits_stand_where_labels_are(family, monkeypatch):
    model = model_of(family, "prompt", "AutoModelForCausalLM").train()
    inputs = batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :-2] = -100
    seen, forward = [], torch.nn.Linear.forward
    with monkeypatch.context() as patch:  # no hook: what may change the logits is asked for all that count
        patch.setattr(torch.nn.Linear, "forward", lambda self, x: seen.append((self, x.shape)) or forward(self, x))
        out = model(**inputs, labels=labels)
    assert out.logits is None
    assert [shape for module, shape in seen if module is model.backbone.lm_head] == [(1, 0, 48)]
    hook = model.backbone.lm_head.register_forward_hook(lambda module, args, out: out.flip(-1))
    flipped = model(**inputs, labels=torch.where(labels == -100, labels, 60 - labels)).loss
    hook.remove()
    torch.testing.assert_close(flipped.double(), out.loss)
    model.backbone.lm_head.weight.requires_grad_(True)  # and from the head itself where that trains
    torch.testing.assert_close(model(**inputs, labels=labels).loss.double(), out.loss)
    model.backbone.lm_head.weight.requires_grad_(False)
    full = model(**inputs, labels=labels, return_logits=True)
    assert full.logits.shape == (4, 12, 61)
    torch.testing.assert_close(full.loss.double(), out.loss)
    assert model(**inputs).logits.shape == (4, 12, 61)
    assert model.eval()(**inputs, labels=labels).logits.shape == (4, 12, 61)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", ENCODERS)
def test_classification_head_under_left_padding(family, kind):
    """Heads of encoders read the first column, which left padding leaves empty."""
    model = model_of(family, kind, "AutoModelForSequenceClassification")
    inputs = batch(lengths=(4, 9))
    left = {name: x.clone() for name, x in inputs.items()}
    left["input_ids"][0] = inputs["input_ids"][0].roll(5)
    left["attention_mask"][0] = inputs["attention_mask"][0].roll(5)
    torch.testing.assert_close(model(**left).logits, model(**inputs).logits)


def test_decoder_classification_pools_the_last_token():
    model = model_of("llama", "prompt", "AutoModelForSequenceClassification")
    inputs = batch()
    together = model(**inputs).logits
    for row, length in enumerate(inputs["attention_mask"].sum(1)):
        alone = model(input_ids=inputs["input_ids"][row : row + 1, :length]).logits[0]
        torch.testing.assert_close(together[row], alone)


def test_spans_need_no_shift():
    model = model_of("bert", "prompt", "AutoModelForQuestionAnswering")
    out = model(**batch(), start_positions=torch.tensor([1, 0, 3, 2]), end_positions=torch.tensor([2, 0, 5, 4]))
    assert out.start_logits.shape == (4, 12)
    expected = sum(
        torch.nn.functional.cross_entropy(logits, torch.tensor(where))
        for logits, where in ((out.start_logits, [1, 0, 3, 2]), (out.end_logits, [2, 0, 5, 4]))
    )
    torch.testing.assert_close(out.loss, expected / 2)


@pytest.mark.parametrize("family", CONFIGS)
def test_gradient_checkpointing_keeps_the_prefix(family):
    model = model_of(family, "prefix")
    inputs = batch()
    plain = gradient(model.train(), model(**inputs).last_hidden_state.square().sum()).clone()
    model.backbone.gradient_checkpointing_enable()
    again = gradient(model.train(), model(**inputs).last_hidden_state.square().sum())
    torch.testing.assert_close(again, plain)
    model.backbone.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(**inputs)


@pytest.mark.parametrize("family", CONFIGS)
def test_prefix_begun_from_text_is_that_text(family):
    """The keys and values of a text as a prefix: for a causal model, the same as having read the text."""
    backbone = build(family)
    text = torch.randint(5, 61, (3,))
    model = PromptModel(backbone, PromptConfig("prefix", 3, init="text", init_ids=text.tolist())).eval()
    ids = torch.randint(5, 61, (1, 4))
    got = model(input_ids=ids).last_hidden_state
    if family in DECODERS:
        expected = backbone(input_ids=torch.cat([text[None], ids], 1)).last_hidden_state[:, 3:]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    else:
        assert not torch.allclose(got, backbone(input_ids=ids).last_hidden_state)
    assert PromptModel(backbone, PromptConfig("prompt", 7, init="vocabulary")).prompt.weight.shape == (7, 48)


def test_some_layers_only():
    backbone = build("bert")
    one = PromptModel(backbone, PromptConfig("prefix", P, layers=[-1], init_scale=1.0)).eval()
    assert one.prompt.layers == [2]
    inputs = batch()
    hidden = one(**inputs, output_hidden_states=True).hidden_states
    positions = torch.arange(12).expand(4, -1) + P
    plain = backbone(**inputs, position_ids=positions, output_hidden_states=True).hidden_states
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(hidden[2][mask], plain[2][mask])
    assert not torch.allclose(hidden[3][mask], plain[3][mask])


def test_prefix_stays_in_view_of_a_long_text_unless_told():
    inputs = batch(lengths=(30,))
    outputs = []
    for in_window in (False, True):
        torch.manual_seed(1)
        model = model_of("gemma3_text", "prefix", layers=[0], prefix_in_window=in_window)
        model.prompt.weight.data.normal_()
        outputs.append(gradient(model, model(**inputs).last_hidden_state[:, 9].sum()).abs().sum())
    assert outputs[0] > 0  # row 9 sees the prefix of a sliding layer of window 8,
    assert outputs[1] != outputs[0]  # and PEFT's way only through the rows before it


def test_attention_dropout():
    """Attention weights are dropped in training, and the gradient is finite."""
    model = PromptModel(build("bert", attention_probs_dropout_prob=0.3), PromptConfig("prefix", P)).train()
    inputs = batch()
    first, second = (model(**inputs).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)
    assert gradient(model, first.sum()).isfinite().all()


def test_position_offset_none():
    backbone = build("bert")
    model = PromptModel(backbone, PromptConfig("prefix", P, layers=[2], position_offset="none")).eval()
    inputs = batch()
    mask = inputs["attention_mask"].bool()
    ours = model(**inputs, output_hidden_states=True).hidden_states[2]
    plain = backbone(**inputs, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(ours[mask], plain[mask])


def test_backbone_runs_as_before_without_the_prompt():
    backbone = build("gemma3_text")
    inputs = batch()
    before = backbone(**inputs).last_hidden_state
    PromptModel(backbone, PromptConfig("prompt", P)).eval()(**inputs)
    # Gemma's own norm is float32 whatever the dtype; the fused one is not.
    torch.testing.assert_close(backbone(**inputs).last_hidden_state, before, rtol=1e-6, atol=1e-6)


def test_an_empty_sentence_and_embeddings_as_input():
    for kind in ("prefix", "prompt"):
        model = model_of("xlm-roberta", kind)
        inputs = batch(lengths=(3, 0, 2))
        embeddings = model.backbone.embeddings.word_embeddings(inputs["input_ids"])
        by_ids = model(**inputs).last_hidden_state
        by_embeddings = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).last_hidden_state
        torch.testing.assert_close(by_embeddings, by_ids)
        assert not by_ids[1].any()


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", CONFIGS)
def test_bfloat16_backbone_with_a_float32_prompt(family, kind):
    exact = model_of(family, kind)
    half = PromptModel(build(family, dtype=torch.bfloat16), exact.prompt_config).eval()
    half.prompt.load_state_dict(exact.prompt.state_dict())
    assert half.prompt.weight.dtype == torch.float32
    inputs = batch()
    got, expected = half(**inputs).last_hidden_state, exact(**inputs).last_hidden_state
    assert got.dtype == torch.bfloat16
    assert (got - expected).abs().max() < 0.1 * expected.abs().max()
    assert gradient(half, got.float().square().sum()).isfinite().all()


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", CONFIGS)
def test_bfloat16_autocast(family, kind):
    auto = "AutoModelForCausalLM" if family in DECODERS else "AutoModelForSequenceClassification"
    model = PromptModel(build(family, auto, torch.float32), PromptConfig(kind, P, init_scale=1.0)).train()
    inputs = batch()
    labels = torch.tensor([0, 1, 1, 0])
    if family in DECODERS:
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    plain = model(**inputs, labels=labels).loss
    expected = gradient(model, plain).clone()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs, labels=labels).loss
    got = gradient(model, loss)
    assert loss.dtype == torch.float32 and model.prompt.weight.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=0.05, atol=0)
    assert torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), 0) > 0.98
