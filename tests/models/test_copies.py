"""Copies of a model, made in every way, run their own weights, packed."""

import concurrent.futures
import copy
import io
import pickle

import accelerate
import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import batch, build

import fastprompt
from fastprompt import PromptConfig, PromptModel
from fastprompt.models.methods import AdaptedBackbone, AdapterConfig
from fastprompt.models.packed import PackedBackbone

P = 3


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def replica(model):
    """What torch.nn.parallel.replicate makes for each device, with weights of its own."""
    made = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copied in made.items():
        for name, child in module._modules.items():
            copied._modules[name] = child if child is None else made[child]
        for name, parameter in module._parameters.items():
            setattr(copied, name, parameter if parameter is None else parameter.detach().clone())
    return made[model]


WAYS = {
    "deepcopy": copy.deepcopy,
    "average": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": saved_whole,
    "replica": replica,
}


def model_of(family: str, maker: str):
    auto = "AutoModelForCausalLM" if family == "llama" else "AutoModelForSequenceClassification"
    backbone = build(family, auto)
    if maker == "adapted":
        return AdaptedBackbone(backbone.base_model, AdapterConfig("head")).eval()
    if not maker.startswith("fused"):
        size = 4 if maker.endswith("adapters") else None
        model = PromptModel(backbone, PromptConfig(maker.split()[0], P, init_scale=1.0, adapter_size=size)).eval()
        for parameter in model.adapters.parameters() if size else ():
            torch.nn.init.normal_(parameter, std=0.2)
        return model
    task = "CAUSAL_LM" if family == "llama" else "SEQ_CLS"
    config = peft.PrefixTuningConfig if maker == "fused prefix" else peft.PromptTuningConfig
    model = peft.get_peft_model(backbone, config(task_type=task, num_virtual_tokens=P)).double()
    if family == "llama":
        with model.disable_adapter():  # which leaves an attribute `forward` behind
            pass
    return fastprompt.fuse(model).eval()


def output(model, inputs) -> torch.Tensor:
    out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out.logits


@torch.no_grad()
def evaluated(model, inputs) -> torch.Tensor:
    return output(model, inputs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("maker", ["prefix", "prompt adapters", "fused prefix", "fused prompt", "adapted"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_copy_runs_its_own_weights(family, maker, way, monkeypatch):
    model, inputs = model_of(family, maker), batch()
    with torch.no_grad():
        if maker.startswith("fused") and family == "llama":
            with model.disable_adapter():
                pass
        expected = output(model, inputs)
        twin = WAYS[way](model)
        runs, call = [], PackedBackbone.__call__
        monkeypatch.setattr(PackedBackbone, "__call__", lambda *a, **k: runs.append(a[0].model) or call(*a, **k))
        assert torch.equal(output(twin, inputs), expected)
        own = [module for module in twin.modules() if module in runs]
        assert runs and own, "it runs packed, through its own backbone"
        for module in model.modules():  # no weight of the original is read by the copy, nor the other way round
            for parameter in module.parameters(recurse=False):
                parameter.data.mul_(0)
        assert torch.equal(output(twin, inputs), expected)
        assert not torch.equal(output(model, inputs), expected)


def test_a_shallow_copy_shares_what_it_holds():
    for maker in ("prefix", "fused prompt"):
        model, inputs = model_of("llama", maker), batch()
        twin = copy.copy(model)
        assert (
            twin.get_parameter("base_model.lm_head.weight" if "fused" in maker else "backbone.lm_head.weight")
            is (model.get_output_embeddings() if "fused" in maker else model.backbone.get_output_embeddings()).weight
        )
        assert torch.equal(output(twin, inputs), output(model, inputs))


def test_replicas_run_at_the_same_time():
    """Each in a thread, as DataParallel has them: they share the original's dictionaries of hooks."""
    model = model_of("llama", "prompt adapters")
    inputs = [batch() for _ in range(4)]
    with torch.no_grad():
        expected = [output(model, each) for each in inputs]
        replicas = [replica(model) for _ in inputs]
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            for _ in range(10):
                got = threads.map(evaluated, replicas, inputs)
                assert all(torch.equal(each, own) for each, own in zip(got, expected, strict=True))


def test_what_peft_does_to_a_fused_model():
    model, inputs = model_of("llama", "fused prompt"), batch()
    first = output(model, inputs)
    model.add_adapter("other", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    model.double().set_adapter("other")
    assert not torch.equal(output(model, inputs), first)
    model.set_adapter("default")
    assert torch.equal(output(copy.deepcopy(model), inputs), first)
    model.delete_adapter("other")
    assert torch.equal(output(model, inputs), first)
    assert fastprompt.fuse(model) is model
    model.get_base_model().config.final_logit_softcapping = 1.0  # read in each call
    model.get_base_model().set_attn_implementation("sdpa")  # and a packed pass takes what it needs
    assert torch.equal(output(model, inputs), first)


@pytest.fixture
def half_precision():
    """Of accelerate, which keeps one precision a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_wraps_and_unwraps(half_precision):
    model, inputs = model_of("bert", "fused prefix").float(), batch()
    expected = output(model, inputs)
    prepared = half_precision.prepare(model)
    assert output(prepared, inputs).dtype == torch.float32
    stock = peft.get_peft_model(
        build("bert", "AutoModelForSequenceClassification"),
        peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P),
    )
    wrapped = half_precision.prepare(stock)
    with pytest.raises(ValueError, match="peft_model's forward must be its class's own: fuse it before"):
        fastprompt.fuse(wrapped)
    plain = accelerate.utils.extract_model_from_parallel(prepared, keep_fp32_wrapper=False)
    assert plain is model and torch.equal(output(plain, inputs), expected)
