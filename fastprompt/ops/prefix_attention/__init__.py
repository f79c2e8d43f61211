"""prefix_attention: packed, ragged attention in which every segment also reads a learned prefix."""

import importlib.util
from numbers import Integral, Real

import torch
from torch import Tensor

from fastprompt import _native
from fastprompt.ops._checks import check_cu_seqlens, check_indices, check_max_seqlen

from . import cpu, reference

if _native.available("cpu"):
    from . import native

__all__ = ["prefix_attention"]

# What csrc/ computes in, by device.
NATIVE_DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    "cuda": (torch.bfloat16, torch.float16),
}
LARGEST_CUDA_HEAD = 128
# Rows of a mean segment from which PyTorch's flash kernels attend to its own rows on a GPU. By estimate: two launches
# more than one fused kernel need so many products of a segment's rows with each other to be made good.
FLASH_LENGTH = 300
LARGEST = 10**9  # rows times heads, and prefix: kernels count both in 32 bits, together or twice
SMALLEST_SCALE, LARGEST_SCALE = 1e-30, 1e38  # between them, and after a factor of a few, are float32's normal numbers
HAS_TRITON = importlib.util.find_spec("triton") is not None  # imported only when it runs


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    cu_seqlens: Tensor,
    *,
    prefix_index: Tensor | None = None,
    prompt_rows: int = 0,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    prefix_in_window: bool = False,
    dropout_p: float = 0.0,
    relative_bias: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    max_seqlen: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over packed segments, each over its own rows and over a prefix from a bank.

    Row i of segment b attends to all P positions of its prefix and to the rows j of its own segment (j <= i if causal).
    With s_ij = scale * q_i . k_j over prefix and segment together, o_i = sum_j softmax_j(s_ij) v_j. The gradient of the
    prefix is summed over all rows of all segments that read it and over the query heads that share its head. A row
    without any key (of `cu_seqlens_k`, with P = 0) has output 0 and log-sum-exp -infinity.

    Args:
        query: (T, H, D), the rows of all segments one after the other, any floating dtype.
        key, value: (T, Hkv, D), H a multiple of Hkv: query head h reads key/value head h // (H / Hkv).
        prefix_key, prefix_value: (N, Hkv, P, D), a bank of N prefixes; P may be 0. None with `prompt_rows`.
        cu_seqlens: (B+1,) int32, on query's device: segment b is rows cu_seqlens[b]:cu_seqlens[b+1]; it may be empty.
        prefix_index: (B,) integer, which prefix each segment reads; None: the first.
        prompt_rows: P > 0: the first P rows of query, key and value are a prompt that stands once before all segments
            (causal only). They attend causally to each other, and their keys and values are the prefix of every
            segment; T then counts them, and cu_seqlens bounds the segments among the rows after them.
        is_causal: rows see no later rows of their segment.
        scale: of the scores, a number up to 1e38, negative or 0 as well; None is D ** -0.5.
        window: row i sees rows j with i - j < window (causal) or |i - j| <= window (not causal), as transformers. It
            may be of any size.
        softcap: c, scores become c * tanh(s / c).
        prefix_in_window: the prefix stands at positions -P..-1 under the window; by default every row sees it all.
        dropout_p: probability with which attention weights are dropped (and the rest scaled up).
        relative_bias: (H, R), R odd, any floating dtype, on query's device: of each query head, what is added to the
            scaled score of a key at distance d = key's position - query's position, in column d + R // 2; distances
            beyond the table take its first or last column. Positions count from 0 in each segment, and the prefix (or
            the prompt of `prompt_rows`) stands at -P..-1 before it, as after PEFT's past keys. T5's buckets, spread out
            over the distances, or ALiBi's slope * d. It is frozen (it must not require grad) and excludes softcap.
        cu_seqlens_k: (B+1,) int32, on query's device, for cross-attention: key and value are (Tk, Hkv, D), and segment
            b attends to their rows cu_seqlens_k[b]:cu_seqlens_k[b+1], all of them. Empty segments may be on either
            side. It excludes is_causal, window, prompt_rows and relative_bias.
        return_lse: also return the log-sum-exp of the scores, (T, H) float32 (float64 for float64), not differentiable.
        max_seqlen: a length that no segment exceeds, where the host knows one: on a GPU long segments go to faster
            kernels then. It is checked where cu_seqlens is; where it is not, rows beyond it come out wrong.
        backend: None chooses; "native" (one fused kernel in C++, on the CPU and, in bfloat16 and float16 with D a
            multiple of 16 up to 128, on GPUs), "triton" (GPUs), "flash" (PyTorch's flash kernels for a segment's own
            rows and Triton for the prefix: NVIDIA GPUs, bfloat16 and float16 with D a multiple of 8, no softcap, no
            dropout), "cpu" (PyTorch's flash kernels, CPU only, no softcap, no dropout) or "reference". Only the last
            has second derivatives; another raises a RuntimeError where one is asked for. "flash", and "native" on GPUs,
            have no `relative_bias` and no `cu_seqlens_k`; "cpu" has no `relative_bias`.

    Returns:
        (T, H, D) of query's dtype, or with `return_lse` the pair (output, lse).

    Raises:
        TypeError: cu_seqlens, cu_seqlens_k or prefix_index of another dtype, relative_bias no tensor, an option that is
            no number.
        ValueError: a shape, dtype, device or option that does not fit.
        IndexError: a value of prefix_index out of range (on the CPU; on a GPU values are not read on the host).
            All name the argument, before anything is computed.
    """
    prompt_rows = _integer("prompt_rows", prompt_rows)
    if cu_seqlens_k is not None:
        _check_cross_attention(is_causal, window, prompt_rows, relative_bias)
    window = None if window is None else _window(window, is_causal)
    scale = None if scale is None else _scale(scale)
    softcap = None if softcap is None else _softcap(softcap)
    dropout_p = _real("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if prompt_rows:
        prefix_key, prefix_value = _check_prompt_rows(query, key, prefix_key, prefix_value, prompt_rows, is_causal)
    elif prefix_key is None or prefix_value is None:
        raise ValueError("prefix_key and prefix_value must be given, or prompt_rows, got None and 0")
    max_seqlen = None if max_seqlen is None else _integer("max_seqlen", max_seqlen)
    is_long = max_seqlen is not None and _mean_is_long(query, cu_seqlens)
    backend = _choose(backend, query, softcap, dropout_p, is_long, relative_bias, cu_seqlens_k)
    _check(query, key, value, prefix_key, prefix_value, cu_seqlens_k is not None)
    if relative_bias is not None:
        _check_relative_bias(relative_bias, query, softcap)
    read = backend != "native"  # which checks values itself
    _check_segments(query, key, prefix_key, cu_seqlens, cu_seqlens_k, prefix_index, prompt_rows, read)
    if max_seqlen is not None and read:
        check_max_seqlen(cu_seqlens, max_seqlen)
    query, scale = _with_positive_scale(query, scale)
    options = is_causal, scale, window, softcap, prefix_in_window, dropout_p
    if backend == "native" and query.device.type == "cpu":
        result = native.prefix_attention(
            *(query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index),
            *(*options, prompt_rows, relative_bias, cu_seqlens_k),
        )
    elif prompt_rows and backend not in ("native", "triton", "flash"):
        result = _in_two_calls(backend, query, key, value, cu_seqlens, prompt_rows, options, relative_bias)
    else:
        tensors = query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index
        others = dict(relative_bias=relative_bias, cu_seqlens_k=cu_seqlens_k, max_seqlen=max_seqlen)
        result = _run(backend, *tensors, *options, prompt_rows=prompt_rows, **others)
    return result if return_lse else result[0]


def _mean_is_long(query: Tensor, cu_seqlens: Tensor) -> bool:
    return isinstance(cu_seqlens, Tensor) and query.shape[0] > FLASH_LENGTH * (cu_seqlens.numel() - 1)


def _choose(backend, query, softcap, dropout_p, is_long, relative_bias, cu_seqlens_k) -> str:
    """The backend that runs: the fastest that can, or the one asked for."""
    device, plain = query.device.type, softcap is None and dropout_p == 0
    few = {"relative_bias": relative_bias, "cu_seqlens_k": cu_seqlens_k}  # what few backends have
    few = next((name for name, tensor in few.items() if tensor is not None), None)
    if backend is None:
        if device == "cpu" and _native.available("cpu") and query.dtype in NATIVE_DTYPES["cpu"]:
            return "native"
        if device == "cpu" and plain and relative_bias is None:
            return "cpu"
        # Not "native": it should win where segments are short, but neither has been measured on a GPU yet.
        if device != "cuda" or _why_not_triton(query) is not None:
            return "reference"
        return "flash" if is_long and plain and not few and _why_not_flash(query) is None else "triton"
    devices = {"native": tuple(NATIVE_DTYPES), "cpu": ("cpu",)}.get(backend, (device,))
    if device not in devices:
        raise ValueError(f"backend {backend!r} needs tensors on {' or '.join(devices)}, got {query.device}")
    if not plain and backend in ("cpu", "flash"):
        raise ValueError(
            f"backend {backend!r} needs no softcap and no dropout on {device}, "
            f"got softcap={softcap}, dropout_p={dropout_p}"
        )
    without = backend == "flash" or (backend == "native" and device != "cpu")
    if few and (without or (backend == "cpu" and few == "relative_bias")):
        other = "native" if device == "cpu" else "triton"
        raise ValueError(f"backend {backend!r} has no {few} on {device}; {other!r} and 'reference' have")
    if backend == "native" and (reason := _why_not_native(query)):
        raise ValueError(f"backend 'native' {reason}")
    if backend == "triton" and (reason := _why_not_triton(query)):
        raise ValueError(f"backend 'triton' {reason}")
    if backend == "flash" and (reason := _why_not_flash(query)):
        raise ValueError(f"backend 'flash' {reason}")
    if backend not in ("native", "triton", "flash", "cpu", "reference"):
        raise ValueError(f"backend must be None, 'native', 'triton', 'flash', 'cpu' or 'reference', got {backend!r}")
    return backend


def _integer(name: str, value: int) -> int:
    if type(value) is int:  # the rest takes its time
        return value
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return int(value) if isinstance(value, Integral) else value


def _real(name: str, value: float) -> float:
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def _window(window: int, is_causal: bool) -> int | None:
    window, least = _integer("window", window), 1 if is_causal else 0
    if window < least:
        raise ValueError(f"window must be at least {least}, got {window}")
    return window if window < LARGEST else None  # no segment is longer: it cuts nothing


def _softcap(softcap: float) -> float | None:
    softcap = _real("softcap", softcap)
    if not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    return max(softcap, SMALLEST_SCALE) if softcap < LARGEST_SCALE else None  # all weights alike, or as without


def _scale(scale: float) -> float:
    scale = _real("scale", scale)
    if not abs(scale) <= LARGEST_SCALE:
        raise ValueError(f"scale must be at most {LARGEST_SCALE}, positive or negative, got {scale}")
    return scale


def _with_positive_scale(query: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """Of the same scores, for kernels that look for the greatest, and hide some by -inf, before they scale them."""
    if scale is None:
        return query, query.shape[-1] ** -0.5
    if abs(scale) < SMALLEST_SCALE:
        return query * scale, 1.0
    return (query, scale) if scale > 0 else (-query, -scale)


def _why_not_native(query: Tensor) -> str | None:
    device, features = query.device.type, query.shape[-1]
    if query.dtype not in NATIVE_DTYPES[device]:
        return f"needs {' or '.join(map(str, NATIVE_DTYPES[device]))} on {device}, got {query.dtype}"
    if device == "cuda" and (features % 16 or features > LARGEST_CUDA_HEAD):
        return f"needs D to be a multiple of 16 up to {LARGEST_CUDA_HEAD} on cuda, got {features}"
    return None if _native.available(device) else f"is not available: {_native.why_not(device)}"


def _why_not_triton(query: Tensor) -> str | None:
    if not HAS_TRITON:
        return "needs the package triton, which is not installed"
    from . import triton

    return triton.why_not(query)


def _why_not_flash(query: Tensor) -> str | None:
    if not HAS_TRITON:
        return "needs the package triton, which is not installed"
    from . import flash

    return flash.why_not(query)


def _run(backend, *inputs, prompt_rows=0, relative_bias=None, cu_seqlens_k=None, max_seqlen=None):
    tensors, options = inputs[:7], inputs[7:]
    if backend == "triton":
        from . import triton  # here, not at the top: it imports the package triton

        return triton.prefix_attention(*tensors, *options, prompt_rows, relative_bias, cu_seqlens_k)
    if backend == "native":
        return native.prefix_attention(*tensors, *options, prompt_rows)
    is_causal, scale, window, _, prefix_in_window, _ = options
    if backend == "flash":
        from . import flash

        return flash.prefix_attention(*tensors, is_causal, scale, window, prefix_in_window, prompt_rows, max_seqlen)
    if backend == "cpu":
        return cpu.prefix_attention(*tensors, cu_seqlens_k, is_causal, scale, window, prefix_in_window)
    output, lse = reference.prefix_attention(*tensors, *options, relative_bias, cu_seqlens_k)
    return output, lse.detach()


def _in_two_calls(
    backend, query, key, value, cu_seqlens, prompt_rows, options, relative_bias=None
) -> tuple[Tensor, Tensor]:
    """The prompt's rows and the text's apart, where the backend does not take both at once."""
    own, text = slice(None, prompt_rows), slice(prompt_rows, None)
    bounds = cu_seqlens.new_zeros(2)
    bounds[1:].fill_(prompt_rows)  # where the others are: on the device, nobody waits, and fakes stay fakes
    nothing = key.new_empty(1, key.shape[1], 0, key.shape[2])
    first = _run(
        backend, query[own], key[own], value[own], nothing, nothing, bounds, None, *options, relative_bias=relative_bias
    )
    prefix = (x[own].transpose(0, 1).unsqueeze(0) for x in (key, value))
    second = _run(
        backend, query[text], key[text], value[text], *prefix, cu_seqlens, None, *options, relative_bias=relative_bias
    )
    return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])


def _check_prompt_rows(query, key, prefix_key, prefix_value, prompt_rows, is_causal) -> tuple[Tensor, Tensor]:
    if prefix_key is not None or prefix_value is not None:
        raise ValueError("prefix_key and prefix_value must be None with prompt_rows: the prompt is the prefix")
    if not is_causal:
        raise ValueError("prompt_rows needs is_causal: where rows see later ones, each segment has a prompt of its own")
    if not 0 < prompt_rows <= len(query):
        raise ValueError(f"prompt_rows must be in [1, {len(query)}], the number of rows, got {prompt_rows}")
    nothing = key.new_empty(1, key.shape[1], 0, key.shape[2]) if key.ndim == 3 else key
    return nothing, nothing


def _check_relative_bias(relative_bias: Tensor, query: Tensor, softcap: float | None) -> None:
    if not isinstance(relative_bias, Tensor):
        raise TypeError(f"relative_bias must be a tensor, got {type(relative_bias).__name__}")
    shape, heads = tuple(relative_bias.shape), query.shape[1]
    if len(shape) != 2 or shape[0] != heads or shape[1] % 2 == 0 or not relative_bias.is_floating_point():
        raise ValueError(
            f"relative_bias must be ({heads}, R), one row a query head and R odd, floating point, "
            f"got {shape}, {relative_bias.dtype}"
        )
    if relative_bias.device != query.device:
        raise ValueError(f"relative_bias must be on {query.device}, where query is, got {relative_bias.device}")
    if relative_bias.requires_grad:
        raise ValueError("relative_bias must be frozen, since it gets no gradient, got one that requires grad")
    if softcap is not None:
        raise ValueError(f"softcap must be None with relative_bias, got {softcap}")


def _check_cross_attention(is_causal, window, prompt_rows, relative_bias) -> None:
    shape = None if relative_bias is None else tuple(relative_bias.shape)
    given = {
        "is_causal": is_causal or None,
        "window": window,
        "prompt_rows": prompt_rows or None,
        "relative_bias": shape,
    }
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} must not be given with cu_seqlens_k, got {value}")


def _check(query, key, value, prefix_key, prefix_value, is_cross) -> None:
    named = {"key": key, "value": value, "prefix_key": prefix_key, "prefix_value": prefix_value}
    if query.ndim != 3 or 0 in query.shape[1:] or not query.is_floating_point():
        raise ValueError(
            f"query must be (T, H, D) with H and D at least 1, floating point, got {tuple(query.shape)}, {query.dtype}"
        )
    rows, heads, features = query.shape
    if key.ndim != 3 or prefix_key.ndim != 4:
        raise ValueError(
            "key must be (T, Hkv, D) and prefix_key (N, Hkv, P, D), "
            f"got {tuple(key.shape)} and {tuple(prefix_key.shape)}"
        )
    kv_heads = key.shape[1]
    entries, _, prefix, _ = prefix_key.shape
    own_rows = len(key) if is_cross else rows
    for name, count in ("query", rows), ("key", own_rows):
        if count * heads > LARGEST:
            raise ValueError(f"{name} must have at most {LARGEST} rows times heads, got {count} times {heads}")
    if prefix > LARGEST:
        raise ValueError(f"prefix_key must be of at most {LARGEST} rows, got {prefix}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query's heads must be a multiple of key's, got {heads} and {kv_heads}")
    token_shape, prefix_shape = (own_rows, kv_heads, features), (entries, kv_heads, prefix, features)
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


def _check_segments(query, key, prefix_key, cu_seqlens, cu_seqlens_k, prefix_index, prompt_rows, read) -> None:
    segments = check_cu_seqlens(cu_seqlens, len(query) - prompt_rows, read)
    if cu_seqlens.device != query.device:
        raise ValueError(f"cu_seqlens must be on {query.device}, where query is, got {cu_seqlens.device}")
    if cu_seqlens_k is not None:
        count = check_cu_seqlens(cu_seqlens_k, len(key), read, "cu_seqlens_k")
        if count != segments:
            raise ValueError(f"cu_seqlens_k must be ({segments + 1},), as cu_seqlens is, got ({count + 1},)")
        if cu_seqlens_k.device != query.device:
            raise ValueError(f"cu_seqlens_k must be on {query.device}, where query is, got {cu_seqlens_k.device}")
    if prefix_index is None:
        return
    if prefix_index.shape != (segments,):
        raise ValueError(f"prefix_index must be ({segments},), one a segment, got {tuple(prefix_index.shape)}")
    if prefix_index.device != query.device:
        raise ValueError(f"prefix_index must be on {query.device}, where query is, got {prefix_index.device}")
    check_indices(prefix_index, len(prefix_key), "prefix_index", read)
