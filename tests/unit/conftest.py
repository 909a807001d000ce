"""What several unit tests start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.builders import Keeper


@pytest.fixture
def keeper(tmp_path: Path) -> Keeper:
    """A repository of the test's own."""
    return Keeper(tmp_path)
