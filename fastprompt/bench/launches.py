"""How many kernels a training step launches, and what they cost the host: PEFT's model as it is and after `fuse`.

A model of real depth and tiny width, so that what it computes costs nothing. What launches is counted by the operators
that PyTorch dispatches in a step without values, views and allocations left out: each of them is a kernel on a GPU, or
more. A layer's share is the difference between two depths.

The ways:
    peft                  the PEFT model
    ours                  after `fuse`, on a CPU, which has a fused operator for all that stands between the products
    ours, on a GPU        the same with the operators that run there, attention and the rest in Triton
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastprompt
from fastprompt._extras import require
from fastprompt.models.packed import layout

DEPTHS, P, LENGTHS, VOCABULARY = (6, 24), 16, (9, 14, 5, 12), 64  # 6: each kind of Gemma's layers is in the difference
FREE = ("empty", "new_empty", "detach", "lift_fresh", "_unsafe_view", "_reshape_alias", "alias")  # launch nothing
# Kernels of an operator of ours that are more than one: at most so many.
SEVERAL = {"prefix_attention_triton_backward": 4}
WAYS = ("peft", "ours", "ours, on a GPU")


class Cost(NamedTuple):
    """Of a layer, or of what a step has beside its layers."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


class Row(NamedTuple):
    """One model and kind under one way: launches and, where it can run here, microseconds of the host."""

    family: str
    kind: str
    way: str
    layer: Cost
    rest: Cost
    microseconds: Cost | None


class Launches(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        space, _, name = function._schema.name.partition("::")
        if space in ("aten", "fastprompt") and not function.is_view and not name.startswith(FREE):
            self.count += SEVERAL.get(name, 1)
        return function(*args, **(kwargs or {}))


def rows(turns: int = 30) -> list[Row]:
    """The rows of the table. `turns`: steps timed for each model, in turns."""
    found = []
    for family in ("llama", "gemma3"):
        for kind in ("prefix", "prompt"):
            seconds = _seconds(family, kind, turns)
            for way in WAYS:
                few, many = (_launches(family, kind, way, depth) for depth in DEPTHS)
                layer = _per_layer(few, many)
                rest = Cost(*(a - DEPTHS[0] * b for a, b in zip(few, layer, strict=True)))
                found.append(Row(family, kind, way, layer, rest, seconds.get(way)))
    return found


def table(rows: list[Row]) -> str:
    """In Markdown, with each figure over PEFT's."""
    lines = [
        "| model | prompt | way | launches a layer: forward, backward, both | over PEFT's | rest of the step "
        "| host, us a layer: forward, backward, both | over PEFT's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        stock = next(r for r in rows if r.family == row.family and r.kind == row.kind and r.way == "peft")
        times, ratio = "", ""
        if row.microseconds:
            times = " ".join(f"{x:.0f}" for x in (*row.microseconds, row.microseconds.both))
            ratio = f"{row.microseconds.both / stock.microseconds.both:.2f}"
        launches = " ".join(f"{x:.1f}" for x in (*row.layer, row.layer.both))
        lines.append(
            f"| {row.family} | {row.kind} | {row.way} | {launches} | {row.layer.both / stock.layer.both:.2f} "
            f"| {row.rest.both:.0f} | {times} | {ratio} |"
        )
    return "\n".join(lines)


def _per_layer(few: Cost, many: Cost) -> Cost:
    return Cost(*((b - a) / (DEPTHS[1] - DEPTHS[0]) for a, b in zip(few, many, strict=True)))


def _model(family: str, kind: str, depth: int, fused: bool) -> nn.Module:
    transformers, peft = require("transformers", "train"), require("peft", "bench")
    sizes = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=depth, intermediate_size=32)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes)
    if family == "gemma3":
        config = transformers.Gemma3TextConfig(**sizes, sliding_window=8)
    make = peft.PrefixTuningConfig if kind == "prefix" else peft.PromptTuningConfig
    prompt = make(task_type="CAUSAL_LM", num_virtual_tokens=P)
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_config(config), prompt)
    return (fastprompt.fuse(model) if fused else model).train()


def _batch() -> dict[str, Tensor]:
    rows = [torch.randint(5, VOCABULARY, (length,)) for length in LENGTHS]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _launches(family: str, kind: str, way: str, depth: int) -> Cost:
    model, inputs = _model(family, kind, depth, way != "peft"), _batch()
    values = {name: tensor.numpy() for name, tensor in inputs.items()} | {"embed_scale": np.float32(1)}
    with _as_on_gpu() if way == WAYS[2] else nullcontext(), FakeTensorMode() as mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: mode.from_tensor(x) for name, x in tensors.items() if x is not None})
        model.prompt_tokens = {name: mode.from_tensor(x) for name, x in model.prompt_tokens.items()}
        inputs = {name: mode.from_tensor(x) for name, x in inputs.items()}
        with mock.patch.object(layout, "read", lambda tensors: {name: values[name] for name in tensors}):
            with Launches() as forward:
                loss = model(**inputs).loss
            with Launches() as backward:
                loss.backward()
    return Cost(forward.count, backward.count)


@contextmanager
def _as_on_gpu() -> Iterator[None]:
    """On tensors without values that say they are on the CPU."""
    operators = sys.modules["fastprompt.ops.prefix_attention"], sys.modules["fastprompt.ops.pack_prompt"]
    with (
        mock.patch.object(operators[0], "_choose", lambda *_: "triton"),
        mock.patch.object(operators[1]._native, "available", lambda _: False),
        mock.patch("fastprompt.ops._triton.why_not", lambda _: None),
        mock.patch.dict("fastprompt.ops._checks.ELEMENTWISE", {"cpu": "triton"}),
    ):
        yield


def _seconds(family: str, kind: str, turns: int) -> dict[str, Cost]:
    """Of the ways that run here."""
    models = {(way, d): _model(family, kind, d, way != "peft") for way in WAYS[:2] for d in DEPTHS}
    inputs, times = _batch(), {key: ([], []) for key in models}
    for turn in range(turns + 2):
        for key, model in models.items():
            start = time.thread_time()
            loss = model(**inputs).loss
            between = time.thread_time()
            loss.backward()
            end = time.thread_time()
            if turn > 1:
                times[key][0].append(between - start)
                times[key][1].append(end - between)
    # Of the thread alone, whatever else runs; what shares the caches makes a turn slower and none faster.
    least = {key: Cost(*(min(own) * 1e6 for own in each)) for key, each in times.items()}
    return {way: _per_layer(*(least[way, depth] for depth in DEPTHS)) for way in WAYS[:2]}
