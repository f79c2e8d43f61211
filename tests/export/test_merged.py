"""Plain transformers folders of runs whose weights changed."""

import re

import pytest
import torch
import transformers
from helpers import batch
from stand_in import load

from fastprompt.export import export
from fastprompt.models.packed import PackedBackbone

CLM = "AutoModelForCausalLM"


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        ("bert", "lora", dict(norms=True)),
        ("llama", "lora", dict(auto=CLM, num_layers=2)),
        ("gemma3_text", "full", dict(auto=CLM)),
        ("xlm-roberta", "head", {}),
    ],
)
def test_it_computes_the_same(family, method, options, learner, tmp_path):
    made, inputs = learner(family, method, **options), batch()
    with torch.no_grad():
        expected = made.backbone(**inputs)[0]
        export(made, "merged", tmp_path / "out")
        assert torch.equal(made.backbone(**inputs)[0], expected)  # it is left as it was
        model = load(tmp_path / "out", family, options.get("auto", "AutoModel"))
        # Norms of decoders, which are stock where they train, round to float32: both with the fused ones.
        PackedBackbone(model.requires_grad_(False))
        made.backbone.requires_grad_(False)
        got, expected = model(**inputs)[0], made.backbone(**inputs)[0]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert any("lora" in name for name, _ in made.backbone.named_parameters()) == (method == "lora")
    card = (tmp_path / "out/README.md").read_text()  # what it says loads no weights that begin at random
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(code.replace("THIS FOLDER", str(tmp_path / "out")), opened := {})
    assert opened["model"].state_dict().keys() == made.backbone.state_dict().keys() or method == "lora"
    assert ("add_pooling_layer=False" in code) == ("auto" not in options)
    text = "w1 w2"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(text)["input_ids"] == made.tokenizer(text)["input_ids"]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"config.json", "model.safetensors", "README.md"}


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_prompt_is_not_in_the_weights(method, learner, tmp_path):
    with pytest.raises(ValueError, match=f"'merged' is for methods lora, full and head: a {method} is not in"):
        export(learner("bert", method), "merged", tmp_path / "out")
