"""A packed step reads nothing of its device if the batch brings its packing along, and else once, at the packing.

It runs on tensors without values, where whatever reads one raises.
"""

import sys

import peft
import pytest
import torch
from encoder_decoders import build_seq2seq, seq2seq_batch
from helpers import PAD, VOCABULARY, build
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

import fastprompt
from fastprompt import PromptConfig, PromptModel
from fastprompt.models.packed import layout
from fastprompt.ops import _checks, _triton
from fastprompt.training import PackingCollator

P, LENGTHS, IDS = 3, (7, 1, 12, 5), ["default", "cy", "cy", "default"]
AUTO = {
    "llama": "AutoModelForCausalLM",
    "gemma3_text": "AutoModelForCausalLM",
    "bert": "AutoModelForTokenClassification",
}


class Made(TorchDispatchMode):
    """Counts tensors made of the host's numbers, each of which is a copy that waits, but for the plan's."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.lift_fresh.default and args[0].numel() > 0
        return function(*args, **(kwargs or {}))


@pytest.fixture
def gpu_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would run on a GPU runs on tensors that say they are on the CPU."""
    pytest.importorskip("triton")
    monkeypatch.setattr(sys.modules["fastprompt.ops.prefix_attention"], "_choose", lambda *_: "triton")
    monkeypatch.setattr(sys.modules["fastprompt.ops.pack_prompt"]._native, "available", lambda _: False)
    monkeypatch.setattr(_triton, "why_not", lambda _: None)
    monkeypatch.setitem(_checks.ELEMENTWISE, "cpu", "triton")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The names of what was read, each time; `values` by the fake tensor's id."""
    found = []

    def read(tensors: dict[str, torch.Tensor]) -> dict:
        found.extend([tuple(tensors)] if tensors else [])
        return {name: tensor.host_values for name, tensor in tensors.items()}

    monkeypatch.setattr(layout, "read", read)
    return found


def faked(mode: FakeTensorMode, value):
    """A tensor without values, that remembers them for whoever may read."""
    if not isinstance(value, torch.Tensor):
        return value
    made = mode.from_tensor(value)
    with unset_fake_temporarily():
        made.host_values = value.detach().numpy()
    return made


def without_values(mode: FakeTensorMode, model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: faked(mode, x) for name, x in tensors.items() if x is not None})
    if hasattr(model, "prompt_tokens"):  # PEFT's
        model.prompt_tokens = {name: faked(mode, x) for name, x in model.prompt_tokens.items()}
    return model


def model_of(family: str, maker: str):
    kind, task = maker.removeprefix("fused "), "TOKEN_CLS" if "bert" in family else "CAUSAL_LM"
    backbone = build(family, AUTO[family], torch.float32)
    if kind == maker:
        model = PromptModel(backbone, PromptConfig(kind, P))
        model.add_prompt("cy")
        return model.train()
    config, more = peft.PrefixTuningConfig if kind == "prefix" else peft.PromptTuningConfig, {}
    if kind == "multitask":
        config, more = peft.MultitaskPromptTuningConfig, {"num_tasks": 2}
    return fastprompt.fuse(peft.get_peft_model(backbone, config(task_type=task, num_virtual_tokens=P, **more))).train()


def batches(family: str) -> dict[str, dict]:
    """One batch, packed by the collator, filled up by it to a shape, by it without its packing, and padded."""
    rows = [torch.randint(5, VOCABULARY, (length,)) for length in LENGTHS]
    labels = rows if family != "bert" else [row % 2 for row in rows]
    features = [{"input_ids": x, "labels": y} for x, y in zip(rows, labels, strict=True)]
    collated = PackingCollator()(features)
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=value)
        for each, value in ((rows, PAD), (labels, -100))
    )
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return {
        "with its packing": collated,
        "filled up": PackingCollator(max_tokens=32, max_samples=6, max_labels=30)(features),
        "flattened": {name: x for name, x in collated.items() if name != "packing"},
        "padded": {"input_ids": ids, "labels": labels, "attention_mask": mask},
    }


