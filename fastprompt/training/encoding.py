"""Sentences to vectors: the backbone and its tokenizer, pooling, and what is constant in training kept on disk."""

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastprompt._extras import require
from fastprompt._files import cache_folder
from fastprompt.models import PromptModel
from fastprompt.models.packed import PackedBackbone
from fastprompt.models.packed.layout import tensor_on

from .cache import cached

POOLINGS = ("mean", "first", "last")
_BATCH = 32  # sentences of a pass without gradients
_CACHE_FORMAT = 2  # raised when the same content would give other tensors


def load_backbone(
    name: str, device: str | torch.device = "cpu", *, causal_head: bool = False
) -> tuple[nn.Module, Callable]:
    """A base model in float32, in evaluation mode, and its tokenizer.

    Args:
        name: a folder as `save_pretrained` writes it, or a model's name on the hub.
        causal_head: a causal language model comes with its head.

    Raises:
        ValueError: it cannot be loaded, lacks weights or has some that have no place, or has no tokenizer.
    """
    transformers = require("transformers", "train")
    from safetensors import SafetensorError

    try:
        config = transformers.AutoConfig.from_pretrained(name)
        causal = causal_head and _is_decoder(config)
        kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        # The pooler of an encoder reads one row and is often not in the weights: no vector here comes from it.
        own = () if causal else inspect.signature(transformers.MODEL_MAPPING[type(config)]).parameters
        options = {"add_pooling_layer": False} if "add_pooling_layer" in own else {}
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # all that is wrong is told below
        model, found = kind.from_pretrained(name, dtype=torch.float32, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"backbone {name!r} must be a model's folder or its name on the hub: {error}") from error
    except (RuntimeError, SafetensorError) as error:  # such as a file that is cut short
        raise ValueError(f"backbone {name!r} is damaged: {' '.join(str(error).split())}") from error
    _check_found(name, model, found)
    return model.eval().to(device), tokenizer


def _is_decoder(config) -> bool:
    """An encoder may have a causal language model's class as well, beside a masked one's."""
    transformers = require("transformers", "train")
    kind = type(config)
    return kind in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and kind not in transformers.MODEL_FOR_MASKED_LM_MAPPING


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


def tokenize(tokenizer: Callable, sentences: Sequence[str], prefix_text: str, max_length: int) -> list[list[int]]:
    """Token ids of each sentence with the prefix text before it, cut to `max_length`."""
    texts = [prefix_text + sentence for sentence in sentences]
    encoded = tokenizer(texts, truncation=True, max_length=max_length)
    ids, cut = encoded["input_ids"], sum(was_cut(encoded, n) for n in range(len(texts)))
    if cut:
        text = "%d of %d sentences have more than max_length %d tokens, and are cut"
        logging.getLogger("fastprompt").warning(text, cut, len(texts), max_length)
    for sentence, tokens in zip(sentences, ids, strict=True):
        if not tokens:
            raise ValueError(f"sentence must have at least one token, got none for {sentence!r}")
    return ids


def was_cut(encoded, n: int) -> bool:
    """Whether input n of what a tokenizer gave was cut to max_length; tokenizers that are not fast do not tell."""
    return bool(getattr(encoded, "encodings", None) and encoded.encodings[n].overflowing)


