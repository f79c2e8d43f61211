"""What trains beside the backbone: a task's head where transformers has such a one, else a file of its own."""

from pathlib import Path

import torch
from torch import nn

from fastprompt._extras import require
from fastprompt._files import write_tensors

BESIDE = "fastprompt_head.safetensors"


def with_head(learner) -> tuple[nn.Module, list[str]]:
    """The model that transformers has for what was trained, over the learner's own modules, and its head's weights.

    For tagging by one linear layer it is a model for token classification, else the backbone as it was given.
    """
    backbone, task = learner.backbone, learner.task
    head = getattr(task, "head", None) if getattr(task, "name", None) == "tagging" else None
    if type(head) is not nn.Linear:
        return backbone, []
    transformers = require("transformers", "train")
    base, config = backbone.base_model, type(backbone.config).from_dict(backbone.config.to_dict())
    if type(config) not in transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        return backbone, []
    config._name_or_path = backbone.config._name_or_path
    config.id2label = dict(enumerate(task.tags))
    config.label2id = {tag: n for n, tag in enumerate(task.tags)}
    with torch.device("meta"):
        model = transformers.AutoModelForTokenClassification.from_config(config)
    prefix = model.base_model_prefix
    own = {name: weight for name, weight in model.named_parameters() if not name.startswith(f"{prefix}.")}
    names = {name.rpartition(".")[0] for name in own}
    # Some families put more than a linear layer there.
    if len(names) != 1 or {name.rpartition(".")[2] for name in own} != {"weight", "bias"}:
        return backbone, []
    setattr(model, prefix, base)
    model.config._attn_implementation = base.config._attn_implementation
    (place,) = names
    dtype = base.get_input_embeddings().weight.dtype
    linear = nn.Linear(head.in_features, head.out_features, device="meta")
    linear.weight, linear.bias = (nn.Parameter(each.detach().to(dtype)) for each in (head.weight, head.bias))
    model.set_submodule(place, linear)
    return model.eval(), list(own)


def save_beside(learner, directory: Path, *, task: bool = True, projection: bool = True) -> list[str]:
    """Write a task's head and the alignment's projection into a file of its own, if there are such; their names in it.

    Plain transformers and PEFT do not read it: hidden states, and a language model's logits, are without it.

    Args:
        task, projection: whether they are to be in it.
    """
    parts = {"task": learner.task if task else None, "projection": learner.alignment if projection else None}
    tensors = {
        f"{part}.{name}": weight
        for part, module in parts.items()
        if module is not None
        for name, weight in module.named_parameters()
    }
    if tensors:
        write_tensors(directory / BESIDE, tensors)
    return list(dict.fromkeys(name.split(".")[0] for name in tensors))
