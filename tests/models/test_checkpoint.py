"""Checkpoints are PEFT's: what either wrote, the other loads, with equal outputs."""

import json
import random
import shutil

import peft
import pytest
import torch
import transformers
from helpers import CONFIGS, batch, build, without_digests
from safetensors.torch import load_file, save_file

from fastprompt import PromptConfig, PromptModel
from fastprompt._files import write_json

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
    if "init" not in settings:  # PEFT has no such thing, and must not put it into other layers, or elsewhere
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
    without_digests(tmp_path)
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


CLM = "AutoModelForCausalLM"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_added_tokens_are_saved(family, tied, tmp_path):
    """With the prompt, and once where they are tied; what either of the two libraries wrote, the other loads."""
    build(family, CLM, torch.float32, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")

    def grown(fill=None):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(64, mean_resizing=False)
        if fill is not None:
            for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
                torch.nn.init.normal_(embedding.weight.data[61:], std=fill)
        return model.eval()

    inputs = {"input_ids": torch.tensor([[61, 7, 62, 63]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    ours = PromptModel(grown(0.5), PromptConfig("prompt", P, prefix_in_window=True)).eval()
    ours.save_pretrained(tmp_path / "ours")
    expected = ours(**inputs).logits
    written = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert len(written) == (2 if tied else 3)
    again = PromptModel.from_pretrained(grown(), tmp_path / "ours").eval()
    assert torch.equal(again(**inputs).logits, expected)
    again.save_pretrained(tmp_path / "again")
    again.add_prompt("cy")
    again.save_pretrained(tmp_path / "two")
    for name in ("again", "two"):
        model = PromptModel.from_pretrained(grown(), tmp_path / name).eval()
        assert torch.equal(model(**inputs).logits, expected)
    theirs = peft.PeftModel.from_pretrained(grown(), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(**inputs).logits[:, P:], expected, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PromptModel.from_pretrained(grown(), tmp_path / "theirs").eval()
    torch.testing.assert_close(ours(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    plain = PromptModel(grown(0.1), PromptConfig("prompt", P))
    with pytest.raises(ValueError, match="weight beside the prompt .* must be the model's"):
        plain.load_prompt("cy", tmp_path / "ours")
    unlike = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"weight .* must fit the backbone: \(61, 48\), got \(64, 48\)"):
        PromptModel.from_pretrained(unlike, tmp_path / "ours")


@pytest.mark.parametrize("family", CONFIGS)
def test_whatever_else_trains_is_saved(family, tmp_path):
    """And what was loaded, again, and buffers; what stays as it was is not."""
    ours = PromptModel(build(family, dtype=torch.float32), PromptConfig("prefix", P, prefix_in_window=True)).eval()
    norms = [name for name, _ in ours.backbone.named_parameters() if "norm" in name.lower()]
    for name in norms:
        ours.backbone.get_parameter(name).requires_grad_(True).data.normal_(1, 0.3)
    ours.backbone.register_buffer("counted", torch.tensor([3.0]))
    ours.save_pretrained(tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert set(written) == {"prompt_embeddings", *(f"base_model.{name}" for name in (*norms, "counted"))}
    inputs = batch()
    mask, expected = inputs["attention_mask"].bool(), ours(**inputs).last_hidden_state

    def fresh():
        model = build(family, dtype=torch.float32)
        model.register_buffer("counted", torch.zeros(1))
        return model

    again = PromptModel.from_pretrained(fresh(), tmp_path / "ours").eval()
    assert float(again.backbone.counted) == 3.0
    again.save_pretrained(tmp_path / "again")
    again = PromptModel.from_pretrained(fresh(), tmp_path / "again").eval()
    # Not equal: norms that do not train have a fused forward.
    torch.testing.assert_close(again(**inputs).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    theirs = peft.PeftModel.from_pretrained(fresh(), tmp_path / "again").eval()(**inputs).last_hidden_state
    torch.testing.assert_close(theirs[:, -mask.shape[1] :][mask], expected[mask], rtol=1e-4, atol=1e-4)


def test_a_base_that_is_gone_is_told(tmp_path):
    build("bert", dtype=torch.float32).save_pretrained(tmp_path / "base")
    model = PromptModel(transformers.AutoModel.from_pretrained(tmp_path / "base"), PromptConfig("prefix", P))
    model.save_pretrained(tmp_path / "fine")
    assert set(load_file(tmp_path / "fine" / "adapter_model.safetensors")) == {"prompt_embeddings"}
    shutil.rmtree(tmp_path / "base")
    with pytest.warns(UserWarning, match="base', .* has no configuration any more: .* what was added is not saved"):
        model.save_pretrained(tmp_path / "run")


@pytest.mark.parametrize("digests", [True, False], ids=["", "an older file of ours"])
def test_peft_saved_over_ours(digests, tmp_path, caplog):
    """What stays of ours belongs to nothing there, and is not used: its settings, encoder, adapters, other prompts."""
    settings = dict(position_offset="none", encoder="mlp", adapter_size=3)
    ours = PromptModel(build("llama", CLM), PromptConfig("prefix", P, **settings))
    ours.add_prompt("cy")
    ours.save_pretrained(tmp_path)
    own = tmp_path / "fastprompt_config.json"
    if not digests:
        without_digests(tmp_path)
        assert PromptModel.from_pretrained(build("llama", CLM), tmp_path).prompt_config.position_offset == "none"
    made = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    theirs = peft.get_peft_model(build("llama", CLM), made).double().eval()
    theirs.save_pretrained(tmp_path)
    got = PromptModel.from_pretrained(build("llama", CLM), tmp_path).eval()
    assert "PEFT has saved over what it belongs to" in caplog.text
    assert got.prompt_config == PromptConfig("prefix", P, prefix_in_window=True)
    assert got.adapters is None and got.prompt_names == ("default",)
    inputs = batch()
    keep = inputs["attention_mask"].bool()
    torch.testing.assert_close(got(**inputs).logits[keep], theirs(**inputs).logits[keep], rtol=1e-4, atol=1e-5)
    assert own.is_file()


def test_files_of_two_saves_are_told(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        backbone, config = build("bert"), PromptConfig("prefix", P, encoder="mlp", adapter_size=3)
        torch.manual_seed(seed)
        model = PromptModel(backbone, config)
        for parameter in model.adapters.parameters():
            parameter.data.normal_()
        model.save_pretrained(tmp_path / name)
    for name in ("adapter_model", "adapters", "encoder"):
        kept = (tmp_path / "a" / f"{name}.safetensors").read_bytes()
        shutil.copy(tmp_path / "b" / f"{name}.safetensors", tmp_path / "a")
        with pytest.raises(ValueError, match=f"{name}.safetensors in .* is not the one that fastprompt_config"):
            PromptModel.from_pretrained(build("bert"), tmp_path / "a", trainable=True)
        (tmp_path / "a" / f"{name}.safetensors").write_bytes(kept)
    PromptModel.from_pretrained(build("bert"), tmp_path / "a", trainable=True)


def test_a_file_of_a_later_version(tmp_path, caplog):
    PromptModel(build("bert"), PromptConfig("prefix", P)).save_pretrained(tmp_path)
    file = tmp_path / "fastprompt_config.json"
    about = json.loads(file.read_text())
    later = {name: value for name, value in about.items() if name != "checksum"} | {"from_the_future": 1, "more": None}
    write_json(file, later)
    got = PromptModel.from_pretrained(build("bert"), tmp_path)
    assert got.prompt_config == PromptConfig("prefix", P)
    assert "fastprompt_config.json: from_the_future, more is passed over: a newer version" in caplog.text
    file.write_text(json.dumps(about | {"num_virtual_tokens": P + 1}))
    with pytest.raises(ValueError, match="fastprompt_config.json is damaged: its checksum"):
        PromptModel.from_pretrained(build("bert"), tmp_path)


def test_a_flipped_bit_is_told_or_changes_nothing(tmp_path):
    config = PromptConfig("prefix", 2, layers=[0, 2], encoder="mlp", encoder_hidden_size=4, adapter_size=2, dropout=0.1)
    made = PromptModel(build("bert", dtype=torch.float32), config)
    made.save_pretrained(tmp_path)
    backbone, told = build("bert", dtype=torch.float32), 0
    for file in sorted(tmp_path.iterdir()):
        good = file.read_bytes()
        for place in random.sample(range(8 * len(good)), 25):
            bad = bytearray(good)
            bad[place // 8] ^= 1 << place % 8
            file.write_bytes(bad)
            try:
                got = PromptModel.from_pretrained(backbone, tmp_path, trainable=True)
            except ValueError as error:
                assert file.name in str(error)
                told += 1
                continue
            assert got.prompt_config == made.prompt_config
            assert all(torch.equal(got.state_dict()[name], tensor) for name, tensor in made.state_dict().items())
        file.write_bytes(good)
    assert told > 70


@pytest.mark.parametrize("bad", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"half"])
def test_what_is_no_such_file_is_told_by_its_name(bad, tmp_path):
    PromptModel(build("bert"), PromptConfig("prefix", P)).save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        good = file.read_bytes()
        file.write_bytes(good[: len(good) // 2] if bad == b"half" else bad)
        with pytest.raises(ValueError, match=rf"{file.name} is damaged") as told:
            PromptModel.from_pretrained(build("bert"), tmp_path)
        assert "\n" not in str(told.value)
        file.write_bytes(good)