def without_end(tokenizer: Callable, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text with the special tokens before it and none after it, for an answer to follow."""
    encoded = tokenizer(list(texts), return_special_tokens_mask=True)
    found = []
    for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        after = next((n for n, each in enumerate(reversed(special)) if not each), 0)
        found.append(list(ids[: len(ids) - after]))
    return found


def batch_of(sentences: Sequence[list[int]], device: str | torch.device) -> dict[str, Tensor]:
    """input_ids and attention_mask, (N, L) int64 and bool, of N sentences of token ids."""
    lengths = torch.tensor([len(tokens) for tokens in sentences])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.tensor([token for tokens in sentences for token in tokens])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def encode(
    model: Callable,
    sentences: Sequence[list[int]],
    pooling: str,
    device: str | torch.device,
    layer: int | None = None,
    **inputs,
) -> Tensor:
    """(N, D) vectors of N sentences of token ids, one pass of `model` (its keyword arguments in, its output out).

    Of the last hidden states, or of those that come out of `layer` layers.
    """
    batch = batch_of(sentences, device)
    if layer is None:
        hidden = model(**batch, **inputs).last_hidden_state  # (N, L, D), zero at padding
    else:
        hidden = model(**batch, **inputs, output_hidden_states=True).hidden_states[layer]
    lengths = batch["attention_mask"].sum(1)
    if pooling == "mean":
        begin = tensor_on([first_row(len(tokens), layer) for tokens in sentences], device)
        return (hidden.sum(1) - hidden[:, 0] * begin[:, None]) / (lengths - begin)[:, None]
    row = lengths - 1 if pooling == "last" else torch.zeros_like(lengths)
    return hidden[torch.arange(len(sentences), device=device), row]


def first_row(length: int, layer: int | None) -> int:
    """The first row of a sentence's mean: within a model all attention that is not needed goes to the first row of all,
    whose state is the same for all sentences and many times as long as the others.
    """
    return int(layer is not None and length > 1)


@torch.no_grad()
def encode_all(
    model: Callable,
    sentences: Sequence[list[int]],
    pooling: str,
    device: str | torch.device,
    batch_size: int = _BATCH,
    layer: int | None = None,
) -> Tensor:
    """(N, D) vectors on the CPU of any number of sentences, without gradients."""
    batches = _batches(sentences, batch_size)
    return torch.cat([encode(model, batch, pooling, device, layer).cpu() for batch in batches])


def _batches(sentences: Sequence[list[int]], size: int = _BATCH) -> Iterator[Sequence[list[int]]]:
    return (sentences[begin : begin + size] for begin in range(0, len(sentences), size))


def plain(backbone: nn.Module) -> Callable:
    """The backbone without a prompt, run packed: the teacher."""
    packed = PackedBackbone(backbone)
    return lambda **inputs: packed(inputs)


class Digest:
    """SHA-256 of what a model's outputs depend on: its configuration, its weights and, of the table of token
    embeddings, the rows that given sentences read. The others, most of a multilingual model, stay on the disk they are
    mapped from.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone, self._common = backbone, hashlib.sha256()
        config = {key: value for key, value in backbone.config.to_dict().items() if not key.startswith("_")}
        for volatile in ("transformers_version", "attn_implementation"):
            config.pop(volatile, None)
        self._common.update(json.dumps(config, sort_keys=True, default=str).encode())
        self._table = backbone.get_input_embeddings().weight.detach()
        for name, tensor in sorted(backbone.state_dict().items()):
            self._common.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            if tensor.data_ptr() != self._table.data_ptr():
                self._common.update(_bytes(tensor))

    def __call__(self, sentences: Sequence[list[int]], *about) -> str:
        """Of the model as sentences of token ids read it, these sentences, and what else tells apart (JSON values)."""
        whole = self._common.copy()
        tokens = torch.tensor(sorted({token for tokens in sentences for token in tokens}), device=self._table.device)
        whole.update(_bytes(self._table[tokens]))
        whole.update(json.dumps([_CACHE_FORMAT, sentences, *about]).encode())
        return whole.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def teacher_vectors(
    digest: Digest,
    sentences: Sequence[list[int]],
    pooling: str,
    device: str | torch.device,
    cache: Path | None = None,
    layer: int | None = None,
) -> Tensor:
    """(N, D) vectors of `digest`'s backbone without prompt, on the CPU, computed once and then read from the cache.

    The key is a digest of the weights, the configuration, the pooling and the token ids: a change in any of them is
    another content. See `cached` for what it promises.

    Args:
        cache: folder; `cache_folder() / "training"` by default.
        layer: as of `encode`.
    """
    backbone = digest.backbone
    return cached(
        _folder(cache),
        digest(sentences, "teacher", pooling, *([] if layer is None else [layer])),
        (len(sentences), backbone.config.hidden_size),
        backbone.dtype,
        lambda: [encode_all(plain(backbone), sentences, pooling, device, layer=layer)],
    )


def lower_states(
    digest: Digest,
    prompted: PromptModel,
    sentences: Sequence[list[int]],
    device: str | torch.device,
    cache: Path | None = None,
) -> tuple[Tensor, ...]:
    """Hidden states of each sentence, (T_i, D), that enter the first layer with a prefix: cached as the teacher's.

    They are computed in fixed batches, whatever the order of training: a product's last bit may depend on how many rows
    it has, and so what a resumed run computes is what the run before it did.
    """
    shape = (sum(map(len, sentences)), digest.backbone.config.hidden_size)
    about = ("states", prompted.first_layer, prompted.position_offset)
    states = cached(
        *(_folder(cache), digest(sentences, *about), shape, digest.backbone.dtype),
        lambda: (prompted.lower_states(**batch_of(batch, device)).cpu() for batch in _batches(sentences)),
    )
    return states.split([len(tokens) for tokens in sentences])


def _folder(cache: Path | None) -> Path:
    return cache_folder() / "training" if cache is None else cache
