"""Prompts on disk, in PEFT's format: what PEFT wrote loads here, and the other way round."""

import dataclasses
import glob
import json
import logging
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

import huggingface_hub
import torch
from torch import Tensor, nn

from fastprompt._files import (
    CHECKSUM,
    check_json,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)
from fastprompt.nn import Prefix, Prompt

from .config import PromptConfig
from .packed import PackedBackbone, PackedEncoderDecoder
from .prompt_init import chosen_layers, new_prompt

WEIGHTS, CONFIG, OWN_CONFIG = "adapter_model.safetensors", "adapter_config.json", "fastprompt_config.json"
ENCODER, ADAPTERS = "encoder.safetensors", "adapters.safetensors"
PICKLED = "adapter_model.bin"  # what older versions of PEFT wrote, and it still writes with safe_serialization=False
KEY = "prompt_embeddings"
BACKBONE = "base_model."  # what PEFT puts before the names of the backbone's weights
PEFT_TYPES = {"prefix": "PREFIX_TUNING", "prompt": "PROMPT_TUNING"}
KINDS = {"PREFIX_TUNING": "prefix", "CARTRIDGE": "prefix", "PROMPT_TUNING": "prompt", "P_TUNING": "prompt"}
KINDS |= {"CPT": "prompt"}
_PEFTS = {"auto_mapping", "peft_version", "revision"}  # PEFT writes them into adapter_config.json, and we do not
_MORE = ("other_prompts", "files")  # in our own file, beside the fields of PromptConfig
_LOG = logging.getLogger("fastprompt")
_HEADS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def save(
    config: PromptConfig,
    packed: PackedBackbone | PackedEncoderDecoder,
    prompt: Prompt | Prefix,
    directory: Path,
    *,
    head: Collection[str] = (),
    adapters: nn.Module | None = None,
    others: Sequence[str] = (),
) -> None:
    """Write a prompt, and what goes with it.

    Args:
        config: that the prompt was made by.
        packed: the backbone; of its weights those that its base model does not bring are written beside the prompt.
        prompt: what is written.
        directory: where.
        head: names of weights of the backbone that are written in any case, such as a task's head.
        adapters: in the backbone's layers, if any.
        others: names of the other prompts that go with it, in subfolders.
    """
    directory.mkdir(parents=True, exist_ok=True)
    geometry, backbone = packed.geometry, packed.model
    whole = config.kind == "prompt" or list(prompt.layers) == list(range(geometry.layers))
    # PEFT has nothing of the kind, and would predict something else: it must refuse such a file.
    unlike = {
        "PREFIX_IN_SOME_LAYERS": not whole,
        # There it hands one to two layers each.
        "PREFIX_OF_ENCODER_DECODER": config.kind == "prefix" and backbone.config.is_encoder_decoder,
        "WITHOUT_POSITION_OFFSET": config.position_offset == "none",
        "POOLS_TEXT": config.kind == "prompt" and not config.pools_prompt and packed.pools_first_row,
        "WITH_ADAPTERS": adapters is not None,
    }
    peft_type = next((f"FASTPROMPT_{what}" for what, so in unlike.items() if so), PEFT_TYPES[config.kind])
    modules = sorted({name.split(".")[0] for name in head if _of_head(backbone, name)})
    kv_heads = geometry.kv_heads if config.kind == "prefix" else backbone.config.num_attention_heads
    peft_config = {
        "peft_type": peft_type,
        "task_type": task_type(backbone),
        "base_model_name_or_path": backbone.config._name_or_path,
        "inference_mode": True,
        "num_virtual_tokens": config.num_virtual_tokens,
        "token_dim": kv_heads * geometry.head_dim if config.kind == "prefix" else geometry.hidden,
        "num_transformer_submodules": 1,
        "num_attention_heads": kv_heads,
        "num_layers": geometry.layers,
        "modules_to_save": modules or None,
    }
    own, files = dataclasses.asdict(config) | {"other_prompts": list(others)}, {}
    own["layers"] = list(prompt.layers) if config.kind == "prefix" and not whole else None
    own["init_ids"] = None if config.init_ids is None else list(config.init_ids)
    own |= {"encoder": None, "encoder_hidden_size": None}  # this prompt's: others may have been loaded without theirs
    if prompt.encoder is not None:
        own |= {"encoder": prompt.encoder.name, "encoder_hidden_size": prompt.encoder.hidden_size}
        own |= {"init": "random", "init_ids": None}
        files[ENCODER] = write_tensors(directory / ENCODER, prompt.state_dict())
    if adapters is not None:
        files[ADAPTERS] = write_tensors(directory / ADAPTERS, adapters.state_dict())
    beside = {BACKBONE + name: tensor for name, tensor in _beside(backbone, head).items()}
    files[WEIGHTS] = write_tensors(directory / WEIGHTS, {KEY: prompt.encoded()} | beside)
    write_json(directory / OWN_CONFIG, own | {"files": files})
    write_text(directory / CONFIG, json.dumps(peft_config, indent=2) + "\n")


