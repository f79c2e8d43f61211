"""A folder that SentenceTransformer opens gives the learner's vectors."""

import shutil

import pytest
import torch
from stand_in import TEXTS

from fastprompt.export import export

sentence_transformers = pytest.importorskip("sentence_transformers")
CASES = [
    ("bert", "prefix", False, dict(pooling="mean", prefix_text="w9 ")),
    ("llama", "prompt", True, dict(pooling="last", auto="AutoModelForCausalLM")),
    ("xlm-roberta", "lora", True, dict(pooling="first")),
    ("llama", "head", False, dict(num_layers=2)),
    ("bert", "full", False, dict(aligned=False)),
    ("llama", "prefix", True, dict(norms=True, num_layers=2)),
    ("bert", "lora", False, dict(norms=True)),
]


def opened(place) -> torch.nn.Module:
    return sentence_transformers.SentenceTransformer(str(place), trust_remote_code=True, device="cpu")


def close(got, expected) -> None:
    torch.testing.assert_close(torch.as_tensor(got).double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "method", "copied", "options"), CASES)
def test_vectors(family, method, copied, options, learner, tmp_path):
    made = learner(family, method, **options)
    before = {name: weight.requires_grad for name, weight in made.backbone.named_parameters()}
    target, source = made.alone(TEXTS), made.alone(TEXTS, source=True)
    close(made.vectors(TEXTS), target)
    assert export(made, "sentence-transformers", tmp_path / "st", copy_backbone=copied) == tmp_path / "st"
    assert before == {name: weight.requires_grad for name, weight in made.backbone.named_parameters()}
    assert not (tmp_path / "st/fastprompt_head.safetensors").exists()  # the projection is one of the modules
    if copied:
        shutil.rmtree(made.place)
    model = opened(tmp_path / "st")
    close(model.encode_query(TEXTS), target)
    close(model.encode(TEXTS), target)
    close(model.encode_document(TEXTS), source)
    assert not any(weight.requires_grad for name, weight in model.named_parameters() if "linear" not in name)
    close(model.similarity(model.encode_query(TEXTS), model.encode_query(TEXTS)).diagonal(), torch.ones(3))
    model.save(str(tmp_path / "again"))
    again = opened(tmp_path / "again")
    close(again.encode_query(TEXTS), target)
    close(again.encode_document(TEXTS), source)


def test_what_is_not_of_this_form_is_told(learner, tmp_path):
    made = learner("bert", "prefix")
    vectors = made.vectors
    made.vectors = lambda texts, **options: 2 * vectors(texts, **options)
    with pytest.raises(ValueError, match="target vectors are something else"):
        export(made, "sentence-transformers", tmp_path / "st")
    assert not any("st" in path.name for path in tmp_path.iterdir())
