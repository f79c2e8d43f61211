"""Compiles the Triton kernels for GPUs that need not be there, and shows what they use.

    python tests/ops/aot_triton.py [capability ...] [word ...]

The capabilities are 80 and 90 by default; with words, only cases whose name has one of them are compiled. The host code
runs as it is, on tensors without memory, and stops short of each launch. Exits with 1 where a kernel that must fit in
registers (those of attention for 16-bit heads of 64 or 128 features, but for biases, and all of the other operators)
does not.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from aot_cases import cases
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

# Products on warp groups (from 64 rows of the left side on), on warps, and loads that run ahead.
INSTRUCTIONS = "wgmma.mma_async", "mma.sync", "cp.async.c"
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


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


def compile_call(call) -> list[tuple[str, object]]:
    """(kernel, what it compiled to) of a call, each once however often it is launched."""
    compiled = {}
    was = JITFunction.__getitem__

    def stop_short(kernel, grid):
        def launch(*args, **kwargs):
            binary = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            compiled[binary.hash] = kernel.__name__, binary

        return launch

    JITFunction.__getitem__ = stop_short
    try:
        call()
    finally:
        JITFunction.__getitem__ = was
    return list(compiled.values())


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def main(capabilities: list[int], words: list[str]) -> int:
    print(f"triton {triton.__version__}")
    print(f"sm {'case':39} | {'kernel':26} warps stages registers stack local shared wgmma mma copies")
    spilled = 0
    for capability in capabilities:
        triton.runtime.driver.set_active(Driver(capability))
        for name, strict, call in cases():
            if words and not any(word in name for word in words):
                continue
            for kernel, compiled in compile_call(call):
                metadata, used = compiled.metadata, resources(compiled.asm["cubin"])
                wgmma, mma, copies = (compiled.asm["ptx"].count(each) for each in INSTRUCTIONS)
                spilled += strict * (used["STACK"] + used["LOCAL"])
                print(
                    f"{capability} {name:39} | {kernel:26} {metadata.num_warps:>5} {metadata.num_stages:>6} "
                    f"{used['REG']:>9} {used['STACK']:>5} {used['LOCAL']:>5} {metadata.shared:>6} "
                    f"{wgmma:>5} {mma:>3} {copies:>6}",
                    flush=True,
                )
    return 1 if spilled else 0


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:] if argument.isdigit()]
    sys.exit(main(numbers or [80, 90], [argument for argument in sys.argv[1:] if not argument.isdigit()]))
