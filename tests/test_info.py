import platform
import re
from importlib.util import find_spec
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers

import fastprompt
from fastprompt import _native, info, ops


def printed(capsys):
    info.describe()
    captured = capsys.readouterr()
    assert not captured.err
    return captured.out


def sections(text):
    """Heading -> its lines; the lines before any heading under ""."""
    blocks = [block.splitlines() for block in text.split("\n\n")]
    return {"": blocks[0]} | {lines[0]: lines[1:] for lines in blocks[1:]}


def test_versions(capsys):
    head = "\n".join(sections(printed(capsys))[""])
    for package, version in [
        ("fastprompt", fastprompt.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("transformers", transformers.__version__),
        ("peft", peft.__version__),
    ]:
        assert f"{package} {version}" in head


def test_a_package_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(info, "PACKAGES", ("torch", "no-such-package"))
    assert f"torch {torch.__version__}, no-such-package not installed\n" in printed(capsys)


def test_devices(capsys):
    lines = sections(printed(capsys))["devices"]
    assert lines[0].split()[:2] == ["cpu", f"{platform.machine()},"]
    assert f"{torch.get_num_threads()} threads" in lines[0]
    assert len(lines) == 1 + torch.cuda.device_count()
    for index, line in enumerate(lines[1:]):
        assert line.split()[0] == f"cuda:{index}" and torch.cuda.get_device_name(index) in line


def test_cuda_devices(capsys, monkeypatch):
    class Properties:
        name, total_memory = "Some GPU", 24 * 2**30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    lines = sections(printed(capsys))["devices"]
    assert [line.strip() for line in lines[1:]] == ["cuda:0  Some GPU, 24 GiB", "cuda:1  Some GPU, 24 GiB"]


def test_every_operator(capsys):
    lines = sections(printed(capsys))["operators and their backends"]
    named = [tuple(line.split()[:2]) for line in lines]
    assert {operator for operator, _ in named} == set(ops.__all__)
    assert len(set(named)) == len(named)
    assert {operator for operator, backend in named if backend == "reference"} == set(ops.__all__)


def call(operator, backend):
    one = torch.ones(1, 1)
    cu_seqlens = torch.tensor([0, 1], dtype=torch.int32)
    if operator == "alignment_loss":
        return ops.alignment_loss(one, one, one, backend=backend)
    if operator == "linear_cross_entropy":
        return ops.linear_cross_entropy(one, one, torch.zeros(1, dtype=torch.int64), backend=backend)
    if operator == "pack_prompt":
        return ops.pack_prompt(one, torch.zeros(1, dtype=torch.int64), cu_seqlens, one[None], backend=backend)
    if operator.startswith("segment_"):
        return getattr(ops, operator)(one, cu_seqlens, backend=backend)
    rows, prefix = torch.ones(1, 1, 8), torch.ones(1, 1, 1, 8)
    return ops.prefix_attention(rows, rows, rows, prefix, prefix, cu_seqlens, backend=backend)


@pytest.mark.parametrize("operator", ops.__all__)
def test_the_backends_are_those_the_operator_takes(operator):
    with pytest.raises(ValueError, match="backend must be .*, got 'nonsense'") as error:
        call(operator, "nonsense")
    named, _ = str(error.value).split(", got ")
    assert set(re.findall(r"'(\w+)'", named)) == set(info.OPERATORS[operator])


def test_native_libraries_that_are_there(capsys, monkeypatch):
    monkeypatch.setattr(_native, "_why_not", {"cpu": None, "cuda": None})
    found = sections(printed(capsys))
    assert [line.split() for line in found["native libraries"]] == [["cpu", "available"], ["cuda", "available"]]
    operators = "\n".join(found["operators and their backends"])
    missing = [backend for backends in info.OPERATORS.values() for backend in backends]
    missing = [backend for backend in missing if backend in info.OPTIONAL_PACKAGES and not find_spec(backend)]
    assert operators.count("not available") == len(missing)


def test_the_reason_why_one_is_not_there(capsys, monkeypatch):
    reasons = {"cpu": "not built: there was no compiler 'c++'", "cuda": "this torch has no CUDA"}
    monkeypatch.setattr(_native, "_why_not", reasons)
    found = sections(printed(capsys))
    for line, (device, reason) in zip(found["native libraries"], reasons.items(), strict=True):
        assert line.split(maxsplit=1) == [device, f"not available ({reason})"]
    lines = [line.split(maxsplit=2) for line in found["operators and their backends"]]
    native = {operator: state for operator, backend, state in lines if backend == "native"}
    assert native
    for operator, state in native.items():
        devices = info.OPERATORS[operator]["native"]
        assert state == "; ".join(f"{device}: not available ({reasons[device]})" for device in devices)
    assert all(state == "available" for _, backend, state in lines if backend == "reference")


def test_the_reasons_here(capsys):
    lines = sections(printed(capsys))["native libraries"]
    for line, device in zip(lines, ("cpu", "cuda"), strict=True):
        reason = _native.why_not(device)
        state = "available" if reason is None else f"not available ({reason})"
        assert line.split(maxsplit=1) == [device, state]


@pytest.mark.parametrize(("major", "served"), [(7, False), (8, True), (12, True)])
def test_the_native_library_asks_for_a_gpu_that_it_is_compiled_for(monkeypatch, major, served):
    monkeypatch.setattr(_native, "_why_not", {"cpu": None, "cuda": None})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(major=major, minor=5))
    assert _native.available("cuda") is served
    assert served or "7.5" in _native.why_not("cuda")
