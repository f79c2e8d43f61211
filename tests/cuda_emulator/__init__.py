"""The CUDA operators of csrc/cuda/ for tensors on the CPU: how far they can be tested without a GPU.

The C++ compiler compiles them with the runtime of cuda_runtime.h, which says what is checked, and with what
emulated.cpp has in place of the inline PTX.
"""

import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
FLAGS += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]


@functools.cache
def load_emulated():
    """torch.ops.fastprompt_emulated, with the operators of fastprompt's schemas. Builds for some 20 seconds."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip("the emulator needs a C++ compiler")
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/emulated.so"
        paths = ["-I", FOLDER, "-isystem", torch_folder / "include", f"-L{torch_folder}/lib"]
        link = ["-ltorch_cpu", "-Wl,-Bsymbolic", "-o", library]
        command = [*compiler, *FLAGS, *paths, FOLDER / "emulated.cpp", *link]
        build = subprocess.run(command, capture_output=True, text=True)
        assert build.returncode == 0, build.stderr
        torch.ops.load_library(library)
    return torch.ops.fastprompt_emulated
