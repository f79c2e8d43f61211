"""What the frozen backbone makes of sentences: computed once, and kept on disk."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastprompt._files import cache_folder
from fastprompt.models.methods import AdaptedBackbone
from fastprompt.models.packed import PackedBackbone
from fastprompt.tasks.base import Item, Segments, by_length

from .batch import Collator
from .cache import cached
from .collator import PackingCollator

_BATCH = 32  # sentences of a pass without gradients
_CACHE_FORMAT = 3  # raised when the same content would give other tensors
_COLLATE = PackingCollator(None)


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


def packed(sentences: Sequence[list[int]], device: str | torch.device) -> dict:
    """Inputs of a packed pass over sentences of token ids, on a device."""
    batch = _COLLATE([{"input_ids": ids} for ids in sentences])
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def sentence_vectors(segments: Segments, pooling: str, layer: int | None = None) -> Tensor:
    """(N, D) vectors of sentences of which each is an input.

    The mean of a middle layer's states leaves out the first of all: within a model all attention that is not needed
    goes to the first token, whose state is the same for all sentences and many times as long as the others.
    """
    vectors = segments.pooled(pooling)
    if pooling != "mean" or layer is None:
        return vectors
    counts = segments.cu_seqlens.diff().unsqueeze(1)  # (N, 1)
    first = segments.hidden[segments.cu_seqlens[:-1].long()]
    return torch.where(counts > 1, (vectors * counts - first) / (counts - 1).clamp(min=1), vectors)


@torch.no_grad()
def encode(
    model: Callable,
    sentences: Sequence[list[int]],
    pooling: str,
    device: str | torch.device,
    layer: int | None = None,
    batch_size: int = _BATCH,
) -> Tensor:
    """(N, D) vectors on the CPU of one or more sentences of token ids, without gradients.

    Args:
        model: gives the base model's output for a packed batch.
        layer: vectors of the hidden states that this many layers give; None: of the last ones.
        batch_size: sentences of a pass.
    """
    found: list[Tensor | None] = [None] * len(sentences)
    for chosen in by_length([len(ids) for ids in sentences], batch_size):
        batch = packed([sentences[n] for n in chosen], device)
        output = model(**batch, **({} if layer is None else {"output_hidden_states": True}))
        hidden = output.last_hidden_state if layer is None else output.hidden_states[layer]
        segments = Segments(hidden.squeeze(0), batch["cu_seq_lens_q"], batch["packing"].cu_seqlens.tolist())
        for n, vector in zip(chosen, sentence_vectors(segments, pooling, layer).cpu(), strict=True):
            found[n] = vector
    return torch.stack(found)


def plain(backbone: nn.Module) -> Callable:
    """The backbone without a prompt, run packed: the teacher."""
    model = PackedBackbone(backbone)
    return lambda **inputs: model(inputs)


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
        layer: as `encode` takes it.
    """
    backbone = digest.backbone
    return cached(
        _folder(cache),
        digest(sentences, "teacher", pooling, *([] if layer is None else [layer])),
        (len(sentences), backbone.config.get_text_config().hidden_size),
        backbone.dtype,
        lambda: [encode(plain(backbone), sentences, pooling, device, layer)],
    )


def lower_states(
    digest: Digest,
    adapted: AdaptedBackbone,
    items: Sequence[Item],
    collate: Collator,
    device: str | torch.device,
    cache: Path | None = None,
) -> tuple[Tensor, ...]:
    """Hidden states of each input, (T_i, D), that enter the first layer with a prefix, kept as the teacher's are.

    They are computed in fixed batches, whatever the order of training: a product's last bit may depend on how many rows
    it has, and so what a resumed run computes is what the run before it did.
    """
    prompted, sentences = adapted.prompted, [item.ids for item in items]
    shape = (sum(map(len, sentences)), digest.backbone.config.get_text_config().hidden_size)
    about = ["states", prompted.first_layer, prompted.position_offset]
    about += [item.second for item in items] if collate.token_types else []
    states = cached(
        *(_folder(cache), digest(sentences, *about), shape, digest.backbone.dtype),
        lambda: (
            prompted.lower_states(**collate(items[begin : begin + _BATCH]).to(device).inputs).cpu()
            for begin in range(0, len(items), _BATCH)
        ),
    )
    return states.split([len(tokens) for tokens in sentences])


def _folder(cache: Path | None) -> Path:
    return cache_folder() / "training" if cache is None else cache
