"""PromptInputs: what a model makes of its prompts is all that a packed forward takes of them."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from helpers import CONFIGS, DECODERS, batch, build

from fastprompt import PromptConfig, PromptModel
from fastprompt.models import PromptInputs
from fastprompt.models.packed import PackedBackbone

P = 3


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_packed_forward_takes_them(family, kind):
    model = PromptModel(build(family), PromptConfig(kind, P, init_scale=1.0, adapter_size=4)).eval()
    model.add_prompt("other")
    for parameter in model.adapters.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    inputs, ids = batch(), torch.tensor([1, 0, 1, 1])
    shared = torch.tensor([5, 6]) if family in DECODERS else None
    expected = model(**inputs, prompt_ids=ids, shared_prefix_ids=shared).last_hidden_state
    made = model.prompt_inputs(ids, shared)
    assert made.num_prompts == 2 and made.index.tolist() == ids.tolist()
    packed = PackedBackbone(model.backbone)
    assert torch.equal(packed(inputs, None, made).last_hidden_state, expected)
    assert not torch.allclose(packed(inputs).last_hidden_state, expected, rtol=1e-2, atol=1e-2)
    with pytest.raises(FrozenInstanceError):
        made.position_offset = 0


def test_what_does_not_fit_a_backbone():
    model = PromptModel(build("bert"), PromptConfig("prefix", P, adapter_size=4))
    made, inputs = model.prompt_inputs(), batch()
    for family, given, error, message in (
        ("bert", made, ValueError, "adapters must have been made for this backbone of 3 layers"),
        ("llama", made, ValueError, r"prefix must have keys and values \(N, 2, P, 8\), .* got \(1, 4, 3, 12\)"),
        ("bert", PromptInputs({3: made.prefix[0]}), ValueError, r"backbone's 3 layers, got \[3\]"),
        ("bert", PromptInputs(prompt=torch.zeros(P, 48)), ValueError, r"prompt must be \(N, P, 48\), .* got \(3, 48\)"),
        ("bert", replace(made, index=torch.ones(4).long().numpy()), IndexError, r"in \[0, 1\), got 1 to 1"),
        ("bert", PromptInputs(shared_ids=torch.tensor([5])), ValueError, "shared_prefix_ids is for causal models"),
    ):
        with pytest.raises(error, match=message):
            PackedBackbone(build(family))(inputs, None, given)
