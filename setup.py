"""Builds the two native libraries. Everything else about the package stands in pyproject.toml.

They use LibTorch's stable ABI and no Python C-API, so one build serves every later torch and Python. What keeps a
library from being built is no error: the reason is printed and kept in a text file in its place, for `fastprompt info`.

Environment: CXX (default c++), NVCC (default nvcc; its own NVCC_CCBIN names its host compiler),
FASTPROMPT_CUDA=auto|0|1 (auto: where there is an nvcc; 1: lacking it is an error).
"""

import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sysconfig
import tempfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

OLDEST_TORCH = (2, 10)
FLAGS = ["-std=c++20", "-O3", f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}{0:012x}"]
# Nobody reads floating-point exception flags; without them GCC vectorises loops that choose between values.
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-fno-trapping-math", "-Wall", "-Wextra"]
# Code for A100 and H100, and PTX for every other GPU since.
CUDA_TARGETS = ["-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90a,code=sm_90a"]


def find_torch() -> Path | None:
    """Folder of a torch that is new enough, or None: one that can be imported, or the target environment's, which pip
    hides from the build under isolation."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    folders += [Path(sysconfig.get_path(kind), "torch") for kind in ("purelib", "platlib")]
    folders += [Path(site.getusersitepackages(), "torch")]
    for folder in folders:
        version = folder / "version.py"
        found = version.exists() and re.search(r"__version__ = '(\d+)\.(\d+)", version.read_text())
        if found and (int(found[1]), int(found[2])) >= OLDEST_TORCH:
            return folder
    return None


def _run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True)


class CannotBuild(Exception):
    """Why a library is left out."""


class BuildNative(build_ext):
    """Compiles fastprompt/_C_{cpu,cuda}.so, or leaves the reason in fastprompt/_C_{cpu,cuda}.txt."""

    def run(self) -> None:
        root = Path() if self.inplace or self.editable_mode else Path(self.build_lib)
        nvcc = shlex.split(os.environ.get("NVCC", "nvcc"))[0]
        if os.environ.get("FASTPROMPT_CUDA") == "1" and shutil.which(nvcc) is None:  # told before minutes of compiling
            raise SystemExit(f"FASTPROMPT_CUDA=1, but _C_cuda.so cannot be built: there was no compiler {nvcc!r}")
        for extension in self.extensions:
            library = root / self.get_ext_filename(extension.name)
            library.parent.mkdir(parents=True, exist_ok=True)
            reason = library.with_suffix(".txt")
            for left_over in (library, reason):
                left_over.unlink(missing_ok=True)
            try:
                (self.build_cuda if library.stem == "_C_cuda" else self.build_cpu)(extension.sources, library)
            except CannotBuild as error:
                if library.stem == "_C_cuda" and os.environ.get("FASTPROMPT_CUDA") == "1":
                    raise SystemExit(f"FASTPROMPT_CUDA=1, but {library.name} cannot be built: {error}") from None
                self.warn(f"fastprompt is installed without {library.name}: {error}")
                reason.write_text(f"not built: {error}\n")

    def build_cpu(self, sources: list[str], library: Path) -> None:
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        flags = [*HOST_FLAGS, *FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        self.compile(compiler, flags, sources, library, ["-ltorch_cpu"])

    def build_cuda(self, sources: list[str], library: Path) -> None:
        wanted = os.environ.get("FASTPROMPT_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            raise SystemExit(f"FASTPROMPT_CUDA must be auto, 0 or 1, got {wanted!r}")
        if wanted == "0":
            raise CannotBuild("FASTPROMPT_CUDA was 0")
        if not library.with_stem("_C_cpu").exists():
            raise CannotBuild("it needs _C_cpu.so")
        compiler = shlex.split(os.environ.get("NVCC", "nvcc"))
        flags = [*CUDA_TARGETS, "--threads=0", f"-Xcompiler={','.join(HOST_FLAGS)}", "-DUSE_CUDA", *FLAGS]
        # libtorch.so needs libtorch_cuda.so wherever torch has CUDA: linked so, a CPU torch is enough for the build.
        self.compile(compiler, flags, sources, library, ["-Xlinker=--no-as-needed", "-ltorch"])

    def compile(
        self, compiler: list[str], flags: list[str], sources: list[str], library: Path, link: list[str]
    ) -> None:
        torch = find_torch()
        if torch is None:
            raise CannotBuild(f"torch >= {'.'.join(map(str, OLDEST_TORCH))} was not there")
        if shutil.which(compiler[0]) is None:
            raise CannotBuild(f"there was no compiler {compiler[0]!r}")
        with tempfile.TemporaryDirectory() as folder, ThreadPool() as pool:
            objects = [f"{folder}/{n}.o" for n in range(len(sources))]
            pairs = zip(sources, objects, strict=True)
            commands = [[*compiler, *flags, "-isystem", f"{torch}/include", "-c", f, "-o", o] for f, o in pairs]
            runs = pool.map(_run, commands)
            if not any(run.returncode for run in runs):
                runs = [_run([*compiler, "-shared", *objects, f"-L{torch}/lib", *link, "-o", str(library)])]
        for run in runs:
            print(shlex.join(run.args), run.stdout, run.stderr, sep="\n", flush=True)
            if run.returncode:
                first_error = next((line for line in run.stderr.splitlines() if "error" in line.lower()), "no message")
                raise CannotBuild(f"{compiler[0]} failed: {first_error.strip()}")

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # no Python version in the name: no Python C-API inside

    def get_outputs(self) -> list[str]:
        root = Path() if self.inplace or self.editable_mode else Path(self.build_lib)
        libraries = [root / self.get_ext_filename(extension.name) for extension in self.extensions]
        return [str(file) for file in libraries if file.exists()]


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3 on one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def native(name: str, *patterns: str) -> Extension:
    sources = [str(path) for pattern in patterns for path in sorted(Path("csrc").glob(pattern))]
    return Extension(f"fastprompt.{name}", sources)


setup(
    ext_modules=[native("_C_cpu", "fastprompt.cpp", "cpu/**/*.cpp"), native("_C_cuda", "cuda/*.cu")],  # in this order
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
    # Only where there is none: a second torch in the isolated build environment would be a large and useless download.
    setup_requires=[] if find_torch() else ["torch>=" + ".".join(map(str, OLDEST_TORCH))],
)
