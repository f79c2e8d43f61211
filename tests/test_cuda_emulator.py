import pytest
import torch
from cuda_emulator import load_emulated


@pytest.mark.parametrize("which, shared_bytes, match", [
    (0, 256, "threads wait at the barriers of lines"), (1, 256, "a thread waits for others that do not come"),
    (2, 256, "outside of shared memory"), (3, 256, "copies collide"), (4, 48 * 1024 + 16, "invalid launch"),
])  # fmt: skip
def test_faults_are_found(which, shared_bytes, match):
    emulated, out = load_emulated(), torch.zeros(64)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=match):
            emulated.faulty(out, which, shared_bytes)


def test_a_barrier_that_is_missing_shows():
    first, second = (load_emulated().faulty(torch.zeros(64), 4, 256) for _ in range(2))
    assert first.isnan().any() and second.isnan().any() and not torch.equal(first.isnan(), second.isnan())
