"""Encoder-decoders, fused and as PromptModel, against PEFT's own forward and generate."""

import copy

import peft
import pytest
import torch
from encoder_decoders import CONFIGS, build_seq2seq, seq2seq_batch
from helpers import PAD, VOCABULARY, build
from transformers.models.mt5.modeling_mt5 import MT5LayerNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.models.umt5.modeling_umt5 import UMT5LayerNorm

import fastprompt
from fastprompt import PromptConfig, PromptModel

P = 3
DEEP = {"num_layers": 4, "encoder_layers": 4}  # transformers' generate wants as many as the decoder's


@pytest.fixture(autouse=True)
def stock_norms(monkeypatch):
    """T5's norms count in float32 whatever the dtype, and ours do not: here none does, and none is replaced."""

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    for norm in (T5LayerNorm, MT5LayerNorm, UMT5LayerNorm):
        monkeypatch.setattr(norm, "forward", forward)


def peft_model(backbone, kind: str, **config):
    made = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig, "p-tuning": peft.PromptEncoderConfig}
    if kind == "p-tuning":
        config["encoder_hidden_size"] = 16
    if kind == "prefix":
        config = {"num_layers": 4} | config  # PEFT takes the encoder's
    config = made[kind](task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, **config)
    model = peft.get_peft_model(backbone, config).to(backbone.dtype)
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter)
    return model.eval()


def gradient(model) -> torch.Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def relative(ours: torch.Tensor, stock: torch.Tensor) -> float:
    ours, stock = ours.detach(), stock.detach()
    return float((ours - stock).abs().max() / stock.abs().max())


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", CONFIGS)
def test_fuse_equals_peft(family, kind):
    stock = peft_model(build_seq2seq(family), kind)
    fused = fastprompt.fuse(copy.deepcopy(stock))
    inputs = seq2seq_batch()
    there = inputs["labels"] != -100
    expected, got = stock(**inputs), fused(**inputs)
    assert relative(got.logits[there], expected.logits[there]) < 1e-7
    expected.loss.backward()
    for training in (False, True):
        fused.train(training).zero_grad()
        got = fused(**inputs)
        assert (got.logits is None) == training
        got.loss.backward()
        assert relative(got.loss, expected.loss) < 1e-7
        assert relative(gradient(fused), gradient(stock)) < 1e-6
    assert all(p.grad is None for p in fused.get_base_model().parameters())


@pytest.mark.parametrize(("family", "sides"), [("t5", 2), ("umt5", 2), ("mbart", 2), ("mbart", 1)])
def test_multitask_prompts_stand_before_both_sides(family, sides):
    """Not of M2M100: PEFT hands it labels and embeddings, which it refuses."""
    made = peft.MultitaskPromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_tasks=4, num_ranks=2, num_virtual_tokens=P, num_transformer_submodules=sides
    )
    stock = peft.get_peft_model(build_seq2seq(family), made).double().eval()
    for parameter in stock.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter)
    fused = fastprompt.fuse(copy.deepcopy(stock))
    inputs = seq2seq_batch() | {"task_ids": torch.tensor([2, 0, 2, 3])}
    there = inputs["labels"] != -100
    expected = stock(**inputs, output_hidden_states=True)
    got = fused(**inputs, output_hidden_states=True)
    length = inputs["labels"].shape[1]
    assert relative(got.logits[there], expected.logits[:, -length:][there]) < 1e-7
    for ours, theirs in zip(got.decoder_hidden_states, expected.decoder_hidden_states, strict=True):
        assert relative(ours[there], theirs[:, -length:][there]) < 1e-7
    expected.loss.backward()
    for training in (False, True):
        fused.train(training).zero_grad()
        got = fused(**inputs)
        got.loss.backward()
        assert relative(got.loss, expected.loss) < 1e-7
        assert relative(gradient(fused), gradient(stock)) < 1e-6
    alone = {name: value[1:2] for name, value in inputs.items()}  # of one task
    assert relative(fused.eval()(**alone).logits[0], fused(**inputs).logits[1]) < 1e-7


@pytest.mark.parametrize("family", ["t5", "mt5", "umt5"])
def test_fused_norms(family, monkeypatch):
    monkeypatch.undo()
    stock = peft_model(build_seq2seq(family), "prefix")
    fused = fastprompt.fuse(copy.deepcopy(stock))
    assert any("Fused" in type(module).__name__ and "Norm" in type(module).__name__ for module in fused.modules())
    inputs = seq2seq_batch()
    assert relative(fused(**inputs).logits, stock(**inputs).logits) < 1e-4


