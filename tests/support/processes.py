"""Other processes, as /proc shows them."""

from __future__ import annotations

from pathlib import Path


def children_of(pid: int) -> list[int]:
    """Return the processes that a process started and that have not ended."""
    processes = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [one for one in processes if _parent_of(one) == pid]


def has_ended(pid: int) -> bool:
    """Return whether a process has ended, reaped or not."""
    return _parent_of(pid) is None


def _parent_of(pid: int) -> int | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[1])
