"""Compiles the Triton kernels of prefix attention for GPUs that need not be there, and shows what they use.

    python tests/ops/aot_triton.py [capability ...]        (80 and 90 by default)

The host code runs as it is, on tensors of the CPU, and stops short of each launch. Exits with 1 where a kernel for
16-bit heads of 64 or 128 features keeps anything outside of registers.
"""

import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastprompt.ops.prefix_attention import triton as backend

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
HEADS = (32, 64, 80, 128, 256)
DTYPES = (torch.bfloat16, torch.float32)
# (tokens a segment, length of the prefix): one fills the largest tiles, the other calls for small ones.
LENGTHS = {"long": (384, 128), "short": (16, 16)}
OPTIONS = {  # is_causal, window, softcap, prefix_in_window, dropout_p, H / Hkv, size of the bank
    "plain": (False, None, None, False, 0.0, 1, 1),
    "causal": (True, None, None, False, 0.0, 1, 1),
    "bank": (True, None, None, False, 0.0, 4, 3),
    "window": (True, 64, None, True, 0.0, 4, 1),
    "softcap": (True, 64, 50.0, False, 0.0, 1, 1),
    "dropout": (False, None, None, False, 0.1, 1, 1),
}


class Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, device):
        return 0


def compile_call(dtype, features, lengths, options) -> list[tuple[str, object]]:
    """(kernel, what it compiled to) of one forward and backward."""
    compiled = []
    was = JITFunction.__getitem__

    def stop_short(kernel, grid):
        return lambda *args, **kwargs: compiled.append(
            (kernel.__name__, kernel.run(*args, grid=grid, warmup=True, **kwargs))
        )

    is_causal, window, softcap, prefix_in_window, dropout_p, group, entries = options
    tokens, prefix = lengths
    segments, kv_heads = 8, 2
    query = torch.zeros(segments * tokens, kv_heads * group, features, dtype=dtype)
    key = torch.zeros(segments * tokens, kv_heads, features, dtype=dtype)
    bank = torch.zeros(entries, kv_heads, prefix, features, dtype=dtype)
    cu_seqlens = torch.arange(segments + 1, dtype=torch.int32) * tokens
    prefix_index = None if entries == 1 else torch.zeros(segments, dtype=torch.int64)
    seed = torch.zeros(1, dtype=torch.int64) if dropout_p else None
    common = (cu_seqlens, prefix_index, seed, is_causal, 0.125, window, softcap, prefix_in_window, dropout_p)
    JITFunction.__getitem__ = stop_short
    try:
        out, lse = backend._prefix_attention(query, key, key.clone(), bank, bank.clone(), *common)
        backend._prefix_attention_backward(
            *(query.clone(), query, key, key.clone(), bank, bank.clone(), out, lse, *common, True, True, True)
        )
    finally:
        JITFunction.__getitem__ = was
    return compiled


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def main(capabilities: list[int]) -> int:
    print(f"triton {triton.__version__}")
    print("sm dtype    D    lengths option  | kernel            warps stages registers stack local shared")
    cases = [
        (capability, dtype, features, length, name)
        for capability, dtype, features, length, name in product(capabilities, DTYPES, HEADS, LENGTHS, OPTIONS)
        if name == "causal" or (features in (64, 128) and length == "long")
    ]
    spilled = 0
    for capability, dtype, features, length, name in cases:
        triton.runtime.driver.set_active(Driver(capability))
        for kernel, compiled in compile_call(dtype, features, LENGTHS[length], OPTIONS[name]):
            metadata, used = compiled.metadata, resources(compiled.asm["cubin"])
            if dtype != torch.float32 and features in (64, 128):
                spilled += used["STACK"] + used["LOCAL"]
            print(
                f"{capability} {str(dtype)[6:]:8} {features:<4} {length:7} {name:7} | {kernel:17} "
                f"{metadata.num_warps:>5} {metadata.num_stages:>6} {used['REG']:>9} {used['STACK']:>5} "
                f"{used['LOCAL']:>5} {metadata.shared:>6}",
                flush=True,
            )
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main([int(argument) for argument in sys.argv[1:]] or [80, 90]))
