"""Builds and loads the CUDA operators for the CPU: see tests/cuda_emulator."""

import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

EMULATOR = Path(__file__).parent.parent / "cuda_emulator"
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
FLAGS += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]


@functools.cache
def load_emulated():
    """The namespace of the operators."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip("the emulator needs a C++ compiler")
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/emulated.so"
        paths = ["-I", EMULATOR, "-isystem", torch_folder / "include", f"-L{torch_folder}/lib"]
        link = ["-ltorch_cpu", "-Wl,-Bsymbolic", "-o", library]
        build = subprocess.run(
            [*compiler, *FLAGS, *paths, EMULATOR / "emulated.cpp", *link], capture_output=True, text=True
        )
        assert build.returncode == 0 and not build.stderr, build.stderr
        torch.ops.load_library(library)
    return torch.ops.fastprompt_emulated
