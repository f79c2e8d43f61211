"""A backbone is loaded whole, with the head it should have, or there is one clear error."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from encoder_decoders import CONFIGS as ENCODER_DECODERS
from helpers import save_backbone
from safetensors.torch import load_file, save_file

from fastprompt.models import load
from fastprompt.models.load import find_device, load_backbone


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of an encoder, a decoder with its head, one without, and an encoder-decoder."""
    root = tmp_path_factory.mktemp("backbones")
    made = {
        "encoder": save_backbone("bert", root / "encoder"),
        "decoder": save_backbone("llama", root / "decoder", "AutoModelForCausalLM", tie_word_embeddings=False),
        "headless": save_backbone("llama", root / "headless"),
        "both": root / "both",
    }
    transformers.T5ForConditionalGeneration(ENCODER_DECODERS["t5"]).save_pretrained(made["both"])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(made["encoder"] / file, made["both"])
    return {name: str(folder) for name, folder in made.items()}


@pytest.mark.parametrize(
    ("name", "head", "expected"),
    [
        ("encoder", "auto", "BertModel"),
        ("decoder", "auto", "LlamaForCausalLM"),
        ("decoder", "none", "LlamaModel"),
        ("headless", "auto", "LlamaModel"),
        ("both", "auto", "T5ForConditionalGeneration"),
        ("both", "none", "T5Model"),
    ],
)
def test_it_has_the_head_it_should(folders, name, head, expected, caplog):
    model, tokenizer = load_backbone(folders[name], "cpu", head=head)
    assert (type(model).__name__, model.training, model.dtype) == (expected, False, torch.float32)
    assert tokenizer("w1 w2")["input_ids"] == [0, 6, 7, 2]
    assert getattr(model, "pooler", None) is None
    assert not caplog.records  # the weights of a head or a pooler that is left behind are nothing to report


def test_dtype_and_device(folders):
    bf16 = load_backbone(folders["encoder"], dtype="bfloat16")[0]
    assert bf16.dtype == torch.bfloat16
    assert bf16.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert load_backbone(folders["encoder"], torch.device("cpu"), dtype="auto")[0].dtype == torch.float32
    for name in ("cuda:99", "cudaa", 5.0):
        with pytest.raises(ValueError, match=r"^device must be one that is here, .*got '?(cuda:99|cudaa|5.0)'?: .*$"):
            find_device(name)


@pytest.mark.parametrize(
    "change", [{"dtype": "fp32"}, {"head": "causal"}, {"quantization": "2bit"}, {"device": "nowhere"}]
)
def test_arguments(folders, change):
    ((argument, value),) = change.items()
    with pytest.raises(ValueError, match=f"^{argument} must be one .*, got '{value}'"):
        load_backbone(folders["encoder"], **change)


def test_quantization(folders, monkeypatch):
    """What is handed to transformers; bitsandbytes itself is a stub, and says itself where it has no device."""
    with pytest.raises(ImportError, match=r"bitsandbytes is needed here: pip install 'fastprompt\[quantization\]'"):
        load_backbone(folders["decoder"], quantization="8bit")
    monkeypatch.setattr(load, "require", lambda module, extra: transformers)
    real, seen = transformers.AutoModelForCausalLM.from_pretrained, []

    def stub(name, *, quantization_config, device_map, **options):
        seen.append((quantization_config, device_map))
        model, found = real(name, **options)
        model.to = None  # bitsandbytes' weights may not be moved
        return model, found

    monkeypatch.setattr(transformers, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=stub))
    load_backbone(folders["decoder"], "cpu", quantization="8bit")
    load_backbone(folders["decoder"], "cpu", quantization="4bit", dtype="bfloat16")
    (eight, place), (four, _) = seen
    assert (eight.load_in_8bit, eight.load_in_4bit, place) == (True, False, {"": torch.device("cpu")})
    assert (four.load_in_4bit, four.bnb_4bit_quant_type, four.bnb_4bit_compute_dtype) == (True, "nf4", torch.bfloat16)

    def without_device(name, **options):
        raise RuntimeError("None of the available devices\nare supported")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", without_device)
    with pytest.raises(ValueError, match="None of the available devices are supported$"):
        load_backbone(folders["decoder"], quantization="8bit")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("encoder.layer.1.output.dense.weight"), "lacks weights .*: encoder.layer.1.output.dense"),
        (lambda w: w.update({"encoder.layer.7.extra": torch.ones(1)}), "without a place: encoder.layer.7.extra$"),
        (
            lambda w: w.update({"encoder.layer.1.output.dense.bias": torch.ones(3)}),
            r"another shape .*dense.bias is \(3,\), not \(48,\)$",
        ),
        (lambda w: w.update({"cls.predictions.bias": torch.ones(3), "embeddings.position_ids": torch.ones(1)}), None),
    ],
)
def test_it_must_be_whole(folders, tmp_path, change, message):
    """What a head left behind is not asked for."""
    file = shutil.copytree(folders["encoder"], tmp_path / "backbone") / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})
    if message is None:
        load_backbone(str(file.parent))
        return
    with pytest.raises(ValueError, match=f"backbone '.*backbone' .*{message}"):
        load_backbone(str(file.parent))


def test_it_must_have_its_head(folders, tmp_path):
    file = shutil.copytree(folders["decoder"], tmp_path / "backbone") / "model.safetensors"
    weights = load_file(file)
    weights.pop("lm_head.weight")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights of its configuration: lm_head.weight"):
        load_backbone(str(file.parent))
    assert load_backbone(str(file.parent), head="none")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", "config.json.*not a valid JSON file"),
        ("config.json", '{"model_type": "no"}', "config.json.*`no`"),
        ("config.json", '{"model_type": "llama", "hidden_size": "wide"}', "config.json.*expected int"),
        ("config.json", '{"model_type": "no", "auto_map": {"AutoConfig": "x.Y"}}', "custom code"),
        ("config.json", None, "config.json.*model_type"),
        ("tokenizer.json", "[]", r"\(tokenizer\)"),
        ("tokenizer_config.json", "[]", r"\(tokenizer\)"),
        ("tokenizer.json", None, r"\(tokenizer\)"),
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1", r"is damaged.*\(weights\)"),
        ("model.safetensors", None, r"\(weights\)"),
    ],
)
def test_a_broken_file_is_told_in_one_line(folders, tmp_path, file, text, message):
    folder = shutil.copytree(folders["decoder"], tmp_path / "backbone")
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    with pytest.raises(ValueError, match=f"^backbone '.*backbone' .*{message}.*$"):  # . is no line break
        load_backbone(str(folder))


def test_no_such_folder_and_no_tokenizer(folders, tmp_path):
    with pytest.raises(ValueError, match="^backbone '.*' must be a model's folder or its name on the hub .*$"):
        load_backbone(str(tmp_path / "nothing"))
    folder = shutil.copytree(folders["encoder"], tmp_path / "bare")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="^backbone '.*bare' .*tokenizer.*$"):  # transformers makes an empty one
        load_backbone(str(folder))


def test_a_tokenizer_may_lack_special_tokens(folders, tmp_path):
    folder = shutil.copytree(folders["decoder"], tmp_path / "backbone")
    about = json.loads((folder / "tokenizer_config.json").read_text())
    about.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    _, tokenizer = load_backbone(str(folder))
    assert tokenizer.pad_token_id is None