@pytest.mark.parametrize("family", ["bart", "mt5"])
def test_fuse_keeps_pefts_generate_and_encoders(family):
    stock = peft_model(build_seq2seq(family, **DEEP), "p-tuning").train()
    fused = fastprompt.fuse(copy.deepcopy(stock))
    inputs = seq2seq_batch()
    for model in (stock, fused):
        model(**inputs).loss.backward()
    assert relative(gradient(fused), gradient(stock)) < 1e-6
    del inputs["labels"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(fused.eval().generate(**inputs, **options), stock.eval().generate(**inputs, **options))


@pytest.mark.parametrize("family", ["bart", "m2m_100", "t5"])
def test_left_padding_checkpointing_and_decoder_inputs(family):
    """Padding on either side, layers run again, and what the decoder reads given as ids or embeddings are all alike."""
    model = fastprompt.fuse(peft_model(build_seq2seq(family), "prefix"))
    torch.manual_seed(1)
    inputs = seq2seq_batch()
    expected = model(**inputs, output_hidden_states=True)
    expected.loss.backward()
    gradients = gradient(model)
    torch.manual_seed(1)
    left = seq2seq_batch("left") | {"labels": inputs["labels"]}
    assert relative(model(**left).logits, expected.logits) < 1e-12
    labels = inputs.pop("labels")
    base = model.get_base_model()
    shift = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    ids = shift(labels) if shift else torch.cat([torch.full((4, 1), 2), labels[:, :-1]], 1).clamp(min=1)
    mask = (labels != -100).long()
    got = model(**inputs, decoder_input_ids=ids, decoder_attention_mask=mask)
    assert got.loss is None and relative(got.logits[mask == 1], expected.logits[mask == 1]) < 1e-12
    assert not got.logits[mask == 0].any()
    embeds = base.get_decoder().embed_tokens(ids)
    got = model(**inputs, decoder_inputs_embeds=embeds, decoder_attention_mask=mask)
    assert relative(got.logits[mask == 1], expected.logits[mask == 1]) < 1e-12
    assert expected.encoder_last_hidden_state.shape == (4, 12, 24)
    assert [x.shape for x in expected.decoder_hidden_states] == [(4, 8, 24)] * 5
    model.train().zero_grad()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    model(**inputs, labels=labels).loss.backward()
    assert relative(gradient(model), gradients) < 1e-6


def test_padding_that_is_read_keeps_the_positions_of_m2m_100():
    """Without a mask padding is attended to, at position 0, and what follows it is not counted on."""
    stock = peft_model(build_seq2seq("m2m_100"), "prefix")
    fused = fastprompt.fuse(copy.deepcopy(stock))
    inputs = seq2seq_batch()
    del inputs["attention_mask"]
    inputs["labels"][1, 2] = -100  # a hole, read as padding
    assert relative(fused(**inputs).logits, stock(**inputs).logits) < 1e-7
    assert relative(fused.train()(**inputs).loss, stock(**inputs).loss) < 1e-7


@pytest.mark.parametrize(("family", "kind"), [("t5", "prompt"), ("mt5", "prefix"), ("umt5", "prompt")])
def test_gaps_within_a_text_are_counted(family, kind):
    """As PEFT's own forward counts them; and the padding on the left is none of them."""
    stock = peft_model(build_seq2seq(family), kind)
    fused = fastprompt.fuse(copy.deepcopy(stock))
    inputs = seq2seq_batch()
    for row, place in ((0, slice(2, 4)), (2, slice(1, 2)), (3, slice(3, 4))):
        inputs["attention_mask"][row, place] = 0
    there, text = inputs["labels"] != -100, inputs["attention_mask"].bool()
    expected, got = (model(**inputs, output_hidden_states=True) for model in (stock, fused))
    assert relative(got.logits[there], expected.logits[there]) < 1e-7
    for ours, theirs in zip(got.encoder_hidden_states, expected.encoder_hidden_states, strict=True):
        assert relative(ours[text], theirs[:, -text.shape[1] :][text]) < 1e-7
    for output in (expected, fused.train()(**inputs)):
        output.loss.backward()
    assert relative(gradient(fused), gradient(stock)) < 1e-6
    longest = inputs["attention_mask"].shape[1]
    for name in ("input_ids", "attention_mask"):
        lengths = (7, 1, 12, 5)
        inputs[name] = torch.stack([x.roll(longest - n) for x, n in zip(inputs[name], lengths, strict=True)])
    assert relative(fused.eval()(**inputs).logits, got.logits) < 1e-7


def test_num_items_in_batch_and_label_smoothing():
    fused = fastprompt.fuse(peft_model(build_seq2seq("t5"), "prompt")).train()
    inputs, labels = seq2seq_batch(), 18
    plain = fused(**inputs).loss
    assert relative(fused(**inputs, num_items_in_batch=9).loss, plain * labels / 9) < 1e-12
    logits = fused(**inputs, return_logits=True).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, inputs["labels"].flatten(), label_smoothing=0.2)
    assert relative(fused(**inputs, label_smoothing=0.2).loss, expected) < 1e-12


