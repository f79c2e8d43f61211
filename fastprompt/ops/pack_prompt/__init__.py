"""pack_prompt: token embeddings and prompt rows of a packed batch, gathered in one pass."""

import torch
from torch import Tensor

from fastprompt import _native

from .._checks import check_cu_seqlens, check_indices, check_number
from . import reference

if _native.available("cpu"):
    from . import native

__all__ = ["pack_prompt"]

BACKENDS = ("native", "reference")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def pack_prompt(
    embedding: Tensor,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    prompt: Tensor,
    *,
    prompt_index: Tensor | None = None,
    per_segment: bool = False,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """The first hidden state of a packed batch: scaled token embeddings with prompt rows before them.

    Causal models (per_segment=False) need the prompt rows once: the N*P rows of the whole bank, in order, then the T
    token rows. Bidirectional models (per_segment=True) need them in each segment: the P rows of the bank entry it
    reads, then its tokens.

    The embedding is taken as frozen, and the gradient of the prompt is summed over the segments in their order, the
    same in each run. Where autograd has to reach the embedding, plain PyTorch does the work.

    Args:
        embedding: (V, E), float32, float64, bfloat16 or float16.
        input_ids: (T,), int32 or int64, each in [0, V).
        cu_seqlens: (B+1,) int32; segment b is the tokens cu_seqlens[b]:cu_seqlens[b+1] and may be empty.
        prompt: (N, P, E), a bank of N >= 1 prompts of P >= 0 rows, of the embedding's dtype.
        prompt_index: (B,), int32 or int64, the bank entry in [0, N) that each segment reads under per_segment (default:
            entry 0). It changes nothing otherwise, where the whole bank stands in front.
        per_segment: whether each segment carries its own prompt rows.
        scale: factor on the token rows, not on the prompt rows. The product is rounded to the dtype once, so a model
            that rounds its factor first (Gemma) wants it passed rounded.
        backend: None (native where it can), "native" or "reference".

    Returns:
        (N*P + T, E), or (B*P + T, E) with per_segment.

    Raises:
        TypeError: a dtype that does not fit, or a per_segment that is no bool.
        ValueError: a shape, device, cu_seqlens, scale or backend that does not fit.
        IndexError: a value of input_ids or prompt_index out of range. (On a GPU values are not read on the host: there
            this is a device assert, as in torch's own indexing.)
    """
    trains_embedding = embedding.requires_grad and torch.is_grad_enabled()
    if backend is None:
        native_fits = _native.available(embedding.device.type) and embedding.is_contiguous() and not trains_embedding
        backend = "native" if native_fits else "reference"
    elif backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {BACKENDS}, got {backend!r}")
    elif backend == "native" and not _native.available(embedding.device.type):
        raise ValueError(f"backend 'native' is not available: {_native.why_not(embedding.device.type)}")
    elif backend == "native" and trains_embedding:
        raise ValueError("backend 'native' has no gradient of the embedding: freeze it, or leave the choice open")
    _check(embedding, input_ids, cu_seqlens, prompt, prompt_index, read_values=backend != "native")
    if not isinstance(per_segment, bool):
        raise TypeError(f"per_segment must be a bool, got {per_segment!r}")
    scale = check_number(scale, "scale", "a finite number")
    run = native.pack_prompt if backend == "native" else reference.pack_prompt
    return run(embedding, input_ids, cu_seqlens, prompt, prompt_index, per_segment, scale)


def _check(
    embedding: Tensor,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    prompt: Tensor,
    prompt_index: Tensor | None,
    read_values: bool,
) -> None:
    """Raise unless the inputs fit each other; a native operator checks the values of integers itself."""
    if embedding.ndim != 2:
        raise ValueError(f"embedding must have shape (V, E), got {tuple(embedding.shape)}")
    if embedding.dtype not in DTYPES:
        raise TypeError(f"embedding must be one of {DTYPES}, got {embedding.dtype}")
    if input_ids.ndim != 1:
        raise ValueError(f"input_ids must have shape (T,), got {tuple(input_ids.shape)}")
    segments = check_cu_seqlens(cu_seqlens, len(input_ids), read_values)
    if prompt.ndim != 3 or prompt.shape[0] == 0 or prompt.shape[2] != embedding.shape[1]:
        raise ValueError(
            f"prompt must have shape (N, P, {embedding.shape[1]}) with N >= 1 for an embedding "
            f"{tuple(embedding.shape)}, got {tuple(prompt.shape)}"
        )
    if prompt.dtype != embedding.dtype:
        raise TypeError(f"prompt must be {embedding.dtype}, as embedding is, got {prompt.dtype}")
    if prompt_index is not None and prompt_index.shape != (segments,):
        raise ValueError(f"prompt_index must have shape ({segments},), got {tuple(prompt_index.shape)}")
    others = {"input_ids": input_ids, "cu_seqlens": cu_seqlens, "prompt": prompt, "prompt_index": prompt_index}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != embedding.device:
            raise ValueError(f"{name} must be on {embedding.device}, where embedding is, got {tensor.device}")
    check_indices(input_ids, len(embedding), "input_ids", read_values)
    if prompt_index is not None:
        check_indices(prompt_index, len(prompt), "prompt_index", read_values)
