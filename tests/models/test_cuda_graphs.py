"""Batches filled up to a shape give what the same samples give without, and their steps run as CUDA graphs.

There is no GPU here: what stands in for a graph records the operators that a step dispatches, with the very tensors
that they read and make, and runs them again. What a capture would refuse (a value read on the host, a tensor made of
the host's numbers) it refuses; a number of one batch that a graph would go on using shows in the results of the next.
"""

import copy
import pickle
import sys
import warnings
from contextlib import nullcontext

import peft
import pytest
import torch
from helpers import VOCABULARY, build
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import fastprompt
from fastprompt import PromptConfig, PromptModel
from fastprompt.models.packed import captured
from fastprompt.ops import _checks
from fastprompt.training import PackingCollator

P, IDS = 3, [1, 0, 1, 1, 0]
STEPS = (5, 2, 7), (4, 1), (3, 6, 1, 2, 4), (9, 1, 5), (3, 2), (6,), (7,)  # lengths, of two buckets
SHAPES = {"max_tokens": [20, 8], "max_samples": 5}
READS = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default


class Emulated(TorchDispatchMode):
    """In place of `captured.Recorder`."""

    recorded = 0

    def __init__(self, function, stream, pool) -> None:
        super().__init__()
        self.tape = []
        with self:
            self.result = function()
        Emulated.recorded += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in READS and args[0].numel():
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        output = function(*args, **(kwargs or {}))
        self.tape.append((function, args, kwargs or {}, output))
        return output

    @torch.no_grad()
    @_disable_current_modes()
    def replay(self) -> None:
        for function, args, kwargs, output in self.tape:
            again = function(*args, **kwargs)
            several = isinstance(output, (tuple, list))
            for old, new in zip(output, again, strict=True) if several else [(output, again)]:
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    @staticmethod
    def begin(device) -> tuple:
        return None, ()

    @staticmethod
    def warm_up(function, stream) -> None:
        function()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[Emulated]:
    monkeypatch.setattr(captured, "DEVICES", ("cpu",))
    monkeypatch.setattr(captured, "Recorder", Emulated)
    monkeypatch.setattr(_checks, "_is_readable", lambda _: False)
    monkeypatch.setattr(Emulated, "recorded", 0)
    warnings.filterwarnings("error", "a step runs without")
    return Emulated


def features(lengths, classes: int = VOCABULARY, **more) -> list[dict]:
    rows = [torch.randint(5, VOCABULARY, (length,)) for length in lengths]
    return [
        {"input_ids": row.tolist(), "labels": (row % classes).tolist()} | {name: x[n] for name, x in more.items()}
        for n, row in enumerate(rows)
    ]


def batch_of(lengths, classes: int = VOCABULARY) -> dict:
    return PackingCollator(**SHAPES)(features(lengths, classes))


def model_of(
    family: str, auto: str, kind: str, dtype: torch.dtype = torch.float64, backbone: dict | None = None, **config
):
    built = build(family, auto, dtype, **(backbone or {}))
    if kind.startswith("fused"):
        config = peft.PrefixTuningConfig if "prefix" in kind else peft.PromptTuningConfig
        model = peft.get_peft_model(built, config(task_type="CAUSAL_LM", num_virtual_tokens=P))
        return fastprompt.fuse(model, cuda_graphs=True).to(dtype).train()
    model = PromptModel(built, PromptConfig(kind, P, init_scale=1.0, **config), cuda_graphs=True)
    model.add_prompt("cy")
    return model.to(dtype).train()


def step(model, batch: dict, **more) -> dict[str, torch.Tensor]:
    """The loss and the gradients, which add up."""
    loss = model(**batch, **more).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | grads


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


LM, TAGS = "AutoModelForCausalLM", "AutoModelForTokenClassification"


