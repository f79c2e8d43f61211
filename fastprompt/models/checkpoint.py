"""Prompts on disk, in PEFT's format: what PEFT wrote loads here, and the other way round."""

import dataclasses
import json
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from fastprompt._files import write_tensors, write_text

from .config import PromptConfig

WEIGHTS, CONFIG, OWN_CONFIG = "adapter_model.safetensors", "adapter_config.json", "fastprompt_config.json"
KEY = "prompt_embeddings"
HEAD_PREFIX = "base_model."  # what PEFT puts before the names of a trained head
PEFT_TYPES = {"prefix": "PREFIX_TUNING", "prompt": "PROMPT_TUNING"}
KINDS = {"PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt", "P_TUNING": "prompt"}
_HEADS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def save(model, directory: Path) -> None:
    """See `PromptModel.save_pretrained`."""
    directory.mkdir(parents=True, exist_ok=True)
    config, geometry = model.config, model._packed.geometry
    whole = config.kind == "prompt" or len(model.prompt.layers) == geometry.layers
    name = type(model.backbone).__name__
    task = next((task for ending, task in _HEADS.items() if name.endswith(ending)), "FEATURE_EXTRACTION")
    head = model.head()
    modules = sorted({name.split(".")[0] for name in head})
    kv_heads = geometry.kv_heads if config.kind == "prefix" else model.backbone.config.num_attention_heads
    peft_config = {
        # PEFT has no prefix in some layers only: it must refuse such a file, not put it into the wrong ones.
        "peft_type": PEFT_TYPES[config.kind] if whole else "FASTPROMPT_PREFIX_IN_SOME_LAYERS",
        "task_type": task,
        "base_model_name_or_path": model.backbone.config._name_or_path,
        "inference_mode": True,
        "num_virtual_tokens": config.num_virtual_tokens,
        "token_dim": kv_heads * geometry.head_dim if config.kind == "prefix" else geometry.hidden,
        "num_transformer_submodules": 1,
        "num_attention_heads": kv_heads,
        "num_layers": geometry.layers,
        "modules_to_save": modules or None,
    }
    own = dataclasses.asdict(config)
    own["layers"] = list(model.prompt.layers) if config.kind == "prefix" and not whole else None
    own["init_ids"] = None if config.init_ids is None else list(config.init_ids)
    write_tensors(directory / WEIGHTS, {KEY: model.prompt.weight} | {HEAD_PREFIX + n: p for n, p in head.items()})
    write_text(directory / OWN_CONFIG, json.dumps(own, indent=2) + "\n")
    write_text(directory / CONFIG, json.dumps(peft_config, indent=2) + "\n")


def load(cls, backbone: nn.Module, directory: Path):
    """See `PromptModel.from_pretrained`."""
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"directory must hold {name}, which is not in {directory}")
    peft_config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    if (directory / OWN_CONFIG).is_file():
        config = PromptConfig(**json.loads((directory / OWN_CONFIG).read_text(encoding="utf-8")))
    else:  # PEFT wrote it
        kind = KINDS.get(peft_config.get("peft_type"))
        if kind is None:
            raise ValueError(
                f"peft_type in {directory / CONFIG} must be one of {tuple(KINDS)}, got {peft_config.get('peft_type')!r}"
            )
        config = PromptConfig(kind, peft_config["num_virtual_tokens"], prefix_in_window=True)
    tensors = load_file(directory / WEIGHTS)
    if KEY not in tensors:
        raise ValueError(f"{directory / WEIGHTS} must hold {KEY!r}, got {sorted(tensors)}")
    # The weights come from the file: begin at nothing that costs a pass or draws random numbers.
    start = dataclasses.replace(config, init="random", init_ids=None, init_scale=0.0)
    model = cls(backbone, start)
    model.config = config
    weight = tensors.pop(KEY)
    if weight.shape != model.prompt.weight.shape:
        raise ValueError(
            f"{KEY} in {directory / WEIGHTS} must be {tuple(model.prompt.weight.shape)} for this backbone, "
            f"got {tuple(weight.shape)}"
        )
    model.prompt.weight.data.copy_(weight)
    parameters = dict(backbone.named_parameters())
    for name, tensor in tensors.items():
        name = name.removeprefix(HEAD_PREFIX)
        if name not in parameters or parameters[name].shape != tensor.shape:
            have = tuple(parameters[name].shape) if name in parameters else "no such parameter"
            raise ValueError(f"{name} in {directory} must fit the backbone: {have}, got {tuple(tensor.shape)}")
        parameters[name].data.copy_(tensor)
    return model
