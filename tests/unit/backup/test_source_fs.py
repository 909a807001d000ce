"""What is read from a source's file system: values that a node has no room for."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from casfs.backup.source_fs import clamp_time_ns, list_names, make_node, read_xattrs
from casfs.format.tree import Leaf, NodeType, decode_piece, encode_piece

FAR_NS = 1 << 80


def _stat_with_times(mtime_ns: int, ctime_ns: int) -> os.stat_result:
    fields = [stat.S_IFDIR | 0o755, 7, 1, 2, 0, 0, 0, 0, mtime_ns / 1e9, ctime_ns / 1e9]
    return os.stat_result(fields, {"st_mtime_ns": mtime_ns, "st_ctime_ns": ctime_ns})


@pytest.mark.parametrize("time_ns", [0, -1, 1 << 62, -(1 << 63), (1 << 63) - 1])
def test_a_time_that_fits_is_kept(time_ns: int) -> None:
    assert clamp_time_ns(time_ns) == time_ns


def test_times_beyond_64_bits_of_nanoseconds_become_the_nearest_that_can_be_stored() -> None:
    node = make_node(b"far", _stat_with_times(FAR_NS, -FAR_NS), NodeType.FIFO, ())
    assert (node.mtime_ns, node.ctime_ns) == ((1 << 63) - 1, -(1 << 63))
    assert decode_piece(encode_piece(Leaf([node]))) == Leaf([node])


def test_more_xattrs_than_a_snapshot_has_room_for_are_a_problem_of_the_entry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [f"user.{number}" for number in range(65)]
    monkeypatch.setattr(os, "listxattr", lambda *_, **__: names)
    monkeypatch.setattr(os, "getxattr", lambda *_, **__: bytes(65536))
    xattrs, error = read_xattrs(b"anything")
    assert error is not None and error.errno == errno.E2BIG
    assert "exceed 4 MiB in total" in str(error)
    assert [os.fsdecode(name) for name, _ in xattrs] == sorted(names[:63])


def test_a_name_that_is_listed_twice_is_returned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "listdir", lambda _: [b"b", b"a", b"b", b"c", b"b"])
    assert list_names(0) == [b"a", b"b", b"c"]
