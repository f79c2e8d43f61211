"""Metrics of steps, read from the device together: a step that read its own would wait for it."""

import time

import torch
from torch import Tensor

READ_EVERY = 10  # steps; on a CPU nobody waits


class Metrics:
    """What steps computed, until it is read.

    Args:
        device: where it is computed.
    """

    def __init__(self, device: torch.device) -> None:
        self.every = 1 if device.type == "cpu" else READ_EVERY
        self._waiting: list[tuple[dict, dict[str, Tensor]]] = []
        self._began = 0.0

    def begin(self) -> None:
        """A step begins."""
        if not self._waiting:
            self._began = time.perf_counter()

    def add(self, record: dict, values: dict[str, Tensor]) -> None:
        """A step's own numbers, and those that stand on the device."""
        self._waiting.append((record, {name: value.detach() for name, value in values.items()}))

    @property
    def due(self) -> bool:
        """Whether it is time to read."""
        return len(self._waiting) >= self.every

    def read(self) -> list[dict]:
        """The records of the steps since the last call, each with its values and with "seconds", the mean of these
        steps."""
        if not self._waiting:
            return []
        found = torch.stack([value for _, values in self._waiting for value in values.values()]).tolist()
        seconds = (time.perf_counter() - self._began) / len(self._waiting)
        numbers = iter(found)
        records = [
            record | {name: next(numbers) for name in values} | {"seconds": seconds} for record, values in self._waiting
        ]
        self._waiting = []
        return records