def task_type(model: nn.Module) -> str:
    """What PEFT calls what a model's head is for."""
    name = type(model).__name__
    return next((task for ending, task in _HEADS.items() if name.endswith(ending)), "FEATURE_EXTRACTION")


def _of_head(backbone: nn.Module, name: str) -> bool:
    """Whether a weight is of a task's head, which PEFT lists with its modules to save."""
    inside = backbone.base_model is backbone or name.startswith(backbone.base_model_prefix + ".")
    return not inside and backbone.get_output_embeddings() is None


def _beside(backbone: nn.Module, head: Collection[str]) -> dict[str, Tensor]:
    """What goes into the file beside the prompt, by its name in the backbone: all that its base does not bring.

    A task's head; what else trains, or came from a file; buffers; and what is of another shape than the base model's
    own configuration says, as are embeddings with more tokens. Of tied weights the first.
    """
    found, seen = {}, set()
    parameters = dict(backbone.named_parameters(remove_duplicate=False))
    buffers, base = dict(backbone.named_buffers()), _base_shapes(backbone)
    for name, tensor in backbone.state_dict(keep_vars=True).items():
        if name in parameters:
            plain = name.replace(".base_layer.", ".")  # as it was before something like LoRA was put around it
            added = base is not None and base.get(plain) != tensor.shape
            wanted = tensor.requires_grad or name in head or added
        else:
            wanted = name in buffers
        if wanted and id(tensor) not in seen:
            found[name] = tensor
            seen.add(id(tensor))
    return found


def _base_shapes(backbone: nn.Module) -> dict[str, torch.Size] | None:
    """The shapes of a backbone as its base model's configuration, wherever that is, makes it; None if it is not known.

    Raises a warning for a base that had a place of its own, which is no longer there.
    """
    place = backbone.config._name_or_path
    if not place:
        return None
    try:
        config = type(backbone.config).from_pretrained(place, local_files_only=True)
    except (OSError, ValueError):
        warnings.warn(
            f"{place!r}, the backbone's base model, has no configuration any more: if the backbone was changed in "
            "shape since (as by resize_token_embeddings), what was added is not saved with the prompt",
            stacklevel=2,
        )
        return None
    # What the class makes of it, but not its weights.
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in type(backbone)(config).state_dict().items()}


def load_prompt(
    config: PromptConfig, packed: PackedBackbone | PackedEncoderDecoder, directory: Path, trainable: bool
) -> Prompt | Prefix:
    """The prompt in a folder, for a bank of prompts that `config` describes, over the backbone of `packed`."""
    stored = read(directory)
    names = ["kind", "position_offset"] + ["pools_prompt"] * packed.pools_first_row
    settings = {name: (getattr(stored.config, name), getattr(config, name)) for name in names}
    counts = packed.geometry.layers, packed.geometry.encoder_layers
    if config.kind == stored.config.kind == "prefix":
        settings["layers"] = tuple(chosen_layers(each, *counts) for each in (stored.config, config))
    for name, (got, expected) in settings.items():
        if got != expected:
            raise ValueError(f"{name} of the prompt in {directory} must be {expected!r}, as the model's, got {got!r}")
    inner = {name: tensor for name, tensor in stored.beside.items() if not _of_head(packed.model, name)}
    for name, (own_tensor, tensor) in _fitting(packed.model, inner, directory).items():
        if not torch.equal(own_tensor, tensor.to(own_tensor)):
            raise ValueError(f"{name} beside the prompt in {directory} must be the model's: it was trained there")
    prompt = new_prompt(stored.start(config, trainable), packed)
    stored.fill(prompt)
    return prompt


