"""Loading a backbone and its tokenizer: whole, or one clear error."""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fastprompt._extras import require

DTYPES = ("float32", "bfloat16", "float16", "auto")
QUANTIZATIONS = ("8bit", "4bit")
HEADS = ("auto", "none")


def load_backbone(
    name: str,
    device: str | torch.device | None = None,
    *,
    dtype: str = "float32",
    quantization: str | None = None,
    head: str = "auto",
) -> tuple[nn.Module, Callable]:
    """A model in evaluation mode, and its tokenizer.

    Args:
        name: a folder as `save_pretrained` writes it, or a model's name on the hub.
        device: where it goes; None: a GPU where there is one.
        dtype: of the weights: "float32", "bfloat16", "float16", or "auto", as they were saved.
        quantization: "8bit" or "4bit" (NF4): the weights of linear layers by bitsandbytes; None: none.
        head: "auto": with its language-model head where the model writes (decoders and encoder-decoders), unless the
            decoder was saved without one; encoders come without a head. "none": the base model alone.

    Raises:
        ValueError: it cannot be loaded, lacks weights or has some that have no place, has no tokenizer, or an argument
            is none of those above.
        ImportError: quantization without bitsandbytes.
    """
    transformers = require("transformers", "train")
    for argument, value, known in (("dtype", dtype, DTYPES), ("head", head, HEADS)):
        if value not in known:
            raise ValueError(f"{argument} must be one of {known}, got {value!r}")
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {QUANTIZATIONS} or None, got {quantization!r}")
    place = find_device(device)
    more = {} if quantization is None else {"quantization_config": _quantized(quantization, dtype)}
    config = _read(name, "config.json", lambda: transformers.AutoConfig.from_pretrained(name, trust_remote_code=False))
    ready = quantization is not None or getattr(config, "quantization_config", None) is not None
    if ready:
        more["device_map"] = {"": place}  # such weights are made where they stay
    kind = transformers.AutoModel if head == "none" else _with_head(config)
    if kind is transformers.AutoModel:
        more |= without_pooler(config)
    more |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # all that is wrong is told below
    options = more | {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), "trust_remote_code": False}
    with _without_report():
        model, found = _read(name, "weights", lambda: kind.from_pretrained(name, config=config, **options))
    _check_found(name, model, found)
    tokenizer = load_tokenizer(name)
    model.eval()
    return (model if ready else model.to(place)), tokenizer


def without_pooler(config) -> dict[str, bool]:
    """What AutoModel is told to leave out an encoder's pooler, where the family has one.

    It reads one row and is often not in the weights: no vector here comes from it.
    """
    kind = require("transformers", "train").MODEL_MAPPING.get(type(config), None)
    has_pooler = kind is not None and "add_pooling_layer" in inspect.signature(kind).parameters
    return {"add_pooling_layer": False} if has_pooler else {}


def load_tokenizer(name: str) -> Callable:
    """The tokenizer of a model's folder, or of its name on the hub.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    transformers = require("transformers", "train")
    tokenizer = _read(
        name, "tokenizer", lambda: transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    )
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):  # made of nothing but its class
        raise ValueError(f"backbone {name!r} has no tokenizer: its vocabulary is not there")
    return tokenizer


def find_device(name: str | torch.device | None) -> torch.device:
    """The device of that name; without one, a GPU where there is one.

    Raises:
        ValueError: torch knows no such device, or it is not here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
        torch.empty(0, device=place)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(f"device must be one that is here, such as 'cpu', got {name!r}: {_one_line(error)}") from None
    return place


def _read(name: str, what: str, load: Callable):
    """What `load` gives. A broken file raises whatever the reader that met it has: it is told in one line."""
    try:
        return load()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:  # a tokenizer's or quantiser's own needs
        raise ImportError(f"backbone {name!r} needs more to be installed: {_one_line(error)}") from error
    except OSError as error:
        raise ValueError(
            f"backbone {name!r} must be a model's folder or its name on the hub ({what}): {_one_line(error)}"
        ) from error
    except Exception as error:
        raise ValueError(
            f"backbone {name!r} is damaged, or unknown to transformers ({what}): {_one_line(error)}"
        ) from error


@contextmanager
def _without_report() -> Iterator[None]:
    """Without transformers' table of weights that fit nowhere: what is wrong with them is told by `_check_found`."""
    log = logging.getLogger("transformers.modeling_utils")

    def wanted(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in str(record.msg)

    log.addFilter(wanted)
    try:
        yield
    finally:
        log.removeFilter(wanted)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _quantized(quantization: str, dtype: str):
    """transformers' configuration of bitsandbytes, which says itself where it finds no device that it can use."""
    transformers = require("transformers", "train")
    require("bitsandbytes", "quantization")
    if quantization == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _with_head(config):
    """The class that loads a model with its head, where it writes. An encoder may have a causal language model's class
    as well, beside a masked one's.
    """
    transformers = require("transformers", "train")
    kind = type(config)
    if getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModelForSeq2SeqLM
    causal = kind in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and kind not in transformers.MODEL_FOR_MASKED_LM_MAPPING
    headless = kind in transformers.MODEL_MAPPING and config.architectures == [
        transformers.MODEL_MAPPING[kind].__name__  # such as the decoders that give vectors
    ]
    return transformers.AutoModelForCausalLM if causal and not headless else transformers.AutoModel


def _check_found(name: str, model: nn.Module, found: dict) -> None:
    """A weight that is not there would be random numbers, and one without a place would not be read.

    What a head reads, and lies outside the base model, is not missed there.
    """
    unlike = [f"{key} is {tuple(got)}, not {tuple(want)}" for key, got, want in sorted(found["mismatched_keys"])]
    missing = sorted(set(found["missing_keys"]) - {key for key, *_ in found["mismatched_keys"]})
    inside = {part for part, _ in model.base_model.named_children()}
    unexpected = sorted(
        key
        for key in found["unexpected_keys"]
        if key.removeprefix(model.base_model_prefix + ".").split(".")[0] in inside
        and not key.endswith(("position_ids", "token_type_ids", "inv_freq"))
    )
    for what, keys in (
        ("has weights of another shape than its configuration", unlike),
        ("lacks weights of its configuration", missing),
        ("has weights without a place", unexpected),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(f"backbone {name!r} {what}: {', '.join(keys[:3])}{more}")