@pytest.mark.parametrize(
    ("family", "auto", "kind", "config"),
    [
        ("llama", LM, "prefix", {}),
        ("llama", LM, "prompt", {"encoder": "mlp"}),
        ("llama", LM, "fused prefix", {}),
        ("gemma3_text", LM, "prefix", {"adapter_size": 4}),
        ("gemma3_text", LM, "prompt", {}),
        ("gemma3_text", LM, "fused prompt", {}),
        ("bert", TAGS, "prefix", {}),
        ("bert", TAGS, "prompt", {}),
    ],
)
def test_steps_are_those_of_the_batches_own_shapes(family, auto, kind, config, graphs):
    model = model_of(family, auto, kind, **config)
    plain = copy.deepcopy(model)
    plain.cuda_graphs = False
    filled, losses, classes = copy.deepcopy(plain), [], 2 if auto == TAGS else VOCABULARY
    separator = {"separator_id": None} if kind == "prompt" else {"separator_id": -100}  # its last row predicts
    fixed, ragged = PackingCollator(**separator, **SHAPES, max_labels=16), PackingCollator(**separator)
    for n, lengths in enumerate(STEPS):
        # Of two prompts, at last each alone: one graph for both.
        own = {} if "fused" in kind else {"prompt_ids": [i ^ n % 2 for i in IDS]}
        given, found = features(lengths, classes, **own), []
        more = {"num_items_in_batch": n + 3} if auto == LM and "fused" in kind else {}
        for each, collate in ((model, fixed), (filled, fixed), (plain, ragged)):
            if n % 2 == 0:  # two batches add up
                each.zero_grad()
            found.append(step(each, collate(given), **more))
        losses.append((found[0]["loss"], found[0]["loss"].clone()))
        assert same(found[0], found[1]), n
        assert found[1].keys() == found[2].keys()
        for name, expected in found[2].items():
            torch.testing.assert_close(found[1][name], expected, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(kept, was) for kept, was in losses)
    assert graphs.recorded == 4 + 2 * bool(own)  # forward and backward, of each bucket and number of prompts


