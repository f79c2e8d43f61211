"""The package builds with and without a compiler. Each test installs a scratch copy of the source."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OFFLINE = ["--no-build-isolation", "--no-deps", "--no-index", "-v"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what the build needs, without anything that was built."""
    copy = tmp_path / "project"
    for folder in ("csrc", "fastprompt"):
        shutil.copytree(SOURCE / folder, copy / folder, ignore=shutil.ignore_patterns("_C_*", "__pycache__"))
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(SOURCE / file, copy)
    return copy


def run(command: list, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.mark.parametrize(
    "compiler, reason",
    [("/nowhere/c++", "there was no compiler '/nowhere/c++'"), ("false", "false failed: no message")],
)
def test_without_a_compiler(project, tmp_path, compiler, reason):
    site = tmp_path / "site"
    log = run([*PIP, "install", *OFFLINE, "--target", site, "."], project, CXX=compiler)
    assert f"fastprompt is installed without _C_cpu.so: {reason}" in log
    assert "fastprompt is installed without _C_cuda.so: " in log
    assert not list(site.rglob("_C_*.so"))
    program = """
import torch, fastprompt, fastprompt.info
from fastprompt.ops import pack_prompt
print(fastprompt.__file__)
fastprompt.info.describe()
cu_seqlens = torch.tensor([0, 1, 3], dtype=torch.int32)
print(pack_prompt(torch.eye(4), torch.arange(3), cu_seqlens, torch.ones(1, 2, 4), per_segment=True).shape)
"""
    printed = run([sys.executable, "-c", program], tmp_path, PYTHONPATH=str(site))
    assert printed.startswith(str(site)), "another installation was tested"
    assert f"not available (not built: {reason})" in printed
    assert printed.rstrip().endswith("torch.Size([7, 4])")


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_wheel_and_sdist_with_a_compiler(project, tmp_path):
    run([*PIP, "wheel", *OFFLINE, "-w", tmp_path, "."], project, FASTPROMPT_CUDA="0", CXXFLAGS="-O0")
    (wheel,) = tmp_path.glob("fastprompt-*.whl")
    assert "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert {"fastprompt/_C_cpu.so", "fastprompt/ops/pack_prompt/__init__.py"} <= names
        assert "fastprompt/_C_cuda.so" not in names and "fastprompt/_C_cpu.txt" not in names
        assert archive.read("fastprompt/_C_cuda.txt").decode() == "not built: FASTPROMPT_CUDA was 0\n"
        assert not [name for name in names if name.startswith(("tests", "benchmarks", "csrc"))]
    run([sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path], project)
    (sdist,) = tmp_path.glob("fastprompt-*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for file in SOURCE.glob("csrc/**/*.*"):
        assert (unpacked / file.relative_to(SOURCE)).read_bytes() == file.read_bytes()


def test_cuda_is_an_error_only_where_it_was_asked_for(project):
    result = subprocess.run(
        [*PIP, "wheel", *OFFLINE, "."],
        cwd=project,
        env=os.environ | {"FASTPROMPT_CUDA": "1", "NVCC": "/nowhere/nvcc", "CXX": "c++"},
        text=True,
        capture_output=True,
    )
    assert result.returncode != 0
    assert "FASTPROMPT_CUDA=1, but _C_cuda.so cannot be built" in result.stdout + result.stderr
