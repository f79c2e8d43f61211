"""Learners to be exported, of small models in float64, in which everything that trains is far from its beginning."""

from pathlib import Path

import torch
import transformers
from helpers import save_backbone

from fastprompt.models.methods import AdapterConfig, keep_layers
from fastprompt.nn.pooling import pool
from fastprompt.tasks.base import InputConfig
from fastprompt.training import AlignmentConfig
from fastprompt.training.learner import Learner as Plain

P = 3
TEXTS = ["w1 w2 w3 w4 w5", "w6", "w7 w8 w9 w10 w3 w3 w20 w21 w1 w1 w1 w4"]


def load(place: Path, family: str, auto: str = "AutoModel") -> torch.nn.Module:
    more = {"add_pooling_layer": False} if family in ("bert", "xlm-roberta") else {}
    return getattr(transformers, auto).from_pretrained(place, dtype=torch.float64, **more).eval()


class Learner(Plain):
    """A learner and where its backbone is."""

    def __init__(self, folder: Path, family: str, method: str, auto: str = "AutoModel", *, pooling="mean",
                 prefix_text="", max_length=8, aligned=True, model=(), task=None, **options) -> None:  # fmt: skip
        save_backbone(family, folder, auto, **dict(model))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        adapter = AdapterConfig(method, P, lora_rank=2, **options)
        inputs = InputConfig(prefix_text=prefix_text, max_length=max_length, pooling=pooling)
        alignment = AlignmentConfig() if aligned else None
        super().__init__(load(folder, family, auto), tokenizer, adapter, inputs, task, alignment)
        self.double()
        self.place, self.family, self.auto = folder, family, auto
        with torch.no_grad():
            for name, weight in self.trained().items():
                weight.add_(torch.randn_like(weight) * (0.1 if "adapted.backbone" in name else 1))

    def hidden(self, **inputs) -> torch.Tensor:
        return self.adapted(**inputs).detach()

    @torch.no_grad()
    def alone(self, texts, *, source: bool = False) -> torch.Tensor:
        """Their vectors: one text at a time, and of the frozen backbone anew."""
        frozen = load(self.place, self.family)
        if self.adapter.num_layers is not None:
            keep_layers(frozen, self.adapter.num_layers)
        found = []
        for text in texts:
            ids = self.tokenizer(self.inputs.prefix_text + text, truncation=True, max_length=self.inputs.max_length)
            ids = torch.tensor([ids["input_ids"]])
            hidden = frozen(input_ids=ids).last_hidden_state if source else self.hidden(input_ids=ids)
            found.append(pool(hidden, self.inputs.pooling))
        found = torch.cat(found)
        return found if source or self.alignment is None else self.alignment.project(found)
