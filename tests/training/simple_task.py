"""A task of one's own, in a file of one's own: which of two classes a pair of texts is of, by a linear head."""

import random

import torch
import torch.nn.functional as F
from torch import nn

from fastprompt.data.examples import Text
from fastprompt.models.packed.layout import tensor_on
from fastprompt.tasks.base import Item, Task, joined, run_sorted


class Classes(Task):
    """It reads the pooled vector of both texts; what stands nowhere (an empty text) gives nothing to learn from."""

    name = "classes"
    columns = {"text": "a text", "text_pair": "another", "label": "its class"}
    labels = ("label",)
    metric = "accuracy"

    def __init__(self, labels=()):
        super().__init__()
        self.classes = list(labels)

    def settings(self):
        return {"labels": self.classes}

    def example(self, row, where, number, *, labelled=True):
        return Text(row.get("id", number), row["text"], row["text_pair"], row["label"] if labelled else None)

    def fit(self, examples):
        self.classes = self.classes or sorted({each.label for each in examples})

    def build(self, backbone, tokenizer, inputs):
        self.tokenizer, self.inputs = tokenizer, inputs
        self.head = nn.Linear(backbone.base_model.config.hidden_size, len(self.classes), dtype=backbone.dtype)
        nn.init.normal_(self.head.weight, std=0.1)

    def encode(self, examples):
        items = []
        for n, each in enumerate(examples):
            if not each.text:
                continue
            ids = self.tokenizer(each.text, each.text_pair)["input_ids"]
            second = ids.index(self.tokenizer.convert_tokens_to_ids("</s>")) + 1
            target = None if each.label is None else self.classes.index(each.label)
            longest = self.inputs.max_length
            items.append(Item(ids[:longest], min(second, longest), target, n, len(ids) > longest))
        return items

    def logits(self, segments):
        return self.head(segments.pooled(self.inputs.pooling))

    def loss(self, segments, items):
        targets = tensor_on([item.target for item in items], segments.hidden.device)
        return F.cross_entropy(self.logits(segments).float(), targets, reduction="sum")

    def align(self, pairs, chosen, rng: random.Random):
        made = []
        for a, b in zip(chosen[::2], chosen[1::2], strict=False):
            texts = [[(rng.choice((pairs[n].source, pairs[n].target)), n)] for n in (a, b)]
            made.append(joined(self.tokenizer, texts, "", self.inputs.max_length))
        return made

    def predict(self, model, examples, batch_size=32, on_batch=None):
        items = self.encode([each._replace(label=None) for each in examples])
        found = run_sorted(model, items, lambda segments, _: self.logits(segments).softmax(1), batch_size, on_batch)
        return [{"prediction": self.classes[int(p.argmax())], "probability": float(p.max())} for p in found]

    def scores(self, examples, predictions, language="en"):
        right = [each.label == found["prediction"] for each, found in zip(examples, predictions, strict=True)]
        return {"accuracy": 100 * torch.tensor(right).float().mean().item()}
