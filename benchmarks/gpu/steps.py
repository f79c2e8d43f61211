"""A training step of Llama with a prefix, weights made here, bfloat16: PEFT, PEFT with Liger's layers, ours, a graph.

Ragged batches of about 0.4k, 8k and 32k tokens, every token labelled; for the graph they are packed, and filled up to
the next multiple of a sixteenth of those. First each way is compared with PEFT in higher
precision on the short batch, from the same weights: those of the bfloat16 model, upcast. What is wrong has no time.
"""

import functools
import gc
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

import fastprompt
from fastprompt.training import PackingCollator

from . import kernels
from .records import DEVICE, NotThere

MODELS = {  # layers, width, heads, key heads, features of a head, inner width, vocabulary
    "135m": (30, 576, 9, 3, 64, 1536, 49_152),
    "1b": (16, 2048, 32, 8, 64, 8192, 128_256),
    "3b": (28, 3072, 24, 8, 128, 8192, 128_256),
}
BATCHES = {"0.4k": (8, 55), "8k": (16, 512), "32k": (16, 2048)}  # sentences, their mean length
PREFIX, SECONDS, DTYPE = 32, 1.0, torch.bfloat16
if DEVICE == "cpu":
    MODELS, BATCHES, SECONDS = {"tiny": (2, 48, 3, 1, 16, 64, 97)}, {"0.4k": (3, 6), "8k": (4, 9)}, 0.2
WAYS = ("peft", "liger", "ours", "graph")
TOLERANCE = 0.2  # of the prefix's gradient, the benchmark's: thirty layers in bfloat16


def cases() -> dict[str, Callable[[], dict]]:
    names = [(model, way, batch) for model in MODELS for way in WAYS for batch in BATCHES]
    return {"-".join(name): functools.partial(step, *name) for name in names}


def step(size: str, way: str, batch: str) -> dict:
    _free()  # what a step that ran out of memory left
    model = _model(size, way)
    errors = _errors(size, way)
    if not errors["gradient"] <= TOLERANCE:
        raise AssertionError(f"wrong beyond {TOLERANCE}: {errors}")
    inputs, tokens = _inputs_of(size, way, batch), int(_inputs(size, batch)["attention_mask"].sum())
    weights = _allocated()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = _timed(lambda: _run(model, inputs))
    peak = torch.cuda.max_memory_allocated() - weights if DEVICE == "cuda" else 0
    ran = kernels.profiled(lambda: _run(model, inputs), 2)
    wall, busy = statistics.median(seconds), sum(kernel.seconds for kernel in ran)
    launches = sum(kernel.launches for kernel in ran)
    says = f"{wall * 1e3:.2f} ms, kernels {busy * 1e3:.2f} ({busy / wall:.0%}), {launches:.0f} launches"
    says += f", {peak / 2**20:.0f} MiB" if peak else ""
    return {
        **{"wall": wall, "steps": len(seconds), "kernel_seconds": busy, "launches": launches, "tokens": tokens},
        **{"peak_bytes": peak, "weight_bytes": weights, "errors": errors, "says": says},
        "kernels": kernels.brief(ran, 20 if batch == "8k" else 5),
    }


def _run(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), _prefix(model).grad


def _timed(run: Callable[[], object]) -> list[float]:
    """Seconds of steps after two of warm-up, with nothing waiting on the device."""
    synchronize = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    seconds: list[float] = []
    for _ in range(2):
        run()
    while len(seconds) < 3 or (sum(seconds) < SECONDS and len(seconds) < 50):
        synchronize()
        begin = time.perf_counter()
        run()
        synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds


@functools.lru_cache(1)  # one way's model at a time: a step's memory is its own
def _model(size: str, way: str) -> nn.Module:
    _free()
    if way == "liger" and (DEVICE == "cpu" or not find_spec("liger_kernel")):
        raise NotThere("Liger needs a GPU" if DEVICE == "cpu" else "the package liger-kernel is not installed")
    return _changed(_stock(size), way)


def once(size: str, way: str) -> dict:
    """Run one layer on each batch, so that what compiles is there afterwards."""
    model = _changed(_stock(size, 1), way)
    for batch in BATCHES:
        _run(model, _inputs_of(size, way, batch))
    return {}


def _changed(model: nn.Module, way: str) -> nn.Module:
    if way == "liger":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model.get_base_model())
    elif way == "ours":
        model = fastprompt.fuse(model)
    elif way == "graph":
        warnings.filterwarnings("error", "a step runs without a CUDA graph")
        model = fastprompt.fuse(model, cuda_graphs=True)
    return model.train()


def _stock(size: str, most_layers: int = 1000) -> nn.Module:
    """PEFT's model, always with the same weights, made on the device: that takes a second and not a minute."""
    try:
        import peft
        import transformers
    except ImportError as error:
        raise NotThere(f"the package {error.name} is not installed") from None
    layers, width, heads, kv_heads, features, inner, vocabulary = MODELS[size]
    config = transformers.LlamaConfig(
        **{"num_hidden_layers": min(layers, most_layers), "hidden_size": width, "num_attention_heads": heads},
        **{"num_key_value_heads": kv_heads, "head_dim": features, "intermediate_size": inner},
        **{"vocab_size": vocabulary, "tie_word_embeddings": True},
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        backbone = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    adapter = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX)
    return peft.get_peft_model(backbone, adapter).to(DEVICE, DTYPE).train()


def _prefix(model: nn.Module) -> Tensor:
    return model.prompt_encoder["default"].embedding.weight


@functools.cache
def _exact(size: str) -> tuple[Tensor, Tensor]:
    """Loss and gradient on the short batch: PEFT in float64, or float32 where float64 takes too long."""
    model = _stock(size).to(torch.float32 if size in ("1b", "3b") else torch.float64)
    loss, gradient = _run(model, _inputs(size, "0.4k"))
    return loss.double(), gradient.double()


@functools.lru_cache(1)
def _errors(size: str, way: str) -> dict[str, float]:
    exact, got = _exact(size), _run(_model(size, way), _inputs_of(size, way, "0.4k"))
    pairs = zip(("loss", "gradient"), got, exact, strict=True)
    found = {name: ((a.double() - b).abs().max() / b.abs().max()).item() for name, a, b in pairs}
    _free()
    return found


@functools.cache
def _inputs(size: str, batch: str) -> dict[str, Tensor]:
    sentences, mean = BATCHES[batch]
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(mean // 2, mean * 3 // 2, (sentences,), generator=generator)
    ids = torch.randint(10, MODELS[size][-1], (sentences, int(lengths.max())), generator=generator)
    mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
    named = {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}
    return {name: x.to(DEVICE) for name, x in named.items()}


@functools.cache
def _inputs_of(size: str, way: str, batch: str) -> dict:
    """What a way is given of a batch."""
    inputs = _inputs(size, batch)
    if way != "graph":
        return inputs
    rows = [ids[mask != 0].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    sentences, mean = BATCHES[batch]
    step = max(sentences * mean // 16, 1)
    collate = PackingCollator(max_tokens=-(-sum(map(len, rows)) // step) * step, max_samples=sentences)
    packed = collate([{"input_ids": row, "labels": row} for row in rows])
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in packed.items()}


def _allocated() -> int:
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else 0


def _free() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
