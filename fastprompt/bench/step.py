"""One training step, forward and backward, of a PEFT model as it is and after `fastprompt.fuse`.

FASTPROMPT_MODELS=DIR has folders of real models, named as in CONFIGS; one that is not there gets random weights of the
same shape, which changes no time. FASTPROMPT_PAIRS=FILE has sentence pairs as PAWS-X has them (sentence, tab, sentence,
tab, label); without it tokens are random. A ragged batch, padded to its longest, but for the cases named full.

Models are in training mode, with the dropout that their configurations have: encoders 0.1, of weights of attention and
of what the layers add. Results are checked without it, in evaluation mode.

The rivals:
    peft      the PEFT model, as it is
    compiled  `torch.compile` of it
    liger     the PEFT model with Liger's layers in its backbone (GPU)
"""

import functools
import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastprompt
from fastprompt._extras import require

from .case import OURS, Case, Work


class Model(NamedTuple):
    """Sizes of a backbone: of products and of random weights."""

    kind: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int

    @property
    def matrix_parameters(self) -> int:
        """Of the products in the layers."""
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + (2 if self.kind == "encoder" else 3) * self.width * self.inner)

    def config(self):
        transformers = require("transformers", "train")
        sizes = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.inner,
        }
        if self.kind == "encoder":
            sizes["max_position_embeddings"] = 1026  # for the longest prefix, which counts
            return transformers.XLMRobertaConfig(**sizes)
        sizes |= {"num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "tie_word_embeddings": True}
        if self.kind == "llama":
            return transformers.LlamaConfig(**sizes)
        if self.kind == "qwen3":
            return transformers.Qwen3Config(**sizes)
        return transformers.Gemma3TextConfig(**sizes, sliding_window=512)


MODELS = {
    "encoder-12x384": Model("encoder", 12, 384, 12, 12, 32, 1536, 32_000),
    "encoder-12x768": Model("encoder", 12, 768, 12, 12, 64, 3072, 32_000),
    "smollm2-135m": Model("llama", 30, 576, 9, 3, 64, 1536, 49_152),
    "qwen3-0.6b-half": Model("qwen3", 14, 1024, 16, 8, 128, 3072, 151_936),
    "gemma-3-270m": Model("gemma", 18, 640, 4, 1, 256, 2048, 262_144),
}


class Step(NamedTuple):
    """A model, "prompt" or "prefix", and what is labelled: a "class", a pair's "last" token, or "all" tokens."""

    model: str
    kind: str
    labelled: str
    sentences: int = 8
    mean_length: int = 55
    prompt: int = 32
    ragged: bool = True

    @property
    def label(self) -> str:
        name = f"{self.model}-{self.kind}-{self.labelled}-B{self.sentences}-L{self.mean_length}-P{self.prompt}"
        return name if self.ragged else name + "-full"


STEPS = [Step(name, kind, "last") for name in ("smollm2-135m", "gemma-3-270m") for kind in ("prompt", "prefix")]
STEPS += [Step("qwen3-0.6b-half", "prefix", "last")]
STEPS += [Step("smollm2-135m", "prompt", "all"), Step("smollm2-135m", "prefix", "all")]
STEEP = STEPS[-1]  # its real weights enlarge rounding: in float32 PEFT itself is 1.6e-3 off
# With a prompt PEFT pools wrongly.
STEPS += [Step("encoder-12x768", "prefix", "class"), Step("encoder-12x384", "prefix", "class")]
COMPILED, GROWING = STEPS[-2:]
STEPS += [step._replace(ragged=False) for step in STEPS[-2:]]
QUICK = GROWING
SWEEPS = {
    "B": [GROWING._replace(sentences=n) for n in (2, 4, 8, 16, 32)],
    "L": [GROWING._replace(mean_length=n) for n in (16, 32, 64, 128, 256)],
    "P": [GROWING._replace(prompt=n) for n in (8, 32, 128, 512)],
}


def cases() -> list[Case]:
    plain = [_case(step) for step in STEPS]
    return plain + [_upper_half()] + [_case(step, axis) for axis, steps in SWEEPS.items() for step in steps]


def _case(step: Step, sweep: str | None = None) -> Case:
    return Case(
        group="step",
        label=step.label + (f"-grow-{sweep}" if sweep else ""),
        sizes={"B": step.sentences, "L": step.mean_length, "P": step.prompt},
        make=lambda device, dtype, seed: Batch(step, device, dtype, seed, random=sweep is not None).work(),
        # thirty layers; both ways' errors are in the file
        tolerance={torch.float32: 5e-3 if step == STEEP else 1e-3, torch.bfloat16: 0.2},
        quick=step == QUICK and sweep is None,
        sweep=sweep,
        memory=(OURS, "peft"),
    )


class Batch:
    """Models of one case, each made when it is first run: a process that runs one way holds one model."""

    def __init__(self, step: Step, device: str, dtype: torch.dtype, seed: int, random: bool) -> None:
        self.step, self.device, self.dtype, self.seed = step, device, dtype, seed
        folder = Path(os.environ.get("FASTPROMPT_MODELS", "")) / step.model
        self.folder = folder if "FASTPROMPT_MODELS" in os.environ and folder.is_dir() and not random else None
        self.inputs = self._inputs()

    def work(self) -> Work:
        models = {OURS: lambda: self.fused, "peft": lambda: self.stock}
        missing = {}
        if self.step == COMPILED:
            models["compiled"] = lambda: self.compiled
        else:
            missing["compiled"] = f"tried on {COMPILED.model} alone: it takes minutes to compile"
        if self.device == "cpu":
            missing["liger"] = "Liger's kernels need a GPU"
        elif not find_spec("liger_kernel"):
            missing["liger"] = "the package liger-kernel is not installed"
        elif MODELS[self.step.model].kind != "encoder":
            models["liger"] = lambda: self.liger
        ways = {name: lambda model=model: self.run(model().train()) for name, model in models.items()}
        checked = {name: lambda model=model: self.run(model().eval()) for name, model in models.items()}
        return Work(ways, lambda way: self.exact, self.least_flops(), 0, math.inf, missing, checked)

    def make(self, dtype: torch.dtype) -> nn.Module:
        transformers, peft = require("transformers", "train"), require("peft", "bench")
        torch.manual_seed(self.seed)
        classes = self.step.labelled == "class"
        auto = transformers.AutoModelForSequenceClassification if classes else transformers.AutoModelForCausalLM
        config = MODELS[self.step.model].config()
        backbone = auto.from_pretrained(self.folder) if self.folder else auto.from_config(config)
        make = peft.PrefixTuningConfig if self.step.kind == "prefix" else peft.PromptTuningConfig
        adapter = make(task_type="SEQ_CLS" if classes else "CAUSAL_LM", num_virtual_tokens=self.step.prompt)
        return peft.get_peft_model(backbone.to(self.device, dtype), adapter).to(self.device, dtype).train()

    @functools.cached_property
    def stock(self) -> nn.Module:
        return self.make(self.dtype)

    @functools.cached_property
    def compiled(self) -> nn.Module:
        return torch.compile(self.make(self.dtype))

    @functools.cached_property
    def fused(self) -> nn.Module:
        return fastprompt.fuse(self.make(self.dtype)).train()

    @functools.cached_property
    def liger(self) -> nn.Module:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        model = self.make(self.dtype)
        _apply_liger_kernel_to_instance(model=model.get_base_model())
        return model

    @functools.cached_property
    def exact(self) -> list[Tensor]:
        """In float64, fused: PEFT's way stays at float32's error there, as stock layers normalise in float32.

        So it is the tests of `fuse` that hold it to PEFT; here PEFT, which must be right by it too, does so in float32.
        From the weights as they are rounded to the ways' dtype: else it would be another model's step.
        """
        return [x.clone() for x in self.run(fastprompt.fuse(self.make(self.dtype).double()).eval())]

    def run(self, model: nn.Module) -> list[Tensor]:
        loss = model(**self.inputs).loss
        model.zero_grad()
        loss.backward()
        return [loss.detach(), _prompt(model).grad]

    def least_flops(self) -> int:
        """Two products a weight of the layers, forward and for the gradient of what goes in, and as much for labels."""
        model, causal = MODELS[self.step.model], self.step.labelled != "class"
        rows = int(self.inputs["attention_mask"].sum())
        if self.step.kind == "prompt":
            rows += self.step.prompt * (1 if causal else self.step.sentences)
        labelled = int((self.inputs["labels"] != -100).sum()) if causal else 0
        return 4 * (rows * model.matrix_parameters + labelled * model.vocabulary * model.width)

    def _inputs(self) -> dict[str, Tensor]:
        step = self.step
        sentences = self._sentences()
        ids = torch.nn.utils.rnn.pad_sequence(sentences, batch_first=True, padding_value=1)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in sentences], batch_first=True)
        last = mask.sum(1, keepdim=True) - 1
        labels = {
            "last": torch.full_like(ids, -100).scatter(1, last, ids.gather(1, last)),
            "all": ids.masked_fill(mask == 0, -100),
            "class": torch.arange(step.sentences) % 2,
        }[step.labelled]
        named = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: x.to(self.device) for name, x in named.items()}

    def _sentences(self) -> list[Tensor]:
        step, file = self.step, os.environ.get("FASTPROMPT_PAIRS")
        if file and self.folder:
            tokenizer = require("transformers", "train").AutoTokenizer.from_pretrained(self.folder)
            lines = Path(file).read_text("utf-8").splitlines()[: step.sentences]
            rows = (line.rstrip("\n").split("\t") for line in lines)
            texts = (f"{row[0]} {row[1]} Same meaning? {'yes' if row[2] == '1' else 'no'}" for row in rows)
            return [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
        torch.manual_seed(self.seed)
        lengths = torch.full((step.sentences,), step.mean_length)
        if step.ragged:
            lengths = torch.randint(step.mean_length // 2, step.mean_length * 3 // 2, (step.sentences,))
        return [torch.randint(10, MODELS[step.model].vocabulary, (int(length),)) for length in lengths]


def _prompt(model: nn.Module) -> Tensor:
    return getattr(model, "_orig_mod", model).prompt_encoder["default"].embedding.weight


def _upper_half() -> Case:
    """A prefix in the upper half of an encoder, whole and begun from what the frozen lower half gave before."""
    step = GROWING

    def make(device: str, dtype: torch.dtype, seed: int) -> Work:
        batch = Batch(step, device, dtype, seed, random=True)
        torch.manual_seed(seed)
        config = fastprompt.PromptConfig("prefix", step.prompt, layers=range(6, 12))
        backbone = require("transformers", "train").AutoModel.from_config(MODELS[step.model].config())
        model = fastprompt.PromptModel(backbone, config).to(device, dtype).eval()
        inputs = {name: x for name, x in batch.inputs.items() if name != "labels"}
        lower = model.lower_states(**inputs)

        def run(lower_states) -> list[Tensor]:
            loss = model(**inputs, lower_states=lower_states).last_hidden_state.sum(1).square().mean()
            model.zero_grad()
            loss.backward()
            return [loss.detach(), model.prompt.weight.grad]

        exact = functools.cache(lambda: [x.double().clone() for x in run(None)])
        ways = {OURS: lambda: run(lower), "whole (ours)": lambda: run(None)}
        return Work(ways, lambda way: exact(), batch.least_flops() // 2, 0, math.inf)

    sizes = {"B": step.sentences, "L": step.mean_length, "P": step.prompt}
    return Case("step", f"{step.model}-upper-half", sizes, make)