def check(family: str, maker: str, reads: list) -> None:
    given, model = batches(family), model_of(family, maker)
    variants = {"with its packing": [{}]} | {name: [{}] for name in given}
    if "fused" not in maker:
        variants["with its packing"].append({"prompt_ids": IDS})
    with FakeTensorMode() as mode:
        without_values(mode, model)
        for n, (name, more) in enumerate((name, more) for name, each in variants.items() for more in each):
            fakes = {key: faked(mode, x) for key, x in given[name].items()}
            if n == 0:  # what is kept for good is made in the first step
                model(**fakes).loss.backward()
            reads.clear()
            with Made() as made:
                model(**fakes, **more).loss.backward()
            assert len(reads) == (name in ("flattened", "padded")), (name, more, reads)
            # One is the plan. PEFT encodes a prefix in transformers' cache, whose sliding layers have counters.
            sliding = family == "gemma3_text" and maker == "fused prefix"
            assert made.count == 1 + 2 * sliding, (name, more)


@pytest.mark.parametrize("maker", ["prefix", "prompt", "fused prefix", "fused prompt"])
@pytest.mark.parametrize("family", AUTO)
def test_a_step(family, maker, gpu_path, reads):
    check(family, maker, reads)


@pytest.mark.parametrize("family", ["gemma3_text", "bert"])
def test_a_step_with_the_operators_of_a_cpu(family, reads):
    check(family, "prompt", reads)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", ["m2m_100", "mbart", "t5"])
def test_a_step_of_an_encoder_decoder(family, kind, gpu_path, reads):
    """Of the two sides, lengths and labels are read at once."""
    model, given = PromptModel(build_seq2seq(family, torch.float32), PromptConfig(kind, P)).train(), seq2seq_batch()
    with FakeTensorMode() as mode:
        without_values(mode, model)
        fakes = {name: faked(mode, x) for name, x in given.items()}
        for _ in range(2):  # what is kept for good, as that mBART's logits have no bias, is read in the first
            reads.clear()
            model(**fakes).loss.backward()
        assert len(reads) == 1 and set(reads[0]) == {"attention_mask", "labels"}


@pytest.mark.parametrize("maker", ["prefix", "fused multitask"])
def test_prompt_ids_on_the_device_are_read_with_the_rest(maker, gpu_path, reads):
    given, model = batches("llama"), model_of("llama", maker)
    ids = {"task_ids" if "multitask" in maker else "prompt_ids": torch.tensor([0, 1, 1, 0])}
    del given["filled up"]  # it has other segments
    with FakeTensorMode() as mode:
        without_values(mode, model)
        for name, batch in given.items():
            fakes = {name: faked(mode, x) for name, x in (batch | ids).items()}
            reads.clear()
            model(**fakes).loss.backward()
            assert len(reads) == 1 and "prompt_ids" in reads[0], (name, reads)


def test_it_would_be_found(gpu_path, reads):
    """What this file holds if somebody reads a value, in the forward or the backward."""
    batch, model = batches("llama")["with its packing"], model_of("llama", "prefix")
    with FakeTensorMode() as mode:
        without_values(mode, model)
        fakes = {name: faked(mode, x) for name, x in batch.items()}
        loss = model(**fakes).loss
        with pytest.raises(DataDependentOutputException):
            loss.item()
        model.prompt.weight.register_hook(lambda grad: bool(grad.sum() > 0))
        with pytest.raises(DataDependentOutputException):
            loss.backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_a_prefix_is_brought_to_the_backbones_dtype_once(autocast):
    model = PromptModel(build("llama", dtype=torch.float32 if autocast else torch.bfloat16), PromptConfig("prefix", P))
    shapes = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
                shapes.append(args[0].shape)
            return function(*args, **(kwargs or {}))

    with Casts(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(input_ids=torch.randint(5, VOCABULARY, (2, 4)))
    weight = model.prompt.weight
    assert [shape for shape in shapes if shape.numel() in (weight.numel(), weight.numel() // 6)] == [(1, *weight.shape)]
