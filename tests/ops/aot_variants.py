"""Counts what 200 random batches would compile, without a GPU: {kernel: variants}.

    python tests/ops/aot_variants.py

As aot_triton.py, but nothing is compiled: of each launch there is only the key under which Triton keeps its kernels.
"""

import json
import random
from collections import defaultdict

import torch
import triton
from aot_triton import Driver
from triton.runtime.jit import JITFunction

from fastprompt.ops.alignment import triton as alignment
from fastprompt.ops.prefix_attention import triton as attention
from fastprompt.ops.segment_pool import triton as pool

BATCHES = 200
HEADS, KV_HEADS, FEATURES, PREFIX = 9, 3, 64, 16


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def call_attention(tokens: int, segments: int, prompt_rows: int, window: int | None, bias_columns: int = 0) -> None:
    query, key = empty(tokens, HEADS, FEATURES), empty(tokens, KV_HEADS, FEATURES)
    bank = empty(1, KV_HEADS, 0 if prompt_rows else PREFIX, FEATURES)
    bias = empty(HEADS, bias_columns, dtype=torch.float32) if bias_columns else None
    common = (empty(segments + 1, dtype=torch.int32), None, None, bias, None)
    options = (True, 0.125, window, None, window is not None, 0.0, prompt_rows)
    out, _, *saved = attention._forward(query, key, key, bank, bank, *common, *options)
    for needs in ((True, True, True), (False, False, True)):
        attention._backward(query, query, key, key, bank, bank, out, *saved, *common, *options, *needs)


def call_alignment(rows: int, distance: str) -> None:
    student, weight = empty(rows, 384), empty(384, 384)
    names = ("l2", distance, 0.05, "mean")
    alignment._compute(student, student, weight, None, empty(rows), None, *names, [True, False, True, False, False])
    alignment._compute(student, student, weight, None, None, None, *names, [False] * 5)


def call_pool(tokens: int, segments: int) -> None:
    cu_seqlens = empty(segments + 1, dtype=torch.int32)
    pool._pool(empty(tokens, 384), cu_seqlens, 0)
    pool._spread(empty(segments, 384), cu_seqlens, tokens, 0)


def main() -> None:
    keys = defaultdict(set)

    def keep(kernel, key, *_):
        keys[kernel.fn.__name__].add(key)
        return object()

    def launch(kernel, grid):
        return lambda *args, **kwargs: kernel.run(*args, grid=grid, warmup=True, **kwargs)

    triton.runtime.driver.set_active(Driver(90))
    JITFunction._do_compile, JITFunction.__getitem__ = keep, launch
    draw = random.Random(0)
    for n in range(BATCHES):
        segments = draw.randint(1, 64)
        tokens = sum(draw.randint(1, 120) for _ in range(segments))
        for window in (None, 32):
            call_attention(tokens, segments, 0, window)
            call_attention(tokens + PREFIX, segments, PREFIX, window)
        call_attention(tokens, segments, 0, None, 2 * draw.randint(1, 200) + 1)
        for distance in ("cosine", "infonce+cosine"):
            call_alignment(segments if n % 2 else tokens, distance)
        call_pool(tokens, segments)
    print(json.dumps({name: len(found) for name, found in keys.items()}))


if __name__ == "__main__":
    main()