@dataclasses.dataclass(frozen=True, eq=False)
class Folder:
    """What a folder holds.

    Attributes:
        directory: where.
        config: of the prompt.
        rows: the prompt.
        beside: weights of the backbone, by their names in it.
        others: names of the other prompts in its subfolders.
        files: digests of the files that were written together; empty where PEFT wrote them, or an older version.
        weights: name of the file with the prompt.
        is_final: PEFT trained it in a way that does not go on here: rows stay as they are, or a loss is its own.
    """

    directory: Path
    config: PromptConfig
    rows: Tensor
    beside: dict[str, Tensor]
    others: list[str]
    files: dict[str, str]
    weights: str
    is_final: bool

    def start(self, config: PromptConfig, trainable: bool) -> PromptConfig:
        """`config`, for a prompt that begins at what is held: no pass for it, and an encoder only if it trains on."""
        if trainable and self.is_final:
            raise ValueError(
                f"trainable must be False for the prompt in {self.directory}: a CARTRIDGE with num_frozen_tokens, or "
                "CPT, goes on training in PEFT alone, fused or not"
            )
        encoder, hidden_size = (self.config.encoder, self.config.encoder_hidden_size) if trainable else (None, None)
        begin = {"init": "random", "init_ids": None, "init_scale": 0.0}
        return dataclasses.replace(config, **begin, encoder=encoder, encoder_hidden_size=hidden_size)

    @torch.no_grad()
    def fill(self, prompt: Prompt | Prefix, adapters: nn.Module | None = None) -> None:
        """Give a prompt, and adapters, the values that are held."""
        directory, expected = self.directory, prompt.encoded().shape
        if self.rows.shape != expected:
            raise ValueError(
                f"{KEY} in {directory / self.weights} must be {tuple(expected)} for this backbone, "
                f"got {tuple(self.rows.shape)}"
            )
        if prompt.encoder is None:
            prompt.weight.copy_(self.rows)
        else:
            self._fill_state(prompt, ENCODER)
            encoded = prompt.encoded()
            if not torch.allclose(encoded, self.rows.to(encoded), rtol=0, atol=1e-2 * float(encoded.abs().max())):
                raise ValueError(
                    f"{ENCODER} in {directory} makes another prompt than the one beside it: files were mixed"
                )
        if adapters is not None:
            self._fill_state(adapters, ADAPTERS)

    def _fill_state(self, module: nn.Module, name: str) -> None:
        file = self.directory / name
        if not file.is_file():
            why = " to go on training" if name == ENCODER else ""
            raise FileNotFoundError(f"directory must hold {name}{why}, which is not in {self.directory}")
        tensors = _tensors(self.directory, name, self.files)
        shapes, got = ({name: tuple(t.shape) for name, t in each.items()} for each in (module.state_dict(), tensors))
        if got != shapes:
            raise ValueError(f"{file} must hold {shapes}, got {got}")
        module.load_state_dict(tensors)

    def fitting(self, backbone: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        """The backbone's own tensor and the one that is held beside the prompt, by name."""
        return _fitting(backbone, self.beside, self.directory)


def locate(directory: str | Path, subfolder: str | None = None) -> Path:
    """The folder that is meant: a local one or, of a string that is none, what the hub has under that id.

    Raises:
        FileNotFoundError: it is neither.
    """
    if isinstance(directory, str) and not Path(directory).exists():
        inside = "" if subfolder is None else f"{glob.escape(subfolder)}/"
        wanted = [inside + name for name in (CONFIG, OWN_CONFIG, WEIGHTS, PICKLED, ENCODER, ADAPTERS)]
        try:
            folder = huggingface_hub.snapshot_download(directory, allow_patterns=wanted)
        except (OSError, ValueError) as error:  # it is not there, cannot be reached, or is no id
            raise FileNotFoundError(
                f"directory must be a folder, or the id of a repository on the hub, got {directory!r}: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error
        directory = folder
    return Path(directory) if subfolder is None else Path(directory) / subfolder


def read(directory: Path) -> Folder:
    """What a folder holds that we, or PEFT, wrote."""
    weights = WEIGHTS if (directory / WEIGHTS).is_file() or not (directory / PICKLED).is_file() else PICKLED
    for name in (CONFIG, weights):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"directory must hold {name}, which is not in {directory}")
    peft_config, others, files, is_final = read_json(directory / CONFIG), [], {}, False
    by_peft = bool(_PEFTS & peft_config.keys())
    if (directory / OWN_CONFIG).is_file() and not by_peft:
        config, others, files = _read_own(directory / OWN_CONFIG)
    else:
        if (directory / OWN_CONFIG).is_file():
            _LOG.warning("%s: PEFT has saved over what it belongs to, and it is not read", directory / OWN_CONFIG)
        config = _read_pefts(directory / CONFIG, peft_config)
        is_final = peft_config["peft_type"] == "CPT" or bool(peft_config.get("num_frozen_tokens"))
    tensors = _tensors(directory, weights, files)
    if KEY not in tensors:
        raise ValueError(f"{directory / weights} must hold {KEY!r}, got {sorted(tensors)}")
    rows, beside = tensors.pop(KEY), {name.removeprefix(BACKBONE): tensor for name, tensor in tensors.items()}
    if by_peft or not (directory / OWN_CONFIG).is_file():
        rows = _as_peft_reads(rows, peft_config)
    return Folder(directory, config, rows, beside, others, files, weights, is_final)


def _as_peft_reads(rows: Tensor, about: dict) -> Tensor:
    """Of an encoder-decoder's rows those that PEFT reads, in the order of the layers: see `fastprompt.models.fuse`."""
    if about.get("num_transformer_submodules") != 2:
        return rows
    if KINDS[about["peft_type"]] == "prompt":
        return rows[: about["num_virtual_tokens"]]
    layers = about["num_layers"]
    return rows.unflatten(1, (layers, -1))[:, torch.arange(layers) * 2 % layers].flatten(1)


def _read_pefts(file: Path, about: dict) -> PromptConfig:
    """The configuration of a prompt that PEFT wrote."""
    kind = KINDS.get(about.get("peft_type"))
    if kind is None:
        raise ValueError(f"peft_type in {file} must be one of {tuple(KINDS)}, got {about.get('peft_type')!r}")
    if "num_virtual_tokens" not in about:
        raise ValueError(f"{file} must have num_virtual_tokens, got {sorted(about)}")
    return PromptConfig(kind, about["num_virtual_tokens"], prefix_in_window=True, pools_prompt=kind == "prompt")


def _read_own(file: Path) -> tuple[PromptConfig, list[str], dict[str, str]]:
    """The configuration of our own file, the names of the other prompts, and the digests of the files beside it."""
    own = read_json(file)
    check_json(file, own)
    known = {field.name for field in dataclasses.fields(PromptConfig)}
    unknown = sorted(own.keys() - known - {*_MORE, CHECKSUM})
    if unknown:
        names = ", ".join(unknown)
        _LOG.warning("%s: %s is passed over: a newer version of fastprompt wrote it, which knows more", file, names)
    try:
        config = PromptConfig(**{name: own[name] for name in known & own.keys()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    return config, own.get("other_prompts", []), own.get("files", {})


def _tensors(directory: Path, name: str, files: dict[str, str]) -> dict[str, Tensor]:
    if name == PICKLED:
        return _pickled(directory / name)
    stored = read_tensors(directory / name)
    if files.get(name, stored.digest) != stored.digest:
        raise ValueError(
            f"{name} in {directory} is not the one that {OWN_CONFIG} was written with: files were mixed, or saving was "
            f"cut short; without {OWN_CONFIG} it is read as PEFT's"
        )
    return stored.tensors


def _pickled(file: Path) -> dict[str, Tensor]:
    """What torch.save wrote; no code in it is run."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling makes of other bytes
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file} is damaged, or holds something else than tensors: {message}") from error
    if not isinstance(tensors, dict) or not all(isinstance(each, Tensor) for each in tensors.values()):
        raise ValueError(f"{file} is damaged, or holds something else than tensors: it must be a dictionary of tensors")
    return tensors


def _fitting(backbone: nn.Module, beside: dict[str, Tensor], directory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The backbone's own tensor and that of a file, by name."""
    own, first = backbone.state_dict(keep_vars=True), {}
    for name, tensor in beside.items():
        if name not in own or own[name].shape != tensor.shape:
            have = tuple(own[name].shape) if name in own else "no such parameter"
            raise ValueError(f"{name} in {directory} must fit the backbone: {have}, got {tuple(tensor.shape)}")
        tied = first.setdefault(id(own[name]), name)
        if not torch.equal(beside[tied], tensor):
            raise ValueError(f"{tied} and {name} in {directory} must be equal: the backbone has one weight for both")
    return {name: (own[name], tensor) for name, tensor in beside.items()}
