"""Where checkpoints come from: PEFT's other types and files, the hub, subfolders, models with other tied weights."""

import shutil

import huggingface_hub
import peft
import pytest
import torch
from helpers import batch, build, without_digests
from safetensors.torch import load_file, save_file

from fastprompt import PromptConfig, PromptModel

P, CLM = 5, "AutoModelForCausalLM"
OF_PEFT = {
    "prompt": peft.PromptTuningConfig,
    "cartridge": lambda **given: peft.CartridgeConfig(num_frozen_tokens=2, **given),
    "cpt": lambda task_type, num_virtual_tokens: peft.CPTConfig(
        task_type=task_type, cpt_token_ids=list(range(7, 7 + num_virtual_tokens)), cpt_tokens_type_mask=[2] * P
    ),
}


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("kind", OF_PEFT)
def test_what_peft_wrote_of_other_types(kind, safe, tmp_path):
    """In either kind of file; what goes on training in PEFT alone does not here."""
    theirs = peft.get_peft_model(build("llama", CLM), OF_PEFT[kind](task_type="CAUSAL_LM", num_virtual_tokens=P))
    for parameter in theirs.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs.double().eval().save_pretrained(tmp_path, safe_serialization=safe)
    assert (tmp_path / f"adapter_model.{'safetensors' if safe else 'bin'}").is_file()
    ours, inputs = PromptModel.from_pretrained(build("llama", CLM), tmp_path).eval(), batch()
    mask = inputs["attention_mask"].bool()
    expected = theirs(**inputs).logits[:, -mask.shape[1] :][mask]
    torch.testing.assert_close(ours(**inputs).logits[mask], expected, rtol=1e-5, atol=1e-5)
    if kind != "prompt":
        with pytest.raises(ValueError, match="trainable must be False .*: a CARTRIDGE with num_frozen_tokens, or CPT"):
            PromptModel.from_pretrained(build("llama", CLM), tmp_path, trainable=True)


def test_a_pickled_file_that_is_none(tmp_path):
    config = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=P)
    peft.get_peft_model(build("bert"), config).save_pretrained(tmp_path, safe_serialization=False)
    file = tmp_path / "adapter_model.bin"
    good = file.read_bytes()

    class Code:
        def __reduce__(self):
            return print, ("code in a file was run",)

    torch.save({"prompt_embeddings": Code()}, file)
    bad = [file.read_bytes(), b"", b"version https://git-lfs.github.com/spec/v1\n", good[: len(good) // 2]]
    torch.save([torch.ones(2)], file)
    for content in (*bad, file.read_bytes()):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"adapter_model.bin is damaged, or holds something else than") as told:
            PromptModel.from_pretrained(build("bert"), tmp_path)
        assert "\n" not in str(told.value)


def on_the_hub(folder, cache, name: str) -> None:
    """A folder as huggingface_hub keeps what it has downloaded."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))


def test_from_the_hub_and_from_subfolders(tmp_path, monkeypatch):
    ours = PromptModel(build("bert"), PromptConfig("prefix", P, init_scale=1.0)).eval()
    ours.add_prompt("cy")
    ours.save_pretrained(tmp_path / "files" / "run" / "best")
    on_the_hub(tmp_path / "files", tmp_path / "cache", "someone/prompts")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    wanted, download = [], huggingface_hub.snapshot_download
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: wanted.extend(k["allow_patterns"]) or download(*a, **k)
    )
    inputs, ids = batch(), torch.tensor([0, 1, 1, 0])
    expected = ours(**inputs, prompt_ids=ids).last_hidden_state
    for place, inside in ((tmp_path / "files", "run/best"), ("someone/prompts", "run/best")):
        model = PromptModel.from_pretrained(build("bert"), place, subfolder=inside).eval()
        assert torch.equal(model(**inputs, prompt_ids=ids).last_hidden_state, expected)
        model.load_prompt("again", place, subfolder=f"{inside}/cy")
        assert torch.equal(model.other_prompts["again"].weight, ours.other_prompts["cy"].weight)
    assert set(wanted) > {"run/best/adapter_config.json", "run/best/cy/adapter_model.bin"}
    with pytest.raises(FileNotFoundError, match="must hold adapter_config.json, which is not in .*prompts.*/run$"):
        PromptModel.from_pretrained(build("bert"), "someone/prompts", subfolder="run")
    for name in ("someone/else", "a/folder/that is not there"):
        message = f"directory must be a folder, or the id of a repository on the hub, got '{name}': "
        with pytest.raises(FileNotFoundError, match=message):
            PromptModel.from_pretrained(build("bert"), name)


def test_tied_weights_that_differ_in_a_file(tmp_path):
    """Written by a model whose weights are two, they do not go into one of which the other would be lost."""
    ours = PromptModel(build("llama", CLM, tie_word_embeddings=False), PromptConfig("prefix", P))
    for embedding in (ours.backbone.get_input_embeddings(), ours.backbone.get_output_embeddings()):
        embedding.requires_grad_(True)
    ours.save_pretrained(tmp_path / "apart")
    message = "model.embed_tokens.weight in .* must be equal: the backbone has one weight for both"
    with pytest.raises(ValueError, match=message):
        PromptModel.from_pretrained(build("llama", CLM, tie_word_embeddings=True), tmp_path / "apart")
    file = tmp_path / "apart" / "adapter_model.safetensors"
    without_digests(tmp_path / "apart")
    tensors = load_file(file)
    for name in ("base_model.lm_head.weight", "base_model.model.embed_tokens.weight"):  # by either name
        save_file({key: tensors[key] for key in ("prompt_embeddings", name)}, file)
        again = PromptModel.from_pretrained(build("llama", CLM, tie_word_embeddings=True), tmp_path / "apart")
        assert torch.equal(again.backbone.lm_head.weight, tensors[name])
        assert torch.equal(again.backbone.model.embed_tokens.weight, tensors[name])
