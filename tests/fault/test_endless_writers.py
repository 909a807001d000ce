"""A writer that never stops, read without freezing: a mixture is never called stable."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from casfs.backup.capture import Capturer
from casfs.backup.reflink import Freeze, Reflinker
from casfs.backup.source_fs import AT_FDCWD, open_directory
from casfs.backup.source_reader import SourceReader
from casfs.backup.stability import RetryBudget
from casfs.digest import Digest, digest_of
from casfs.format.codec import BlobKind
from casfs.format.tree import CaptureState, capture_of, captured_digest
from tests.support.capturing import BackupFixture
from tests.support.loop_devices import MIB, endless_writer, generations
from tests.support.read_hooks import Reads

pytestmark = [pytest.mark.slow]

CAPTURES = 200
STEP = 16 * 1024


@pytest.mark.parametrize(("size", "pause_s"), [(MIB, 0.0), (MIB, 0.002)])
def test_a_mixture_of_two_generations_is_never_called_stable(
    backups: BackupFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    pause_s: float,
) -> None:
    """Pauses between the generations give captures a chance; those that take it must be whole.

    Reads come in small steps, so that the writer gets between them.
    """
    blobs: dict[bytes, bytes] = {}

    def put(kind: BlobKind, digest: Digest, plain: bytes) -> None:
        blobs[digest] = plain

    states: Counter[CaptureState] = Counter()
    disturbed = 0
    folder = tmp_path / "source"
    folder.mkdir()
    with endless_writer(folder / "file", size, pause_s):
        fd = open_directory(AT_FDCWD, bytes(folder))
        Reads(monkeypatch, STEP).watch(folder / "file", lambda _: None)
        for _ in range(CAPTURES):
            reader = SourceReader(backups.repository.chunker(), put, digest_of)
            capturer = Capturer(reader, Reflinker(Freeze.NEVER), RetryBudget(10), 2, lambda _: None)
            node = capturer.capture(fd, b"file")
            data = b"".join(
                blobs[extent.digest]
                for extent in backups.repository.content(node).extents()
                if extent.digest is not None
            )
            assert len(data) == node.size == size
            assert digest_of(data) == captured_digest(node)
            held = generations(data)
            states[CaptureState(node.state)] += 1
            disturbed += capture_of(node) is not None
            if node.state == CaptureState.STABLE:
                assert len(held) == 1, "a mixture is called stable"
    assert sum(states.values()) == CAPTURES
    assert disturbed > 0, "the writer never disturbed a capture"
    if pause_s:
        assert states[CaptureState.STABLE] > 0, "no capture found a pause"
