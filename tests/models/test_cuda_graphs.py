"""Batches filled up to a shape give what the same samples give without, and their steps run as CUDA graphs.

There is no GPU here: what stands in for a graph records the operators that a step dispatches, with the very tensors they
read and make, and runs them again. What a capture would refuse (a value read on the host, a tensor made of the host's
numbers) it refuses; a number of the first batch that a graph would go on using shows in the results of the next.
"""

import copy

import peft
import pytest
import torch
from helpers import VOCABULARY, build
from torch.utils._python_dispatch import TorchDispatchMode

import fastprompt
from fastprompt import PromptConfig, PromptModel
from fastprompt.models.packed import captured
from fastprompt.ops import _checks
from fastprompt.training import PackingCollator

P, IDS = 3, [1, 0, 1, 1, 0]
STEPS = (5, 2, 7), (4, 1), (3, 6, 1, 2, 4), (9, 1, 5), (3, 2)  # lengths, of two buckets
FIXED = PackingCollator(max_tokens=[20, 8], max_samples=5)
aten = torch.ops.aten


class Emulated(TorchDispatchMode):
    """In place of `captured.Recorder`."""

    recorded = 0

    def __init__(self, function, pool) -> None:
        super().__init__()
        self.tape = []
        with self:
            self.result = function()
        Emulated.recorded += 1
        for *_, output in self.tape:
            self.poison(output)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is aten._local_scalar_dense.default or (function is aten.lift_fresh.default and args[0].numel()):
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        output = function(*args, **(kwargs or {}))
        self.tape.append((function, args, kwargs or {}, output))
        return output

    @staticmethod
    def poison(output) -> None: ...

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, output in self.tape:
            again = function(*args, **kwargs)
            pairs = zip(output, again, strict=True) if isinstance(output, (tuple, list)) else [(output, again)]
            for old, new in pairs:
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    @staticmethod
    def pool() -> tuple:
        return ()

    @staticmethod
    def warm_up(function) -> None:
        function()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[Emulated]:
    monkeypatch.setattr(captured, "DEVICES", ("cpu",))
    monkeypatch.setattr(captured, "Recorder", Emulated)
    monkeypatch.setattr(_checks, "_is_readable", lambda _: False)
    monkeypatch.setattr(Emulated, "recorded", 0)
    return Emulated


def features(lengths, classes: int = VOCABULARY, **more) -> list[dict]:
    rows = [torch.randint(5, VOCABULARY, (length,)) for length in lengths]
    return [
        {"input_ids": row.tolist(), "labels": (row % classes).tolist()} | {name: x[n] for name, x in more.items()}
        for n, row in enumerate(rows)
    ]


def model_of(family: str, kind: str, auto: str, **config):
    if kind.startswith("fused"):
        config = peft.PrefixTuningConfig if "prefix" in kind else peft.PromptTuningConfig
        peft_config = config(task_type="CAUSAL_LM", num_virtual_tokens=P)
        return fastprompt.fuse(peft.get_peft_model(build(family, auto), peft_config), cuda_graphs=True).double().train()
    config = PromptConfig(kind, P, init_scale=1.0, **config)
    model = PromptModel(build(family, auto), config, cuda_graphs=True).double()
    model.add_prompt("cy")
    return model.train()


def grads(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def stepped(model, batch: dict, pooled: bool) -> torch.Tensor:
    output = model(**batch)
    if not pooled:
        loss = output.loss
    else:
        bounds, hidden = batch["cu_seq_lens_q"], output.last_hidden_state[0]
        means = [hidden[begin:end].mean(0) for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]
        loss = torch.stack(means[: batch["samples"]]).square().sum() if "samples" in batch else 0
    loss.backward()
    return loss.detach()


CASES = {
    "llama prefix": ("llama", "prefix", "AutoModelForCausalLM", {}),
    "llama prompt": ("llama", "prompt", "AutoModelForCausalLM", {}),
    "gemma3 prefix": ("gemma3_text", "prefix", "AutoModelForCausalLM", {"adapter_size": 4}),
    "gemma3 prompt": ("gemma3_text", "prompt", "AutoModelForCausalLM", {"encoder": "mlp"}),
    "bert prefix": ("bert", "prefix", "AutoModelForTokenClassification", {}),
    "bert prompt": ("bert", "prompt", "AutoModelForTokenClassification", {}),
    "fused prefix": ("llama", "fused prefix", "AutoModelForCausalLM", {}),
    "fused prompt": ("gemma3_text", "fused prompt", "AutoModelForCausalLM", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_the_batches_own_shapes(case, graphs):
    family, kind, auto, config = CASES[case]
    model = model_of(family, kind, auto, **config)
    plain = copy.deepcopy(model)
    plain.cuda_graphs = False
    filled = copy.deepcopy(plain)
    losses = []
    for n, lengths in enumerate(STEPS):
        more = {} if "fused" in kind else {"prompt_ids": IDS}
        given = features(lengths, 2 if family == "bert" else VOCABULARY, **more)
        found = []
        for each, collate in ((model, FIXED), (filled, FIXED), (plain, PackingCollator())):
            if n % 2 == 0:  # two batches accumulate
                each.zero_grad()
            loss = each(**collate(given)).loss
            loss.backward()
            found.append({"loss": loss.detach()} | grads(each))
        losses.append((found[0]["loss"], found[0]["loss"].clone()))
        assert found[0].keys() == found[1].keys() == found[2].keys()
        for name, expected in found[2].items():
            assert torch.equal(found[0][name], found[1][name]), (n, name)
            torch.testing.assert_close(found[1][name], expected, rtol=1e-10, atol=1e-12)
    assert all(map(torch.equal, *zip(*losses, strict=True)))  # a replay leaves what the last one gave
    assert graphs.recorded == 4  # two of each bucket
