"""A process that holds keys: nothing else reads its memory, and it still reaches what it needs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from casfs.backup import source_fs
from casfs.crypto.identities import read_identity_file
from casfs.crypto.process_protection import forbid_inspection
from tests.support.encryption import SECRET, EncryptedRepositoryFixture
from tests.support.other_user import as_other_user, needs_root

OPEN = """
import ctypes, sys
from pathlib import Path
from casfs.repository.opening import OpenOptions, open_for_reading
from tests.support.encryption import unlock
before = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
open_for_reading(Path(sys.argv[1]), OpenOptions(unlock=unlock)).close()
print(before, ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
"""

PROJECT = Path(__file__).parents[3]


def test_a_process_that_opened_an_encrypted_repository_cannot_be_inspected(tmp_path: Path) -> None:
    repo = EncryptedRepositoryFixture(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(repo.root)],
        capture_output=True,
        text=True,
        check=True,
        cwd=PROJECT,
    )
    assert done.stdout.split() == ["1", "0"]


@needs_root
def test_a_protected_process_of_an_ordinary_user_reaches_its_own_descriptors(
    tmp_path: Path,
) -> None:
    """Directories are listed, and xattrs are read, through /proc/self/fd."""
    (tmp_path / "name").touch()
    tmp_path.chmod(0o755)
    fd = os.open(tmp_path, os.O_RDONLY)

    def act() -> None:
        forbid_inspection()
        assert source_fs.list_names(fd) == [b"name"]
        assert source_fs.read_entry_xattrs(fd, b"name").error is None
        assert os.readlink(f"/proc/self/fd/{fd}") == str(tmp_path)
        assert Path("/proc/self/mountinfo").read_bytes()

    try:
        assert as_other_user(act)
    finally:
        os.close(fd)


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, True), (0o604, True)])
def test_an_identity_file_that_others_can_read_gets_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warned: bool
) -> None:
    path = tmp_path / "identity"
    path.write_text(SECRET + "\n")
    path.chmod(mode)
    with caplog.at_level(logging.WARNING):
        (found,) = read_identity_file(path, lambda _: None)
    assert found is not None
    assert ("other users can read the identity file" in caplog.text) == warned
