"""Checkpoints are PEFT's: what either wrote, the other loads, with equal outputs."""

import json

import peft
import pytest
import torch
from helpers import CONFIGS, batch, build
from safetensors.torch import load_file, save_file

from fastprompt import PromptConfig, PromptModel

P = 5
MAKE = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", CONFIGS)
def test_peft_loads_ours(family, kind, tmp_path):
    config = PromptConfig(kind, P, init_scale=1.0, prefix_in_window=True)
    ours = PromptModel(build(family, dtype=torch.float32), config).eval()
    ours.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "fastprompt_config.json",
    }
    theirs = peft.PeftModel.from_pretrained(build(family, dtype=torch.float32), tmp_path).eval()
    inputs = batch()
    mask = inputs["attention_mask"].bool()
    expected = theirs(**inputs).last_hidden_state[:, -mask.shape[1] :]
    torch.testing.assert_close(ours(**inputs).last_hidden_state[mask], expected[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", CONFIGS)
def test_we_load_pefts(family, kind, tmp_path):
    config = MAKE[kind](task_type="FEATURE_EXTRACTION", num_virtual_tokens=P)
    theirs = peft.get_peft_model(build(family, dtype=torch.float32), config).eval()
    theirs.prompt_encoder["default"].embedding.weight.data.normal_()
    theirs.save_pretrained(tmp_path)
    ours = PromptModel.from_pretrained(build(family, dtype=torch.float32), tmp_path).eval()
    assert not any(p.requires_grad for p in ours.parameters())
    inputs = batch()
    mask = inputs["attention_mask"].bool()
    expected = theirs(**inputs).last_hidden_state[:, -mask.shape[1] :]
    torch.testing.assert_close(ours(**inputs).last_hidden_state[mask], expected[mask], rtol=1e-4, atol=1e-5)
    again = PromptModel.from_pretrained(build(family, dtype=torch.float32), tmp_path, trainable=True)
    assert [name for name, p in again.named_parameters() if p.requires_grad] == ["prompt.weight"]


@pytest.mark.parametrize("settings", [{"layers": [0, -1]}, {"position_offset": "none"}, {"init": "vocabulary"}])
def test_everything_comes_back(settings, tmp_path):
    ours = PromptModel(build("bert"), PromptConfig("prefix", P, **settings)).eval()
    ours.save_pretrained(tmp_path)
    again = PromptModel.from_pretrained(build("bert"), tmp_path).eval()
    inputs = batch()
    assert torch.equal(again(**inputs).last_hidden_state, ours(**inputs).last_hidden_state)
    if "layers" in settings:  # PEFT has no such thing, and must not put it into other layers
        with pytest.raises((KeyError, ValueError, TypeError)):
            peft.PeftModel.from_pretrained(build("bert"), tmp_path)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_trained_head_is_kept(family, tmp_path):
    auto = "AutoModelForSequenceClassification"
    ours = PromptModel(build(family, auto, torch.float32), PromptConfig("prefix", P, prefix_in_window=True))
    head = {name: p for name, p in ours.backbone.named_parameters() if p.requires_grad}
    assert head and not any(name.startswith(ours.backbone.base_model_prefix + ".") for name in head)
    for p in head.values():
        p.data.normal_(std=0.1)
    ours.eval().save_pretrained(tmp_path)
    fresh = build(family, auto, torch.float32, seed=0)
    inputs = batch()
    expected = ours(**inputs).logits
    theirs = peft.PeftModel.from_pretrained(build(family, auto, torch.float32, seed=0), tmp_path).eval()
    torch.testing.assert_close(theirs(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    again = PromptModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(again(**inputs).logits, expected)
    again.save_pretrained(tmp_path / "again")  # loaded for inference: the head is still part of it
    twice = PromptModel.from_pretrained(build(family, auto, torch.float32, seed=1), tmp_path / "again")
    for name in head:
        assert torch.equal(twice.head()[name], head[name])


def test_bad_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json, which is not in"):
        PromptModel.from_pretrained(build("bert"), tmp_path)
    PromptModel(build("bert"), PromptConfig("prefix", P)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"prompt_embeddings .*must be \(5, 192\) for this backbone, got \(5, 288\)"):
        PromptModel.from_pretrained(build("bert", num_hidden_layers=2), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"base_model.classifier.weight": torch.zeros(2, 2)}, weights)
    with pytest.raises(ValueError, match=r"classifier.weight .*no such parameter"):
        PromptModel.from_pretrained(build("bert"), tmp_path)
    save_file({"other": torch.zeros(2)}, weights)
    with pytest.raises(ValueError, match=r"must hold 'prompt_embeddings', got \['other'\]"):
        PromptModel.from_pretrained(build("bert"), tmp_path)
    (tmp_path / "fastprompt_config.json").unlink()
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "LORA"}))
    with pytest.raises(ValueError, match=r"peft_type .*got 'LORA'"):
        PromptModel.from_pretrained(build("bert"), tmp_path)


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model = PromptModel(build("bert"), PromptConfig("prefix", P))
    model.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    model.prompt.weight.data.zero_()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
