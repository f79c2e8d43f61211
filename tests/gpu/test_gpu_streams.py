"""Operators and packed steps on a GPU, on a stream of the caller's and captured in a graph."""

import itertools
from collections.abc import Callable

import pytest
import torch
from helpers import CONFIGS, DECODERS, VOCABULARY, build
from torch import Tensor

from fastprompt import PromptConfig, PromptModel, _native, ops
from fastprompt.bench.timing import as_graph
from fastprompt.training import PackingCollator

BF16 = torch.bfloat16
ROWS, WORDS, WIDTH = 130, 97, 64


def attention(query, key, value, prefix_key, prefix_value, *, cu_seqlens, backend, **_):
    prefix = prefix_key, prefix_value
    return ops.prefix_attention(query, key, value, *prefix, cu_seqlens, is_causal=True, window=50, backend=backend)


def alignment(student, teacher, weight, *, backend, **_):
    return ops.alignment_loss(student, teacher, weight, distance="cosine+infonce", backend=backend)


def packing(prompt, *, ids, cu_seqlens, table, backend, **_):
    return ops.pack_prompt(table, ids, cu_seqlens, prompt, per_segment=True, backend=backend)


def pooling(hidden, *, cu_seqlens, backend, **_):
    return ops.segment_mean(hidden, cu_seqlens, backend=backend)


def head(hidden, *, ids, table, backend, **_):
    return ops.linear_cross_entropy(hidden, table, ids, backend=backend)


# A function, the shapes of what trains, and its backends beside the default.
OPERATORS = [
    (attention, [(ROWS, 4, WIDTH), *[(ROWS, 2, WIDTH)] * 2, *[(1, 2, 19, WIDTH)] * 2], ["native"]),
    (alignment, [(ROWS, WIDTH), (ROWS, 96), (96, WIDTH)], ["native", "triton"]),
    (packing, [(1, 9, WIDTH)], []),
    (pooling, [(ROWS, WIDTH)], []),
    (head, [(ROWS, WIDTH)], []),
]
CASES = [
    pytest.param(function, shapes, backend, id=f"{function.__name__}-{backend}")
    for function, shapes, backends in OPERATORS
    for backend in [None, *backends]
]


class Step:
    """An operator and its gradients, of inputs that stay where they are and take new values."""

    def __init__(self, function: Callable, shapes: list, backend: str | None, device: str) -> None:
        if backend == "native" and not _native.available(device):
            pytest.skip(_native.why_not(device))
        if backend == "triton" and device == "cpu":
            pytest.skip("on a CPU Triton is not compiled")
        self.leaves = [torch.empty(shape, device=device, dtype=BF16).requires_grad_() for shape in shapes]
        self.ids = torch.zeros(ROWS, dtype=torch.int64, device=device)
        self.constants = {
            "cu_seqlens": torch.tensor([0, 37, 38, 38, ROWS], dtype=torch.int32, device=device),
            "table": torch.randn(WORDS, WIDTH, device=device).to(BF16),
            "backend": backend,
        }
        self.function, self.tensors = function, [*(x.detach() for x in self.leaves), self.ids]

    def fresh(self) -> list[Tensor]:
        """New values for `tensors`."""
        return [torch.randn_like(x) for x in self.tensors[:-1]] + [torch.randint_like(self.ids, WORDS)]

    def __call__(self) -> list[Tensor]:
        out = self.function(*self.leaves, ids=self.ids, **self.constants)
        return [out.detach(), *torch.autograd.grad(out, self.leaves, torch.ones_like(out))]


class ModelStep:
    """A PromptModel's step on a packed batch: its loss, and the prompt's gradient."""

    def __init__(self, family: str, kind: str, device: str) -> None:
        self.family, self.device = family, device
        auto = "AutoModelForCausalLM" if family in DECODERS else "AutoModelForTokenClassification"
        self.model = PromptModel(build(family, auto, BF16), PromptConfig(kind, 5, init_scale=1.0)).to(device).train()
        self.batch = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.collated().items()}
        self.tensors = [self.batch["input_ids"], self.batch["labels"]]

    def collated(self) -> dict:
        rows = [torch.randint(5, VOCABULARY, (length,)) for length in (7, 1, 12, 5)]
        of_word = VOCABULARY if self.family in DECODERS else 2
        return PackingCollator()([{"input_ids": row, "labels": row % of_word} for row in rows])

    def fresh(self) -> list[Tensor]:
        batch = self.collated()
        return [batch[name].to(self.device) for name in ("input_ids", "labels")]

    def __call__(self) -> list[Tensor]:
        loss = self.model(**self.batch).loss
        return [loss.detach(), *torch.autograd.grad(loss, self.model.prompt.weight)]


def put(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def spoil(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.zero_()


def check_on_a_side_stream(step, device: str) -> None:
    """What is queued on a stream of its own waits for what that stream still has to do, and the host for neither."""
    values = step.fresh()
    put(step.tensors, values)
    expected = step()
    spoil(step.tensors)
    if device == "cpu":  # rehearses the rest
        put(step.tensors, values)
        return torch.testing.assert_close(step(), expected)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ballast = torch.randn(4096, 4096, device=device)
        for attempt in range(2):  # the first one takes the memory, for which the host may wait
            spoil(step.tensors)
            side.synchronize()
            for _ in range(100 if attempt else 1):  # some 0.2 s
                torch.mm(ballast, ballast)
            torch.cuda.set_sync_debug_mode("error" if attempt else "default")
            try:
                put(step.tensors, values)
                got = step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            was_busy = not side.query()
    side.synchronize()
    assert was_busy, "it was queued too late to show anything"
    torch.testing.assert_close(got, expected)


def check_in_a_graph(step, device: str) -> None:
    """A replay with new values in the inputs gives what a new call of these values gives."""
    found = []
    put(step.tensors, step.fresh())

    def run() -> None:
        found.append(step())

    replay = run if device == "cpu" else as_graph(run)  # a CPU rehearses the rest
    for _ in range(2):
        put(step.tensors, step.fresh())
        expected = step()
        replay()
        torch.testing.assert_close(found[-1], expected)


CHECKS = pytest.mark.parametrize("check_it", [check_on_a_side_stream, check_in_a_graph], ids=["side stream", "graph"])


@CHECKS
@pytest.mark.parametrize(("function", "shapes", "backend"), CASES)
def test_operators(device, function, shapes, backend, check_it):
    check_it(Step(function, shapes, backend, device), device)


@CHECKS
@pytest.mark.parametrize(("family", "kind"), list(zip(CONFIGS, itertools.cycle(["prefix", "prompt"]))))
def test_a_packed_step(device, family, kind, check_it):
    check_it(ModelStep(family, kind, device), device)
