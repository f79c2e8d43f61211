"""What aot_triton.py compiles: calls of the operators in the shapes that matter, by name.

Each case is (name, whether all must stay in registers, call). The tensors have no memory, only shapes and types. Called
is what an operator runs on a GPU: by its own name it would run its fake on them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch

from fastprompt.ops.alignment import triton as alignment
from fastprompt.ops.gated import triton as gated
from fastprompt.ops.prefix_attention import flash
from fastprompt.ops.prefix_attention import triton as prefix_attention
from fastprompt.ops.rms_norm import triton as rms_norm
from fastprompt.ops.rotary import triton as rotary

DTYPES = (torch.bfloat16, torch.float32)
Case = tuple[str, bool, Callable[[], object]]

HEADS = (32, 64, 80, 128, 256)
# (tokens a segment, length of the prefix): one fills the largest tiles, the other calls for small ones.
LENGTHS = {"long": (384, 128), "short": (16, 16)}
ATTENTION = {  # is_causal, window, softcap, prefix_in_window, dropout_p, H / Hkv, size of the bank, rows of a prompt
    "plain": (False, None, None, False, 0.0, 1, 1, 0),
    "causal": (True, None, None, False, 0.0, 1, 1, 0),
    "bank": (True, None, None, False, 0.0, 4, 3, 0),
    "window": (True, 64, None, True, 0.0, 4, 1, 0),
    "softcap": (True, 64, 50.0, False, 0.0, 1, 1, 0),
    "prompt": (True, None, None, False, 0.0, 4, 1, 16),
    "dropout": (False, None, None, False, 0.1, 1, 1, 0),
    "bias": (True, None, None, False, 0.0, 1, 1, 0),  # and a bias
    "cross": (False, None, None, False, 0.0, 1, 1, 0),  # and bounds of the keys
}

WIDTHS = (384, 768, 1024)
ROWS = {"many": 4096, "few": 64}
ALIGNMENT = {  # normalize, distance, whether weighted, whether gradients are wanted
    "cosine": ("l2", "cosine", False, False),
    "weighted": ("l2", "cosine", True, False),
    "layer": ("layer", "cosine", True, False),
    "train": ("l2", "cosine", False, True),
    "contrast": ("l2", "infonce+cosine", False, True),
    "all": ("layer", "cosine+mse+smooth_l1+infonce", True, True),
}


def cases() -> Iterator[Case]:
    for dtype, features, length, name in product(DTYPES, HEADS, LENGTHS, ATTENTION):
        if name == "causal" or (features in (64, 128) and length == "long"):
            strict = dtype != torch.float32 and features in (64, 128) and name != "bias"  # spills a little on sm_80
            call = partial(call_prefix_attention, dtype, features, LENGTHS[length], name)
            yield f"attention {str(dtype)[6:]:8} {features:<4} {length:5} {name:8}", strict, call
    for features, name in product((64, 128, 256), ("causal", "bank", "window", "prompt")):
        call = partial(call_prefix_attention, torch.bfloat16, features, LENGTHS["long"], name, True)
        yield f"attention bfloat16 {features:<4} flash {name:8}", features < 256, call
    for dtype, features, rows, name in product(DTYPES, WIDTHS, ROWS, ALIGNMENT):
        call = partial(call_alignment_loss, dtype, features, ROWS[rows], ALIGNMENT[name])
        yield f"alignment {str(dtype)[6:]:8} {features:<4} {rows:5} {name:8}", True, call
    yield from elementwise_cases()


def call_prefix_attention(dtype, features, lengths, name, beside_flash: bool = False) -> None:
    """One forward and backward."""
    is_causal, window, softcap, prefix_in_window, dropout_p, group, entries, prompt_rows = ATTENTION[name]
    tokens, prefix = lengths
    segments, kv_heads = 8, 2
    query = torch.empty(segments * tokens, kv_heads * group, features, dtype=dtype, device="meta")
    key = torch.empty(segments * tokens, kv_heads, features, dtype=dtype, device="meta")
    bank = torch.empty(entries, kv_heads, prefix, features, dtype=dtype, device="meta")
    cu_seqlens = torch.empty(segments + 1, dtype=torch.int32, device="meta")
    prefix_index = None if entries == 1 else torch.empty(segments, dtype=torch.int64, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta") if dropout_p else None
    tensors = query, key, key, bank, bank
    if beside_flash:
        common = (cu_seqlens, prefix_index, is_causal, 0.125, window, prefix_in_window, prompt_rows, tokens)
        flash._backward(query, *tensors, *flash._forward(*tensors, *common), *common, True, True, True)
        return
    options = (is_causal, 0.125, window, softcap, prefix_in_window, dropout_p, prompt_rows)
    bias = torch.empty(kv_heads * group, 513, device="meta") if name == "bias" else None
    common = (cu_seqlens, prefix_index, seed, bias, cu_seqlens if name == "cross" else None, *options)
    out, _, *saved = prefix_attention._forward(*tensors, *common)
    prefix_attention._backward(query, *tensors, out, *saved, *common, True, True, True)


def call_alignment_loss(dtype, features, rows, options) -> None:
    """One forward, with the gradients if wanted."""
    normalize, distance, weighted, trains = options
    student, weight = (torch.empty(n, features, dtype=dtype, device="meta") for n in (rows, features))
    row_weight = torch.empty(rows, device="meta") if weighted else None
    alignment._compute(
        *(student, student, weight, weight[0], row_weight, None, normalize, distance, 0.05, "mean"),
        [trains, trains and weighted, trains, trains, trains and weighted],
    )


NORM = ((128, 32768), (256, 8192), (576, 4096), (3072, 8192), (8192, 1024), (16384, 64))  # features, rows
ROTARY = ((9, 3, 64), (24, 8, 128), (4, 1, 256), (5, 5, 80))  # heads of query and key, features
GATED = (1536, 8192)


def elementwise_cases() -> Iterator[Case]:
    for dtype, (features, rows) in product(DTYPES, NORM):
        yield f"rms_norm {str(dtype)[6:]:8} {features:<5}", True, partial(call_rms_norm, dtype, features, rows)
    for dtype, (heads, kv_heads, features) in product(DTYPES, ROTARY):
        call = partial(call_rotary, dtype, heads, kv_heads, features)
        yield f"rotary {str(dtype)[6:]:8} {features:<5} {heads}/{kv_heads}", True, call
    for dtype, width, activation in product(DTYPES, GATED, ("silu", "gelu_tanh")):
        call = partial(call_gated, dtype, width, activation)
        yield f"gated {str(dtype)[6:]:8} {width:<5} {activation}", True, call


def call_rms_norm(dtype, features, rows) -> None:
    x, weight = (torch.empty(*shape, features, dtype=dtype, device="meta") for shape in ((rows,), ()))
    rms_norm.run(x, weight, 1e-6, 1.0)
    rms_norm.run_backward(x, x, weight, 1e-6, 1.0)


def call_rotary(dtype, heads, kv_heads, features) -> None:
    query, key = (torch.empty(4096, count, features, dtype=dtype, device="meta") for count in (heads, kv_heads))
    cos = torch.empty(4096, features, dtype=dtype, device="meta")
    for inverse in (False, True):
        rotary.run(query, key, cos, cos, inverse)


def call_gated(dtype, width, activation) -> None:
    gate = torch.empty(4096, width, dtype=dtype, device="meta")
    gated.run(gate, gate, activation)
    gated.run_backward(gate, gate, gate, activation)
