"""PEFT's files of a prompt, a prefix or LoRA."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from fastprompt._files import read_json, write_tensors, write_text
from fastprompt.models import checkpoint
from fastprompt.models.packed import packed_model

from .backbone import (
    LORA,
    changed,
    check_window,
    layers_of,
    name_of,
    save,
    save_tokenizer,
    tell_quantized,
    without_lora,
)
from .heads import save_beside, with_head

BACKBONE = "backbone"
_UNLIKE = {
    "PREFIX_IN_SOME_LAYERS": "PEFT's prefix stands in every layer, this one in some (layers)",
    "PREFIX_OF_ENCODER_DECODER": "PEFT reads the prefix of an encoder-decoder in another way",
    "WITHOUT_POSITION_OFFSET": "PEFT's text begins behind the prefix, and this one's does not (position_offset 'none')",
    "POOLS_TEXT": "PEFT's pooler reads the prompt's first row, and this one's that of the text",
    "WITH_ADAPTERS": "PEFT has no bottleneck adapters beside a prompt (adapter_size)",
}


def write(learner, directory: Path, copy_backbone: bool) -> dict:
    """Write adapter_config.json and adapter_model.safetensors, for `peft.PeftModel.from_pretrained`.

    Returns:
        "beside": what else trained, in a file of fastprompt's own; "model": what is loaded from the folder.

    Raises:
        ValueError: PEFT has nothing of the kind, or would compute something else.
    """
    if not copy_backbone:
        tell_quantized(learner)
    prompted, base, source = learner.adapted.prompted, learner.adapted.backbone, name_of(learner)
    has_lora = any(LORA in name for name, _ in base.named_parameters())
    if prompted is None and not has_lora:
        raise ValueError("'peft' is for methods prompt, prefix and lora: 'merged' fits this run")
    if prompted is None and changed(learner):
        raise ValueError("'peft' is for LoRA alone, and norms or layers trained beside it: 'merged' fits this run")
    layers = base.config.get_text_config().num_hidden_layers
    if not copy_backbone and layers != layers_of(source):
        raise ValueError(
            f"'peft' needs copy_backbone=True here: the run uses the first {layers} layers of {source} (num_layers), "
            "which then stand beside the adapter as a model of their own; over all of them PEFT gives something else"
        )
    model, head = with_head(learner)
    if prompted is not None and prompted.prompt_config.kind == "prompt":
        model, head = learner.backbone, []  # PEFT's own pass of a prompt for token classification fails
    if prompted is None:
        write_lora(model, directory, source, head)
    else:
        check_window(learner, "peft")
        _write_prompt(learner, directory, model, head)
    if copy_backbone:
        save(without_lora(learner.backbone, merge=False), learner.tokenizer, directory / BACKBONE)
        about = read_json(directory / checkpoint.CONFIG) | {"base_model_name_or_path": f"./{BACKBONE}"}
        write_text(directory / checkpoint.CONFIG, json.dumps(about, indent=2) + "\n")
    save_tokenizer(learner.tokenizer, directory)
    return {"beside": save_beside(learner, directory, task=not head), "model": model}


def write_lora(model: nn.Module, directory: Path, source: str, head: Sequence[str] = ()) -> None:
    """Write LoRA's files as a `peft.PeftModel` of the model does; its base model has LoRA in it."""
    # An encoder-decoder is adapted whole, of others the base model.
    holder = model if "peft_config" in vars(model) else model.base_model
    config = copy.deepcopy(holder.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = source, True
    config.task_type = checkpoint.task_type(model)
    config.modules_to_save = sorted({name.rpartition(".")[0] for name in head}) or None
    config.save_pretrained(directory)
    wanted = {name: weight for name, weight in model.state_dict().items() if LORA in name or name in head}
    weights = {f"base_model.model.{name.replace('.default.', '.')}": weight for name, weight in wanted.items()}
    write_tensors(directory / checkpoint.WEIGHTS, weights)


def _write_prompt(learner, directory: Path, model: nn.Module, head: Sequence[str]) -> None:
    prompted = learner.adapted.prompted
    if model is prompted.backbone:
        prompted.save_pretrained(directory)
    else:  # a prompt over the base model of one with a head, which PEFT's model has too
        inside = [f"{model.base_model_prefix}.{name}" for name in prompted.head()]
        options = {"head": [*inside, *head], "adapters": prompted.adapters}
        checkpoint.save(prompted.prompt_config, packed_model(model, fused=True), prompted.prompt, directory, **options)
    kind = read_json(directory / checkpoint.CONFIG)["peft_type"].removeprefix("FASTPROMPT_")
    if kind in _UNLIKE:
        raise ValueError(f"'peft' does not fit this run: {_UNLIKE[kind]}")
