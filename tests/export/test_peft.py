"""PEFT opens what is exported, and computes the same; what it has nothing of is refused."""

import json
import shutil

import peft
import pytest
import torch
from helpers import batch
from stand_in import load

from fastprompt.export import export

TOLERANCE = dict(rtol=1e-4, atol=1e-5)  # prompts and LoRA are read in float32
CLM = "AutoModelForCausalLM"


def of_text(output, count: int) -> torch.Tensor:
    found = output.logits if "logits" in output else output.last_hidden_state
    return found[:, -count:]


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        ("bert", "prefix", {}),
        ("bert", "prompt", {}),
        ("llama", "prompt", dict(auto=CLM)),
        ("llama", "prefix", dict(auto=CLM, norms=True)),
        ("gemma3_text", "prefix", dict(auto=CLM, max_length=5)),
        ("llama", "lora", dict(auto=CLM)),
        ("xlm-roberta", "lora", {}),
        ("llama", "lora", dict(num_layers=2)),
        ("llama", "prefix", dict(num_layers=2)),
    ],
)
def test_it_computes_the_same(family, method, options, learner, tmp_path):
    made, inputs = learner(family, method, **options), batch((5, 5))
    copied = "num_layers" in options
    export(made, "peft", tmp_path / "out", copy_backbone=copied)
    if copied:
        shutil.rmtree(made.place)
    place = tmp_path / "out/backbone" if copied else made.place
    base = load(place, family, options.get("auto", "AutoModel"))
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    with torch.no_grad():
        expected = made.hidden(**inputs)
        if "auto" in options:
            expected = made.backbone.lm_head(expected)
            cap = made.backbone.config.to_dict().get("final_logit_softcapping")
            expected = expected if cap is None else cap * torch.tanh(expected / cap)
        plain = of_text(load(place, family, options.get("auto", "AutoModel"))(**inputs), 5)
        got = of_text(model(**inputs), 5)
    torch.testing.assert_close(got.double(), expected, **TOLERANCE)
    assert (plain - expected).abs().max() > 0.1  # it is not the base model's
    about = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert about["task_type"] == ("CAUSAL_LM" if "auto" in options else "FEATURE_EXTRACTION")
    assert about["base_model_name_or_path"] == ("./backbone" if copied else str(made.place))


@pytest.mark.parametrize(
    ("family", "method", "options", "message"),
    [
        ("llama", "prefix", dict(layers=[1]), r"in some \(layers\)"),
        ("llama", "prefix", dict(position_offset="none"), "position_offset 'none'"),
        ("llama", "prefix", dict(adapter_size=4), "adapter_size"),
        ("llama", "prefix", dict(num_layers=2), "needs copy_backbone=True here: the run uses the first 2 layers"),
        ("llama", "lora", dict(num_layers=2), "needs copy_backbone=True here"),
        ("llama", "lora", dict(norms=True), "norms or layers trained beside it"),
        ("llama", "full", {}, "'merged' fits this run"),
        ("llama", "head", {}, "'merged' fits this run"),
        ("gemma3_text", "prefix", dict(max_length=6), "a max_length of at most 5 here"),
    ],
)
def test_what_peft_has_nothing_of(family, method, options, message, learner, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(learner(family, method, **options), "peft", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
