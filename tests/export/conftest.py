"""Fixtures of the forms."""

import pytest
from stand_in import Learner


@pytest.fixture
def learner(tmp_path):
    """A function that makes one; its backbone is in tmp_path / "base"."""
    return lambda *args, **options: Learner(tmp_path / "base", *args, **options)