def test_what_is_not_served_is_refused():
    backbone = build_seq2seq("t5")
    with pytest.raises(ValueError, match=r"num_layers of a prefix must be at least the decoder's 4, got 3"):
        fastprompt.fuse(peft_model(copy.deepcopy(backbone), "prefix", num_layers=3))
    with pytest.raises(ValueError, match=r"num_transformer_submodules .* must be 2.* got 1"):
        fastprompt.fuse(peft_model(copy.deepcopy(backbone), "prefix", num_transformer_submodules=1))
    with pytest.raises(ValueError, match=r"sequence-to-sequence language model with its head, got T5Model"):
        fastprompt.PromptModel(build_seq2seq("t5", auto="AutoModel"), fastprompt.PromptConfig())
    model = fastprompt.fuse(peft_model(backbone, "prefix"))
    inputs = seq2seq_batch()
    for name, value, message in (
        ("encoder_outputs", (torch.zeros(4, 12, 24),), "encoder_outputs must not be given"),
        ("position_ids", torch.zeros(4, 12), "position_ids must not be given"),
        ("output_attentions", True, "output_attentions must not be given"),
        ("labels", None, "labels, decoder_input_ids or decoder_inputs_embeds must be given"),
        ("labels", inputs["labels"][:3], "must have 4 rows"),
        ("decoder_attention_mask", torch.zeros(4, 7), r"decoder_attention_mask must be \(4, 8\)"),
        ("decoder_attention_mask", torch.zeros(4, 8), "labels must be -100 where decoder_attention_mask is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs | {name: value})
    gaps = {
        "decoder_input_ids": torch.ones(4, 8, dtype=torch.long),
        "decoder_attention_mask": torch.tensor([[1, 0] * 4] * 4),
    }
    with pytest.raises(ValueError, match="decoder_attention_mask must have no gaps"):
        model(**inputs | gaps | {"labels": None})
    both = PromptModel(build_seq2seq("t5"), PromptConfig("prefix", P, layers=[0, 5]))
    with pytest.raises(ValueError, match="^attention_mask must have no gaps within a text where the encoder has"):
        both(**inputs | {"attention_mask": torch.tensor([[1, 0] * 6] * 4)})
    model.cuda_graphs = True
    with pytest.raises(ValueError, match="cuda_graphs .* not for encoder-decoders"):
        model(**inputs)


def prompt_model(family: str, **config) -> PromptModel:
    model = PromptModel(build_seq2seq(family, **DEEP), PromptConfig(num_virtual_tokens=P, **config)).eval()
    torch.nn.init.normal_(model.prompt.weight)
    return model.double()


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", ["mbart", "umt5"])
def test_prompt_model_reads_pefts_files_and_generates_as_peft(family, kind, tmp_path):
    stock = peft_model(build_seq2seq(family, **DEEP), kind)
    stock.save_pretrained(tmp_path / "peft")
    model = PromptModel.from_pretrained(build_seq2seq(family, **DEEP), tmp_path / "peft").double().eval()
    inputs = seq2seq_batch()
    expected, got = stock(**inputs), model(**inputs)
    assert relative(got.loss, expected.loss) < 1e-6
    labels = inputs.pop("labels")
    for beams in (1, 2):
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
        assert torch.equal(model.generate(**inputs, **options), stock.generate(**inputs, **options))
    model.save_pretrained(tmp_path / "own")
    again = PromptModel.from_pretrained(build_seq2seq(family, **DEEP), tmp_path / "own").double().eval()
    assert torch.equal(again.prompt.weight, model.prompt.weight)
    if kind == "prompt":
        back = peft.PeftModel.from_pretrained(build_seq2seq(family, **DEEP), tmp_path / "own").double().eval()
        assert relative(back(**inputs, labels=labels).loss, expected.loss) < 1e-6
    else:
        with pytest.raises(Exception, match="FASTPROMPT_PREFIX_OF_ENCODER_DECODER"):
            peft.PeftModel.from_pretrained(build_seq2seq(family, **DEEP), tmp_path / "own")


def test_a_prompt_that_began_here_is_saved_as_pefts(tmp_path):
    """And not only one that PEFT's files made."""
    model = PromptModel(build_seq2seq("umt5", **DEEP), PromptConfig("prompt", P)).double().eval()
    model.save_pretrained(tmp_path)
    again = PromptModel.from_pretrained(build_seq2seq("umt5", **DEEP), tmp_path)
    assert torch.equal(again.prompt.weight.double(), model.prompt.weight)
    back, inputs = peft.PeftModel.from_pretrained(build_seq2seq("umt5", **DEEP), tmp_path).double(), seq2seq_batch()
    assert relative(model(**inputs).loss, back.eval()(**inputs).loss) < 1e-6


LAYERS = {"decoder": None, "both": range(8), "encoder": [4, 6, 7]}


@pytest.mark.parametrize("offset", ["peft", "none"])
@pytest.mark.parametrize("where", LAYERS)
@pytest.mark.parametrize("family", ["bart", "m2m_100", "t5"])
def test_a_prefix_in_the_encoder(family, where, offset):
    """Each layer's has a gradient; two in one batch; greedy generation writes what the forward's logits say."""
    model = prompt_model(family, layers=LAYERS[where], position_offset=offset)
    model.add_prompt("cy")
    torch.nn.init.normal_(model.other_prompts["cy"].double().weight)
    inputs, names = seq2seq_batch(), ["default", "cy", "cy", "default"]
    together = model(**inputs, prompt_ids=names)
    together.loss.backward()
    for prompt in (model.prompt, model.other_prompts["cy"]):
        assert (prompt.weight.grad.unflatten(1, (len(prompt.layers), -1)).abs().amax((0, 2)) > 1e-9).all()
    alone = model(**{name: x[1:2] for name, x in inputs.items()}, prompt_ids=["cy"])
    assert relative(together.logits[1:2], alone.logits) < 1e-12
    assert relative(model(**inputs).logits, together.logits) > 1e-3
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    written = model.generate(**texts, prompt_ids=names, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    logits = model(**texts, prompt_ids=names, decoder_input_ids=written[:, :-1]).logits
    logits[..., 2] = -torch.inf  # no end before the fifth
    assert torch.equal(logits.argmax(-1), written[:, 1:])


@pytest.mark.parametrize("family", ["m2m_100", "t5"])
def test_what_trainers_ask(family):
    """The collator's decoder_input_ids, and the name by which the Trainer knows that labels are not to be shifted."""
    labels = seq2seq_batch()["labels"]
    shifted = prompt_model(family).prepare_decoder_input_ids_from_labels(labels)
    first = torch.full((4, 1), build_seq2seq(family).config.decoder_start_token_id)
    assert torch.equal(shifted, torch.cat([first, labels[:, :-1]], 1).masked_fill(shifted == PAD, PAD))
    backbone = build_seq2seq(family)
    fused = fastprompt.fuse(peft_model(backbone, "prompt"))
    assert fused.base_model.model._get_name() == type(backbone).__name__
    assert not hasattr(PromptModel(build("bert"), PromptConfig()), "prepare_decoder_input_ids_from_labels")


def test_a_bias_of_logits_that_is_loaded_later_counts():
    model = prompt_model("mbart").train()
    inputs = seq2seq_batch()
    before = model(**inputs).loss
    model.backbone.load_state_dict({"final_logits_bias": torch.randn(1, VOCABULARY)}, strict=False)
    after = model(**inputs).loss
    assert relative(after, before) > 1e-3
    assert relative(after, model.eval()(**inputs).loss) < 1e-12
