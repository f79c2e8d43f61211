"""Sentences to vectors: the backbone and its tokenizer, pooling, and the teacher's vectors kept on disk."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastprompt._extras import require
from fastprompt._files import cache_folder, write_tensors
from fastprompt.models.families import ENCODERS
from fastprompt.models.packed import PackedBackbone

POOLINGS = ("mean", "first", "last")
_CACHE_FORMAT = 1  # raised when the same content would give other vectors


def load_backbone(name: str, device: str | torch.device = "cpu") -> tuple[nn.Module, Callable]:
    """A base model in float32, in evaluation mode, and its tokenizer.

    Args:
        name: a folder as `save_pretrained` writes it, or a model's name on the hub.

    Raises:
        ValueError: it cannot be loaded, or has no tokenizer.
    """
    transformers = require("transformers", "train")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        # The pooler of an encoder reads one row and is often not in the weights: no vector here comes from it.
        options = {"add_pooling_layer": False} if config.model_type in ENCODERS else {}
        model = transformers.AutoModel.from_pretrained(name, dtype=torch.float32, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"backbone {name!r} must be a model's folder or its name on the hub: {error}") from error
    return model.eval().to(device), tokenizer


def tokenize(tokenizer: Callable, sentences: Sequence[str], prefix_text: str, max_length: int) -> list[list[int]]:
    """Token ids of each sentence with the prefix text before it, cut to `max_length`."""
    texts = [prefix_text + sentence for sentence in sentences]
    ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    for sentence, tokens in zip(sentences, ids, strict=True):
        if not tokens:
            raise ValueError(f"sentence must have at least one token, got none for {sentence!r}")
    return ids


def encode(model: Callable, sentences: Sequence[list[int]], pooling: str, device: str | torch.device) -> Tensor:
    """(N, D) vectors of N sentences of token ids, one pass of `model` (its keyword arguments in, its output out)."""
    lengths = torch.tensor([len(tokens) for tokens in sentences])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (N, L)
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.tensor([token for tokens in sentences for token in tokens])
    mask, lengths = mask.to(device), lengths.to(device)
    hidden = model(input_ids=ids.to(device), attention_mask=mask).last_hidden_state  # (N, L, D), zero at padding
    if pooling == "mean":
        return hidden.sum(1) / lengths[:, None]
    row = lengths - 1 if pooling == "last" else torch.zeros_like(lengths)
    return hidden[torch.arange(len(sentences), device=device), row]


@torch.no_grad()
def encode_all(
    model: Callable, sentences: Sequence[list[int]], pooling: str, device: str | torch.device, batch_size: int = 32
) -> Tensor:
    """(N, D) vectors on the CPU of any number of sentences, without gradients."""
    batches = (sentences[begin : begin + batch_size] for begin in range(0, len(sentences), batch_size))
    return torch.cat([encode(model, batch, pooling, device).cpu() for batch in batches])


def plain(backbone: nn.Module) -> Callable:
    """The backbone without a prompt, run packed: the teacher."""
    packed = PackedBackbone(backbone)
    return lambda **inputs: packed(inputs)


def digest(backbone: nn.Module) -> str:
    """SHA-256 of a model's configuration and weights."""
    whole = hashlib.sha256()
    config = {key: value for key, value in backbone.config.to_dict().items() if not key.startswith("_")}
    for volatile in ("transformers_version", "attn_implementation"):
        config.pop(volatile, None)
    whole.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(backbone.state_dict().items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()


def teacher_vectors(
    backbone: nn.Module,
    sentences: Sequence[list[int]],
    pooling: str,
    device: str | torch.device,
    cache: Path | None = None,
) -> Tensor:
    """(N, D) vectors of the backbone without prompt, on the CPU, computed once and then read from `cache`.

    The file's name is a digest of the weights, the configuration, the pooling and the token ids: a change in any of
    them makes another file. One that cannot be read is made anew.

    Args:
        cache: folder; `cache_folder() / "teacher"` by default.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    key = hashlib.sha256(json.dumps([_CACHE_FORMAT, digest(backbone), pooling, sentences]).encode()).hexdigest()
    file = (cache_folder() / "teacher" if cache is None else cache) / f"{key}.safetensors"
    shape = (len(sentences), backbone.config.hidden_size)
    try:
        vectors = load_file(file)["vectors"]
        if vectors.shape == shape:
            return vectors
    except (FileNotFoundError, SafetensorError, KeyError):
        pass
    vectors = encode_all(plain(backbone), sentences, pooling, device)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, {"vectors": vectors})
    return vectors
