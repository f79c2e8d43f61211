"""Pairs of sentences that mean the same or not, as in PAWS-X."""

from typing import NamedTuple


class Example(NamedTuple):
    """Two sentences; label 1 if they mean the same, 0 if not."""

    id: str
    sentence1: str
    sentence2: str
    label: int
