"""The backbone of a learner, as forms write it: copies that share its weights, LoRA merged, its name."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path

from torch import nn

from fastprompt._extras import require

_LOG = logging.getLogger("fastprompt")
LORA = "lora_"  # in the names of LoRA's weights


def name_of(learner) -> str:
    """The backbone's name on the hub, or the folder that it came from."""
    name = learner.backbone.config._name_or_path
    if not name:
        raise ValueError("the backbone must have come from a folder or the hub, got one without a name: copy_backbone")
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def changed(learner) -> list[str]:
    """Names in the base model of the weights that trained and are its own, as norms and layers are; LoRA's are not."""
    base, prompted = learner.adapted.backbone, learner.adapted.prompted
    loaded = () if prompted is None else prompted.head()  # what came with a prompt, and no longer trains
    return [
        name
        for name, weight in base.named_parameters()
        if LORA not in name and (weight.requires_grad or name in loaded)
    ]


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of a model, with the same tensors in it: modules can be changed in it, and weights be replaced."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def without_lora(model: nn.Module, *, merge: bool) -> nn.Module:
    """A copy, the other weights shared, with LoRA merged into what it adapts by PEFT, or left out."""
    plain = shared_copy(model)
    for name, layer in list(plain.named_modules()):
        if not hasattr(layer, "lora_A"):
            continue
        if merge:
            layer = copy.deepcopy(layer)  # its weights now are its own
            layer.merge(safe_merge=True)
        plain.set_submodule(name, layer.get_base_layer())
    for module in (plain, plain.base_model):
        vars(module).pop("peft_config", None)
        module._hf_peft_config_loaded = False
    return plain


def save(model: nn.Module, tokenizer: Callable, folder: Path) -> None:
    """Write a plain transformers folder."""
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: Callable, folder: Path) -> None:
    """Write a tokenizer, without the length that its last call cut to, which would go into tokenizer.json."""
    tokenizer = copy.deepcopy(tokenizer)
    if getattr(tokenizer, "is_fast", False):
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)


def tell_quantized(learner) -> None:
    """Warn where what is exported names a backbone that was quantised here."""
    if getattr(learner.backbone, "hf_quantizer", None) is not None:
        _LOG.warning(
            "the backbone was quantised in this run, and is named in what is exported as it was before: load it "
            "quantised in the same way for the same results"
        )


def check_plain(learner, to: str) -> None:
    """Raise a ValueError for a quantised backbone, whose weights cannot be added to."""
    if getattr(learner.backbone, "hf_quantizer", None) is not None:
        raise ValueError(f"{to!r} needs a backbone that is not quantised: its weights cannot be added to")


def check_window(learner, to: str) -> None:
    """Raise a ValueError where text would lose sight of a prompt in plain transformers, and not here.

    Under sliding-window attention every row of a `PromptModel` sees the prompt; elsewhere it slides out of view.
    """
    window, config = window_of(learner.backbone.config), learner.adapted.prompted.prompt_config
    if config.prefix_in_window or window is None:
        return
    longest, got = window - config.num_virtual_tokens, learner.inputs.max_length
    if got > longest:
        raise ValueError(
            f"{to!r} needs a max_length of at most {longest} here: in the backbone's attention over {window} tokens a "
            f"longer text loses sight of the prompt outside fastprompt, got {got}"
        )


def window_of(config) -> int | None:
    """How many tokens a token sees, on one side, in those layers that do not see all; None: there are none."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    return None if kinds and "sliding_attention" not in kinds else window


def layers_of(name: str) -> int:
    """How many layers the model of that name has."""
    transformers = require("transformers", "train")
    return transformers.AutoConfig.from_pretrained(name).get_text_config().num_hidden_layers
