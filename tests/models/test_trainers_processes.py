"""Two processes train what one does: DDP, FSDP2 with sharded frozen weights, and transformers' Trainer in them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CASES = ["bank, DDP", "bank, DDP that looks for what is unused", "bank, FSDP2 of all"]
WAYS = ["DDP", "FSDP2 of layers", "FSDP2 of the backbone", "FSDP2 of all", "Trainer"]
CASES += [f"{name}, {way}" for name in ("PromptModel", "fused") for way in WAYS]


def test_two_processes_equal_one(tmp_path):
    """One start of two processes for all: they import for longer than they run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # torchrun, which `accelerate launch` starts as well, but for processes on CPUs alone.
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    paths = [str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [*launch, str(HERE / "trainers_worker.py"), str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-4000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results == dict.fromkeys(CASES, "equal")
    for name in ("PromptModel", "fused"):  # one process writes the adapter
        files = {path.name for path in (tmp_path / name / "checkpoint-2").iterdir()}
        assert "adapter_model.safetensors" in files and {"rng_state_0.pth", "rng_state_1.pth"} <= files
