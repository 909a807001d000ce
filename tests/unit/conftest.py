"""What several unit tests start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.builders import RepositoryFixture


@pytest.fixture
def repo(tmp_path: Path) -> RepositoryFixture:
    """A repository of the test's own."""
    return RepositoryFixture(tmp_path)
