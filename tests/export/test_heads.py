"""A tagger's head is one of transformers', in plain models and beside PEFT's prompts and LoRA."""

import peft
import pytest
import torch
import transformers
from helpers import batch

from fastprompt import tasks
from fastprompt._files import read_tensors
from fastprompt.export import export

TAGS = ["O", "B-X", "I-X"]
TAGGER = "AutoModelForTokenClassification"


@pytest.mark.parametrize(
    ("family", "method", "to"),
    [
        ("bert", "full", "merged"),
        ("llama", "lora", "merged"),
        ("xlm-roberta", "head", "merged"),
        ("bert", "prefix", "peft"),
        ("llama", "prefix", "peft"),
        ("xlm-roberta", "lora", "peft"),
    ],
)
def test_a_tagger(family, method, to, learner, tmp_path):
    options = {"auto": "AutoModelForCausalLM"} if family == "llama" else {}
    made, inputs = learner(family, method, task=tasks.get("tagging", tags=TAGS), **options), batch((5, 5))
    with torch.no_grad():
        expected = made.task.head(made.hidden(**inputs))
    export(made, to, tmp_path / "out")
    place = tmp_path / "out" if to == "merged" else made.place
    more = {} if to == "merged" else {"num_labels": len(TAGS)}
    model = transformers.AutoModelForTokenClassification.from_pretrained(place, dtype=torch.float64, **more).eval()
    if to == "merged":
        assert model.config.id2label == dict(enumerate(TAGS)) and model.config.label2id["I-X"] == 2
    else:
        model = peft.PeftModel.from_pretrained(model, tmp_path / "out")
        assert model.peft_config["default"].task_type == "TOKEN_CLS"
    with torch.no_grad():
        got = model(**inputs).logits
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    beside = read_tensors(tmp_path / "out/fastprompt_head.safetensors").tensors
    assert list(beside) == ["projection.weight"]
    card = (tmp_path / "out/README.md").read_text()
    assert f"transformers.{TAGGER}.from_pretrained(" in card and "pipeline_tag: token-classification" in card
    assert (", num_labels=3)" in card) == (to == "peft")
