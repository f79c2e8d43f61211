"""What is there: versions, native libraries (built here if need be), and the machine's rates."""

import hashlib
import os
import subprocess
import sys

from . import natives
from .records import DEVICE, ROOT

CHECK = f"from fastprompt import _native; why = _native.why_not({DEVICE!r}); print(why or ''); exit(why is not None)"


def cases() -> dict:
    return {"natives": libraries, "describe": describe, "rates": rates}


def libraries() -> dict:
    """The native libraries are brought along; what is missing or does not load is built, at other phases' cost."""
    reason, built = _why_not(), False
    if reason:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"FASTPROMPT_CUDA": "auto"}, check=True)
        built, still = True, _why_not()
        if still:
            raise RuntimeError(f"no native library for {DEVICE}: {still}; before it was built: {reason}")
    libraries = sorted((ROOT / "fastprompt").glob("_C_*.so"))
    foreign = {file.name: natives.foreign(file) for file in libraries}
    if any(foreign.values()):
        raise RuntimeError(f"they import what no stable ABI of torch 2.11 has: {foreign}")
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in libraries}
    return {
        "built": built,
        "libraries": hashes,
        "says": f"built here, as: {reason}" if built else "loaded as they were brought",
    }


def _why_not() -> str:
    """In a process of its own: a library that could not be loaded stays so."""
    found = subprocess.run([sys.executable, "-c", CHECK], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or (found.stderr.strip().splitlines() or ["it died"])[-1] if found.returncode else ""


def describe() -> dict:
    import torch

    import fastprompt.info
    from fastprompt.bench import machine

    fastprompt.info.describe()
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA device")
    versions = {name: machine._version(name) for name in machine.PACKAGES}
    return {"versions": versions, "cuda": torch.version.cuda, "state": machine.state(DEVICE)}


def rates() -> dict:
    from fastprompt.bench import machine

    found = machine.describe(DEVICE)
    says = "{name}: {matrix_gflops} GFLOP/s in {dtype} products, {memory_gbytes} GB/s copied".format(**found)
    return found | {"says": says}