class Dispatched(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def test_what_is_left_beside_the_graphs_does_not_grow_with_the_layers(graphs):
    counts = []
    for layers in (1, 3):
        model, batch = model_of("llama", LM, "prefix", backbone={"num_hidden_layers": layers}), batch_of((5, 2, 7))
        step(model, batch)
        with Dispatched() as dispatched:
            model(**batch).loss.backward()
        counts.append(dispatched.count)
    assert counts[0] == counts[1] < 30


def test_with_the_attention_of_a_gpu(graphs, monkeypatch):
    _triton = pytest.importorskip("fastprompt.ops._triton")
    if not _triton.INTERPRETED:
        pytest.skip("no interpreter")
    monkeypatch.setattr(sys.modules["fastprompt.ops.prefix_attention"], "_choose", lambda *_: "triton")
    model, collate = (
        model_of("llama", LM, "prefix", torch.float32, {"num_hidden_layers": 1}),
        PackingCollator(max_tokens=6, max_samples=2),
    )
    plain = copy.deepcopy(model)
    plain.cuda_graphs = False
    for lengths in ((2, 3), (4, 1)):
        batch = collate(features(lengths))
        assert same(step(model, batch), step(plain, batch))
    assert graphs.recorded == 2


@pytest.mark.parametrize("autocast", [False, True])
def test_each_replay_draws_dropout_anew(autocast, graphs):
    backbone = {"attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.3}
    model = model_of("bert", TAGS, "prefix", torch.float32, backbone, dropout=0.1, encoder="mlp")
    plain, batch, losses = copy.deepcopy(model), batch_of((5, 2, 7), 2), set()
    plain.cuda_graphs = False
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        step(model, batch)  # what it takes to record also draws
        for seed in (0, 1, 2):
            found = []
            for each in (model, plain):
                each.zero_grad()
                torch.manual_seed(seed)
                found.append(step(each, batch))
            assert same(*found)
            losses.add(found[0]["loss"].item())
    assert len(losses) == 3 and graphs.recorded == 2


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_states_pools_and_hidden_states(family, graphs):
    model = model_of(family, "AutoModel", "prefix", layers=[1, 2])
    plain = copy.deepcopy(model)
    plain.cuda_graphs = False
    for lengths in ((5, 2, 7), (3, 6)):
        given, found = [{"input_ids": each["input_ids"]} for each in features(lengths)], []
        fixed, ragged = PackingCollator(**SHAPES)(given), PackingCollator()(given)
        for each, batch in ((model, fixed), (plain, fixed), (plain, ragged)):
            each.zero_grad()
            output = each(**batch, lower_states=each.lower_states(**batch))
            hidden = output.last_hidden_state[0, : sum(lengths)]
            pooled = output.get("pooler_output", hidden)[: len(lengths)]
            (hidden.square().sum() + pooled.sum()).backward()
            found.append({"hidden": hidden.detach(), "pooled": pooled.detach(), "grad": each.prompt.weight.grad})
        assert same(*found[:2])
        for name, expected in found[2].items():
            torch.testing.assert_close(found[1][name], expected, rtol=1e-10, atol=1e-12)
        output = model(**fixed, output_hidden_states=True)
        assert all(map(torch.equal, output.hidden_states, plain(**fixed, output_hidden_states=True).hidden_states))
    assert graphs.recorded == 4


def test_a_step_has_its_backward_once_before_the_next_forward(graphs):
    model = model_of("llama", LM, "prefix")
    one, other = batch_of((5, 2, 7)), batch_of((4, 1))
    first = model(**one).loss
    second = model(**other).loss
    with pytest.raises(RuntimeError, match="must have its backward once, before the model's next forward"):
        first.backward()
    second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="must have its backward once, before the model's next forward"):
        second.backward()
    with pytest.raises(RuntimeError, match="a step as a CUDA graph has no second derivative"):
        (grad,) = torch.autograd.grad(model(**one).loss, model.prompt.weight, create_graph=True)
        grad.sum().backward()
    model(**one)  # nobody wants its backward
    step(model, one)


def test_what_has_changed_is_recorded_anew(graphs):
    model, batch = model_of("bert", TAGS, "prefix"), batch_of((5, 2, 7), 2)
    step(model, batch)
    assert graphs.recorded == 2
    changes = (
        lambda: setattr(model.backbone.classifier, "weight", torch.nn.Parameter(model.backbone.classifier.weight * 2)),
        lambda: model.backbone.eval(),
        lambda: model.backbone.classifier.requires_grad_(False),
        lambda: model.freeze_prompt("default"),
    )
    for n, change in enumerate(changes):
        change()
        model.zero_grad()
        plain = copy.deepcopy(model)
        plain.cuda_graphs = False
        if n < 3:
            assert same(step(model, batch), step(plain, batch))
            assert graphs.recorded == 2 * (n + 2)
    assert torch.equal(model(**batch).loss, plain(**batch).loss)  # nothing trains
    assert graphs.recorded == 8


def test_copies_and_evaluation(graphs):
    model, batch = model_of("llama", LM, "prefix"), batch_of((5, 2, 7))
    step(model, batch)
    with torch.no_grad():
        model(**batch)
    assert graphs.recorded == 2
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        model.zero_grad(), other.zero_grad()
        with torch.no_grad():
            other.prompt.weight.mul_(2)
        loss = step(model, batch)["loss"]
        assert step(other, batch)["loss"] != loss
        assert torch.equal(step(model, batch)["loss"], loss)
    assert graphs.recorded == 6


def test_what_a_graph_cannot_do_runs_without_and_says_so(graphs, monkeypatch):
    def warned(batch: dict, reason: str):
        model.zero_grad(), plain.zero_grad()
        with pytest.warns(UserWarning, match=f"a step runs without a CUDA graph: {reason}"):
            assert same(step(model, batch), step(plain, batch))
        assert graphs.recorded == 0

    model = model_of("llama", LM, "prefix")
    plain = copy.deepcopy(model)
    plain.cuda_graphs = False
    warned(PackingCollator()(features((3, 2))), "its batch has no fixed shape")
    hook = model.backbone.model.norm.register_forward_hook(lambda *_: None)
    warned(batch_of((3, 2)), "FusedLlamaRMSNorm has a hook")
    hook.remove()
    hook = model.prompt.weight.register_hook(lambda grad: grad)  # outside of the graph
    model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    warned(batch_of((3, 2)), "gradient checkpointing")
    model.backbone.gradient_checkpointing_disable()
    hook.remove()
    monkeypatch.setattr(type(model.backbone.model.norm), "forward", lambda self, x: x * x.sum().item())
    with pytest.raises(RuntimeError, match="the step cannot be captured as a CUDA graph: set cuda_graphs to False"):
        step(model, batch_of((3, 2)))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize(("family", "auto"), [("llama", LM), ("gemma3_text", LM), ("bert", TAGS)])
def test_on_a_gpu(family, auto, kind):
    warnings.filterwarnings("error", "a step runs without")
    model = model_of(family, auto, kind, torch.float32, encoder="mlp").cuda()
    plain = copy.deepcopy(model)
    plain.cuda_graphs = False
    for n, lengths in enumerate(STEPS):
        batch = batch_of(lengths, 2 if auto == TAGS else VOCABULARY)
        batch = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
        if n % 2 == 0:
            model.zero_grad(), plain.zero_grad()
        found, expected = step(model, batch), step(plain, batch)
        assert found.keys() == expected.keys()
        for name, value in expected.items():  # what is added up atomically has no order
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
