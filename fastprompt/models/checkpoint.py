"""Prompts on disk, in PEFT's format: what PEFT wrote loads here, and the other way round."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastprompt._files import write_tensors, write_text
from fastprompt.nn import Prefix, Prompt

from .config import PromptConfig
from .initial import chosen_layers, new_prompt

WEIGHTS, CONFIG, OWN_CONFIG = "adapter_model.safetensors", "adapter_config.json", "fastprompt_config.json"
ENCODER, ADAPTERS = "encoder.safetensors", "adapters.safetensors"
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


def save(model, prompt: Prompt | Prefix, directory: Path, others: Sequence[str] = ()) -> None:
    """Write one prompt of a model, and the names of the others that go with it."""
    directory.mkdir(parents=True, exist_ok=True)
    config, geometry = model.config, model._packed.geometry
    whole = config.kind == "prompt" or len(prompt.layers) == geometry.layers
    # PEFT has no prefix in some layers only, and no adapters beside it: it must refuse such a file.
    peft_type = PEFT_TYPES[config.kind] if whole else "FASTPROMPT_PREFIX_IN_SOME_LAYERS"
    peft_type = peft_type if model.adapters is None else "FASTPROMPT_WITH_ADAPTERS"
    name = type(model.backbone).__name__
    task = next((task for ending, task in _HEADS.items() if name.endswith(ending)), "FEATURE_EXTRACTION")
    head = model.head()
    modules = sorted({name.split(".")[0] for name in head})
    kv_heads = geometry.kv_heads if config.kind == "prefix" else model.backbone.config.num_attention_heads
    peft_config = {
        "peft_type": peft_type,
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
    own = dataclasses.asdict(config) | {"other_prompts": list(others)}
    own["layers"] = list(prompt.layers) if config.kind == "prefix" and not whole else None
    own["init_ids"] = None if config.init_ids is None else list(config.init_ids)
    own |= {"encoder": None, "encoder_hidden_size": None}  # this prompt's: others may have been loaded without theirs
    if prompt.encoder is not None:
        own |= {"encoder": prompt.encoder.name, "encoder_hidden_size": prompt.encoder.hidden_size}
        own |= {"init": "random", "init_ids": None}
        write_tensors(directory / ENCODER, prompt.state_dict())
    if model.adapters is not None:
        write_tensors(directory / ADAPTERS, model.adapters.state_dict())
    write_tensors(directory / WEIGHTS, {KEY: prompt.encoded()} | {HEAD_PREFIX + n: p for n, p in head.items()})
    write_text(directory / OWN_CONFIG, json.dumps(own, indent=2) + "\n")
    write_text(directory / CONFIG, json.dumps(peft_config, indent=2) + "\n")


def load(cls, backbone: nn.Module, directory: Path, trainable: bool):
    """See `PromptModel.from_pretrained`."""
    config, tensors, others = _read(directory)
    model = cls(backbone, _start(config, config, trainable))
    model.config = config
    _fill(model.prompt, tensors.pop(KEY), directory)
    if model.adapters is not None:
        _load_state(model.adapters, directory, ADAPTERS)
    parameters = dict(backbone.named_parameters())
    for name, tensor in tensors.items():
        name = name.removeprefix(HEAD_PREFIX)
        if name not in parameters or parameters[name].shape != tensor.shape:
            have = tuple(parameters[name].shape) if name in parameters else "no such parameter"
            raise ValueError(f"{name} in {directory} must fit the backbone: {have}, got {tuple(tensor.shape)}")
        parameters[name].data.copy_(tensor)
    for name in others:
        model.load_prompt(name, directory / name, trainable=trainable)
    return model


def load_prompt(model, directory: Path, trainable: bool) -> Prompt | Prefix:
    """The prompt in a folder, for the bank of `model`."""
    config, tensors, _ = _read(directory)
    own = model.config
    settings = {"kind": (config.kind, own.kind), "position_offset": (config.position_offset, own.position_offset)}
    if config.kind == own.kind == "prefix":
        settings["layers"] = tuple(chosen_layers(each, model._packed.geometry.layers) for each in (config, own))
    for name, (got, expected) in settings.items():
        if got != expected:
            raise ValueError(f"{name} of the prompt in {directory} must be {expected!r}, as the model's, got {got!r}")
    prompt = new_prompt(_start(own, config, trainable), model._packed)
    _fill(prompt, tensors[KEY], directory)
    return prompt


def _read(directory: Path) -> tuple[PromptConfig, dict[str, Tensor], list[str]]:
    """The configuration in a folder, its tensors, and the names of the other prompts in its subfolders."""
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"directory must hold {name}, which is not in {directory}")
    others = []
    if (directory / OWN_CONFIG).is_file():
        own = json.loads((directory / OWN_CONFIG).read_text(encoding="utf-8"))
        others = own.pop("other_prompts", others)
        config = PromptConfig(**own)
    else:  # PEFT wrote it
        peft_config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        kind = KINDS.get(peft_config.get("peft_type"))
        if kind is None:
            raise ValueError(
                f"peft_type in {directory / CONFIG} must be one of {tuple(KINDS)}, got {peft_config.get('peft_type')!r}"
            )
        config = PromptConfig(kind, peft_config["num_virtual_tokens"], prefix_in_window=True)
    tensors = load_file(directory / WEIGHTS)
    if KEY not in tensors:
        raise ValueError(f"{directory / WEIGHTS} must hold {KEY!r}, got {sorted(tensors)}")
    return config, tensors, others


def _start(config: PromptConfig, stored: PromptConfig, trainable: bool) -> PromptConfig:
    """`config`, for a prompt that begins at what a file holds: no pass for it, and an encoder only if it trains on."""
    encoder, hidden_size = (stored.encoder, stored.encoder_hidden_size) if trainable else (None, None)
    begin = {"init": "random", "init_ids": None, "init_scale": 0.0}
    return dataclasses.replace(config, **begin, encoder=encoder, encoder_hidden_size=hidden_size)


@torch.no_grad()
def _fill(prompt: Prompt | Prefix, rows: Tensor, directory: Path) -> None:
    expected = prompt.encoded().shape
    if rows.shape != expected:
        raise ValueError(
            f"{KEY} in {directory / WEIGHTS} must be {tuple(expected)} for this backbone, got {tuple(rows.shape)}"
        )
    if prompt.encoder is None:
        prompt.weight.copy_(rows)
        return
    _load_state(prompt, directory, ENCODER)
    encoded = prompt.encoded()
    if not torch.allclose(encoded, rows.to(encoded), rtol=0, atol=1e-2 * float(encoded.abs().max())):
        raise ValueError(f"{ENCODER} in {directory} makes another prompt than the one beside it: files were mixed")


def _load_state(module: nn.Module, directory: Path, name: str) -> None:
    file = directory / name
    if not file.is_file():
        why = " to go on training" if name == ENCODER else ""
        raise FileNotFoundError(f"directory must hold {name}{why}, which is not in {directory}")
    tensors = load_file(file)
    shapes, got = ({name: tuple(t.shape) for name, t in each.items()} for each in (module.state_dict(), tensors))
    if got != shapes:
        raise ValueError(f"{file} must hold {shapes}, got {got}")
    module.load_state_dict(tensors)
