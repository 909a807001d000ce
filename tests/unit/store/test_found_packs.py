"""Packs that an index lacks are added from their directories, a few in each transaction."""

from __future__ import annotations

from pathlib import Path

import pytest

from casfs.index import index as index_module
from casfs.store.blob_store import pack_name
from casfs.store.pending_removal import RemovalNotice, publish_notice
from tests.support.hosts import MAINTENANCE, WRITER, Host, Place, directories, require_as_rebuilt
from tests.support.stores import noise

PACKS = 5


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A storage with packs that no delta names."""
    place = Place()
    for number in range(PACKS):
        with Host(place, tmp_path / "writer").open(WRITER) as host:
            host.put([noise(f"{number} {n}", 100) for n in range(10)])
    return place


@pytest.mark.parametrize("pages", [1, 32_768])
def test_found_packs_are_all_in_the_index_whatever_the_number_of_transactions(
    place: Place, tmp_path: Path, pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "_FOUND_AT_ONCE", pages)
    steps: list[str] = []
    found = Host(place, tmp_path / "finder", on_step=steps.append)
    with found.open(MAINTENANCE) as host:
        commits = steps.count("commit index")
        require_as_rebuilt(host, directories(place, tmp_path / "model"))
        assert host.index.has_all_packs
        assert len(host.packs()) == PACKS
    assert commits >= PACKS if pages == 1 else commits < PACKS


def test_found_packs_under_notice_are_marked_in_each_transaction(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "_FOUND_AT_ONCE", 1)
    with Host(place, tmp_path / "first").open(MAINTENANCE) as host:
        packs = sorted(host.packs())
    condemned = {packs[0], packs[2], packs[4]}
    publish_notice(place.storage, RemovalNotice.of(1, condemned))
    with Host(place, tmp_path / "finder").open(MAINTENANCE) as host:
        marked = host.index.marked_for_removal()
        assert {one.pack for one in host.index.packs() if one.ordinal in marked} == condemned
        assert all(place.storage.size(pack_name(pack)) for pack in packs)


def test_fewer_packs_are_added_at_once_the_larger_the_index_is(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Host(place, tmp_path / "finder").open(MAINTENANCE) as host:
        assert host.index.packs_at_once() == 27
        monkeypatch.setattr(index_module, "_FOUND_AT_ONCE", 2401)
        assert host.index.packs_at_once() == 2
        monkeypatch.setattr(index_module, "_FOUND_AT_ONCE", 1)
        assert host.index.packs_at_once() == 1
