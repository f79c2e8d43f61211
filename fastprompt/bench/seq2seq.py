"""One training step of an encoder-decoder, forward and backward, of a PEFT model as it is and after `fastprompt.fuse`.

Texts and their targets are ragged, of random tokens and weights, in training mode without dropout. See `step.py`.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastprompt
from fastprompt._extras import require

from .case import OURS, Case, Work


class Model(NamedTuple):
    """Sizes of a backbone; as many layers on either side."""

    family: str
    layers: int
    width: int
    heads: int
    head_dim: int
    inner: int
    vocabulary: int

    def config(self):
        transformers = require("transformers", "train")
        if self.family == "mt5":
            return transformers.MT5Config(
                vocab_size=self.vocabulary,
                d_model=self.width,
                d_kv=self.head_dim,
                d_ff=self.inner,
                num_layers=self.layers,
                num_heads=self.heads,
                dropout_rate=0.0,
            )
        sides = {"layers": self.layers, "attention_heads": self.heads, "ffn_dim": self.inner, "layerdrop": 0.0}
        both = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
        off = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
        sizes = {"vocab_size": self.vocabulary, "d_model": self.width, "activation_function": "relu"}
        return transformers.M2M100Config(**sizes, **both, **off, scale_embedding=True)

    def matrix_parameters(self, cross: bool) -> int:
        """Of one side's products that read its own rows, and not the other's as two of cross-attention do."""
        attention = 2 * self.width * self.heads * self.head_dim
        inner = (3 if self.family == "mt5" else 2) * self.width * self.inner
        return self.layers * (attention * (3 if cross else 2) + inner)


class Step(NamedTuple):
    """A model, "prompt" or "prefix", and sizes of a batch."""

    model: str
    kind: str
    sentences: int = 8
    mean_length: int = 55
    prompt: int = 32

    @property
    def label(self) -> str:
        return f"{self.model}-{self.kind}-B{self.sentences}-L{self.mean_length}-P{self.prompt}"


MODELS = {
    "mt5-small": Model("mt5", 8, 512, 6, 64, 1024, 250_112),
    "nllb-600m": Model("m2m_100", 12, 1024, 16, 64, 4096, 256_206),
}
STEPS = [Step(name, kind) for name in MODELS for kind in ("prompt", "prefix")]


def cases() -> list[Case]:
    return [
        Case(
            group="step",
            label=step.label,
            sizes={"B": step.sentences, "L": step.mean_length, "P": step.prompt},
            make=lambda device, dtype, seed, step=step: Batch(step, device, dtype, seed).work(),
            tolerance={torch.float32: 1e-3, torch.bfloat16: 0.2},
            memory=(OURS, "peft"),
        )
        for step in STEPS
    ]


class Batch:
    """Models of one case, each made when it is first run: a process that runs one way holds one model."""

    def __init__(self, step: Step, device: str, dtype: torch.dtype, seed: int) -> None:
        self.step, self.device, self.dtype, self.seed = step, device, dtype, seed
        torch.manual_seed(seed)
        (ids, mask), (labels, there) = self._texts(), self._texts()
        named = {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(there == 0, -100)}
        self.inputs = {name: x.to(device) for name, x in named.items()}

    def work(self) -> Work:
        ways = {OURS: lambda: self.run(self.fused), "peft": lambda: self.run(self.stock)}
        return Work(ways, lambda way: self.exact, self.least_flops(), 0, math.inf)

    def make(self, dtype: torch.dtype) -> nn.Module:
        transformers, peft = require("transformers", "train"), require("peft", "bench")
        torch.manual_seed(self.seed)
        backbone = transformers.AutoModelForSeq2SeqLM.from_config(MODELS[self.step.model].config())
        model, sizes = MODELS[self.step.model], {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": self.step.prompt}
        if self.step.kind == "prefix":  # PEFT takes mT5's heads for slices of its width
            sizes |= {"token_dim": model.heads * model.head_dim, "num_attention_heads": model.heads}
        adapter = (peft.PrefixTuningConfig if self.step.kind == "prefix" else peft.PromptTuningConfig)(**sizes)
        return peft.get_peft_model(backbone.to(self.device, dtype), adapter).to(self.device, dtype).train()

    @functools.cached_property
    def stock(self) -> nn.Module:
        return self.make(self.dtype)

    @functools.cached_property
    def fused(self) -> nn.Module:
        return fastprompt.fuse(self.make(self.dtype)).train()

    @functools.cached_property
    def exact(self) -> list[Tensor]:
        """In float64, from the weights as they are rounded to the ways' dtype."""
        return [x.clone() for x in self.run(self.make(self.dtype).double())]

    def run(self, model: nn.Module) -> list[Tensor]:
        loss = model(**self.inputs).loss
        model.zero_grad()
        loss.backward()
        return [loss.detach(), model.prompt_encoder["default"].embedding.weight.grad]

    def least_flops(self) -> int:
        """Two products a weight forward, and as much for the gradient of what goes in, where something below trains."""
        model, step = MODELS[self.step.model], self.step
        rows, targets = int(self.inputs["attention_mask"].sum()), int((self.inputs["labels"] != -100).sum())
        trains = step.kind == "prompt"
        if trains:
            rows += step.prompt * step.sentences
        read = 2 * model.layers * model.width * model.heads * model.head_dim * rows  # by cross-attention
        encoder = (model.matrix_parameters(False) * rows + read) * (2 if trains else 1)
        decoder = (model.matrix_parameters(True) + model.vocabulary * model.width) * targets * 2
        return 2 * (encoder + decoder)

    def _texts(self) -> tuple[Tensor, Tensor]:
        """Ids (B, L), and where they are."""
        step, vocabulary = self.step, MODELS[self.step.model].vocabulary
        lengths = torch.randint(step.mean_length // 2, step.mean_length * 3 // 2, (step.sentences,))
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return torch.randint(10, vocabulary, mask.shape).masked_fill(mask == 0, 1), mask
