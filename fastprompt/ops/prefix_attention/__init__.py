"""prefix_attention: packed, ragged attention in which every segment also reads a learned prefix."""

from torch import Tensor

from fastprompt.ops._checks import check_cu_seqlens, check_indices

from . import cpu, reference

__all__ = ["prefix_attention"]


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    cu_seqlens: Tensor,
    *,
    prefix_index: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    prefix_in_window: bool = False,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over packed segments, each over its own rows and over a prefix from a bank.

    Row i of segment b attends to all P positions of its prefix and to the rows j of its own segment (j <= i if causal).
    With s_ij = scale * q_i . k_j over prefix and segment together, o_i = sum_j softmax_j(s_ij) v_j. The gradient of the
    prefix is summed over all rows of all segments that read it and over the query heads that share its head.

    Args:
        query: (T, H, D), the rows of all segments one after the other, any floating dtype.
        key, value: (T, Hkv, D), H a multiple of Hkv: query head h reads key/value head h // (H / Hkv).
        prefix_key, prefix_value: (N, Hkv, P, D), a bank of N prefixes; P may be 0.
        cu_seqlens: (B+1,) int32, on query's device: segment b is rows cu_seqlens[b]:cu_seqlens[b+1]; it may be empty.
        prefix_index: (B,) integer, which prefix each segment reads; None: the first.
        is_causal: rows see no later rows of their segment.
        scale: of the scores; None is D ** -0.5.
        window: row i sees rows j with i - j < window (causal) or |i - j| <= window (not causal), as transformers.
        softcap: c, scores become c * tanh(s / c).
        prefix_in_window: the prefix stands at positions -P..-1 under the window; by default every row sees it all.
        dropout_p: probability with which attention weights are dropped (and the rest scaled up).
        return_lse: also return the log-sum-exp of the scores, (T, H) float32 (float64 for float64), not differentiable.
        backend: None chooses; "cpu" (PyTorch's flash kernels, CPU only, no softcap, no dropout) or "reference".

    Returns:
        (T, H, D) of query's dtype, or with `return_lse` the pair (output, lse).

    Raises:
        TypeError: cu_seqlens or prefix_index of another dtype.
        ValueError: a shape, dtype, device or option that does not fit.
        IndexError: a value of prefix_index out of range (on the CPU; on a GPU values are not read on the host).
            All name the argument, before anything is computed.
    """
    _check(query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index)
    if window is not None and window < (1 if is_causal else 0):
        raise ValueError(f"window must be at least {1 if is_causal else 0}, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)

    cpu_can = query.device.type == "cpu" and softcap is None and dropout_p == 0
    if backend is None:
        backend = "cpu" if cpu_can else "reference"
    if backend == "cpu":
        if not cpu_can:
            raise ValueError(
                "backend 'cpu' needs tensors on the CPU, no softcap and no dropout, "
                f"got {query.device}, softcap={softcap}, dropout_p={dropout_p}"
            )
        if scale <= 0:  # the kernels hide a score by -inf before they scale it
            query, scale = query * scale, 1.0
        result = cpu.prefix_attention(
            *(query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index),
            *(is_causal, scale, window, prefix_in_window),
        )
    elif backend == "reference":
        output, lse = reference.prefix_attention(
            *(query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index),
            *(is_causal, scale, window, softcap, prefix_in_window, dropout_p),
        )
        result = output, lse.detach()
    else:
        raise ValueError(f"backend must be None, 'cpu' or 'reference', got {backend!r}")
    return result if return_lse else result[0]


def _check(query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index) -> None:
    named = {"key": key, "value": value, "prefix_key": prefix_key, "prefix_value": prefix_value}
    if query.ndim != 3 or not query.is_floating_point():
        raise ValueError(f"query must be (T, H, D), floating point, got {tuple(query.shape)}, {query.dtype}")
    rows, heads, features = query.shape
    if key.ndim != 3 or prefix_key.ndim != 4:
        raise ValueError(
            "key must be (T, Hkv, D) and prefix_key (N, Hkv, P, D), "
            f"got {tuple(key.shape)} and {tuple(prefix_key.shape)}"
        )
    kv_heads = key.shape[1]
    entries, _, prefix, _ = prefix_key.shape
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query's heads must be a multiple of key's, got {heads} and {kv_heads}")
    token_shape, prefix_shape = (rows, kv_heads, features), (entries, kv_heads, prefix, features)
    for name, tensor in named.items():
        expected = token_shape if name in ("key", "value") else prefix_shape
        if tensor.shape != expected:
            raise ValueError(f"{name} must be {expected}, as query and key are, got {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} must be {query.dtype} on {query.device}, as query is, got {tensor.dtype} on {tensor.device}"
            )
    if entries == 0:
        raise ValueError("prefix_key must hold at least one prefix (of length 0 if need be), got a bank of none")
    segments = check_cu_seqlens(cu_seqlens, rows)
    if cu_seqlens.device != query.device:
        raise ValueError(f"cu_seqlens must be on {query.device}, where query is, got {cu_seqlens.device}")
    if prefix_index is None:
        return
    if prefix_index.shape != (segments,):
        raise ValueError(f"prefix_index must be ({segments},), one a segment, got {tuple(prefix_index.shape)}")
    if prefix_index.device != query.device:
        raise ValueError(f"prefix_index must be on {query.device}, where query is, got {prefix_index.device}")
    check_indices(prefix_index, entries, "prefix_index")
