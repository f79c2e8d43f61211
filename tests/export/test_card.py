"""Cards, the folder that is written, and the way to the Hub."""

from types import SimpleNamespace

import huggingface_hub
import pytest
from stand_in import P
from torch import nn

from fastprompt._card import card
from fastprompt.export import FORMS, export, push_to_hub
from fastprompt.models.methods import AdapterConfig
from fastprompt.tasks.base import InputConfig
from fastprompt.training.alignment import AlignmentConfig


def info(**other) -> SimpleNamespace:
    about = {
        "backbone": {"name": "intfloat/multilingual-e5-small", "dtype": "float32", "quantization": None},
        "adapter": AdapterConfig("prefix", 16, layers=[0, -1]),
        "inputs": InputConfig("query: "),
        "task": {"name": "tagging", "settings": {}},
        "alignment": AlignmentConfig(weight=0.5),
        "arguments": {"max_steps": 100},
        "data": {"train": "owner/name", "pairs": "/home/someone/private/pairs.tsv", "split": None},
        "counts": {"pairs": 1200},
        "language": "gd",
    }
    return SimpleNamespace(**about | other)


@pytest.mark.parametrize("form", ["run", *FORMS])
def test_a_card_says_what_it_was_and_how_to_load_it(form):
    made = huggingface_hub.ModelCard(card(info(), form, scores={"test": {"f1": 71.2345, "note": "x"}, "f1|en": 80}))
    about = made.data.to_dict()
    assert about["base_model"] == "intfloat/multilingual-e5-small" and about["language"] == "gd"
    assert about["base_model_relation"] == ("finetune" if form in ("tokens", "merged") else "adapter")
    library = {"run": "fastprompt", "tokens": "transformers", "merged": "transformers"}.get(form, form)
    assert about["library_name"] == library and about["tags"] == ["fastprompt", "prefix"] and "license" not in about
    text = made.text
    for part in (
        *("layers | [0, -1]", "prefix_text | query:", "alignment weight | 0.5", "max_steps | 100"),
        *("number of pairs | 1200", "test f1 | 71.23", "train | owner/name", "pairs | pairs.tsv", "f1\\|en | 80"),
    ):
        assert f"| {part} |" in text
    assert "/home/someone" not in text and "{" not in text.replace("{#", "") and "None |" not in text


def test_a_folder_is_no_base_model_of_the_hub(tmp_path):
    made = huggingface_hub.ModelCard(card(info(backbone={"name": str(tmp_path / "own")}, language="zxx-long")))
    assert made.data.base_model is None and "Base model: `own`" in made.text and str(tmp_path) not in made.text


def test_what_is_written_is_whole(learner, tmp_path):
    made = learner("bert", "head")
    made.task = SimpleNamespace(name="tagging", named_parameters=nn.Linear(2, 3).named_parameters)
    (tmp_path / "out").mkdir()
    assert export(made, "merged", str(tmp_path / "out"), info=info(), scores={"f1": 1.5}) == tmp_path / "out"
    text = (tmp_path / "out/README.md").read_text()
    assert "| f1 | 1.5 |" in text and "The task's head and the projection stands in" not in text
    assert "task's head and the projection stand in `fastprompt_head.safetensors`" in text
    for directory in (tmp_path / "out", made.place / "config.json"):
        with pytest.raises(ValueError, match="directory must be new, or empty, got"):
            export(made, "merged", directory)
    with pytest.raises(ValueError, match="to must be one of .*, got 'onnx'"):
        export(made, "onnx", tmp_path / "new")
    with pytest.raises(ValueError, match="copy_backbone is for"):
        export(made, "merged", tmp_path / "new", copy_backbone=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_what_else_trained_is_told():
    text = card(info(adapter=AdapterConfig("lora", norms=True, top_layers=2)))
    assert "What trained: LoRA of rank 8 in the frozen model, and the norms, and the last 2 of the layers." in text


def test_a_quantised_backbone(learner, tmp_path, caplog):
    made = learner("bert", "lora")
    made.backbone.hf_quantizer = object()
    with pytest.raises(ValueError, match="'merged' needs a backbone that is not quantised"):
        export(made, "merged", tmp_path / "out")
    export(made, "peft", tmp_path / "out")
    assert "the backbone was quantised in this run" in caplog.text


def test_the_hub(learner, tmp_path, monkeypatch):
    calls = []

    class Hub:
        def __init__(self, token=None):
            calls.append(token)

        def create_repo(self, repo_id, private=None, exist_ok=False):
            calls.append((repo_id, private, exist_ok))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append((repo_id, folder_path))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    with pytest.raises(ValueError, match="directory must be one that export wrote, with README.md"):
        push_to_hub(tmp_path, "me/model")
    made = learner("bert", "prefix")
    for form in ("peft", "sentence-transformers"):
        export(made, form, tmp_path / form)
        with pytest.raises(ValueError, match="must not name a folder of this machine as its backbone, got .*base"):
            push_to_hub(tmp_path / form, "me/model")
    export(made, "peft", tmp_path / "out", copy_backbone=True)
    address = push_to_hub(tmp_path / "out", "me/model", private=True, token="secret")
    assert address == "https://huggingface.co/me/model"
    assert calls == ["secret", ("me/model", True, True), ("me/model", str(tmp_path / "out"))]
    assert f"| num_virtual_tokens | {P} |" in (tmp_path / "out/README.md").read_text()
