"""A flipped byte in a pack is found, named, and costs nothing but what it hits."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.cli import Casfs
from tests.support.comparing import tree_differences
from tests.support.stored_objects import StoredObject, StoredObjects

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Damaged:
    casfs: Casfs
    source: Path
    pack: StoredObject
    big: bytes


@pytest.fixture
def damaged(repository: Casfs, source: Path, tmp_path: Path) -> Damaged:
    """One byte in the middle of the pack that holds `big` is not what it was."""
    big = os.urandom(24 * MIB)
    (source / "big").write_bytes(big)
    repository.backup("source", cwd=tmp_path)
    objects = StoredObjects(repository)
    pack = objects.largest_pack()
    objects.flip(pack.name, 12 * MIB)
    return Damaged(repository, source, pack, big)


class TestCheck:
    def test_check_finds_no_damage_in_an_intact_repository(
        self, repository: Casfs, source: Path
    ) -> None:
        for _ in range(2):
            repository.backup(source)
        for options in ((), ("--read-data",), ("--read-data-subset", "50%")):
            result = repository.json("check", *options)
            assert result.one("summary")["ok"] is True
            assert result.of_type("damage") == []
            assert repository.run("check", *options).text.strip()

    def test_check_finds_no_damage_in_an_empty_repository(self, repository: Casfs) -> None:
        assert repository.json("check", "--read-data").one("summary")["ok"] is True

    def test_check_with_read_data_names_the_damaged_pack_and_file(self, damaged: Damaged) -> None:
        result = damaged.casfs.json("check", "--read-data", expect=5)
        assert result.one("summary")["ok"] is False
        damage = result.of_type("damage")
        assert damage
        reported = str(damage)
        assert damaged.pack.digest in reported
        assert "source/big" in reported
        assert "readme.txt" not in reported
        assert "photo.raw" not in reported
        people = damaged.casfs.run("check", "--read-data", expect=5)
        printed = people.text + people.complaint
        assert damaged.pack.digest[:12] in printed
        assert "source/big" in printed

    def test_check_names_a_damaged_file_in_every_snapshot_that_has_it(
        self, damaged: Damaged, tmp_path: Path
    ) -> None:
        (damaged.source / "big").rename(damaged.source / "big under a new name")
        damaged.casfs.backup("source", cwd=tmp_path)
        ids = [snapshot["id"] for snapshot in damaged.casfs.json("snapshots").objects]
        reported = str(damaged.casfs.json("check", "--read-data", expect=5).of_type("damage"))
        assert "source/big'" in reported or 'source/big"' in reported
        assert "source/big under a new name" in reported
        for identity in ids:
            assert identity in reported

    @pytest.mark.parametrize("what", ["a pack is gone", "a pack is cut short"])
    def test_check_without_reading_data_finds_a_missing_or_cut_pack(
        self, damaged: Damaged, what: str
    ) -> None:
        if what == "a pack is gone":
            StoredObjects(damaged.casfs).delete(damaged.pack.name)
        else:
            StoredObjects(damaged.casfs).truncate(damaged.pack.name, 5 * MIB)
        reported = str(damaged.casfs.json("check", expect=5).of_type("damage"))
        assert "source/big" in reported
        # A host that has the index of a far repository for itself may be behind the prune of another one.
        if damaged.casfs.repository is not None or what == "a pack is cut short":
            assert damaged.pack.digest in reported

    def test_check_finds_a_snapshot_that_does_not_match_its_name(
        self, repository: Casfs, source: Path
    ) -> None:
        identity = repository.backup(source)["id"]
        repository.backup(source)
        objects = StoredObjects(repository)
        (damaged,) = [one for one in objects.below("snapshots") if one.digest == identity]
        objects.flip(damaged.name, damaged.size // 2)
        result = repository.json("check", expect=5)
        assert identity in str(result.of_type("damage"))

    @pytest.mark.parametrize("where", [0.0, 0.25, 0.5, 0.75, 1.0])
    def test_check_with_read_data_finds_a_flipped_byte_anywhere_in_a_small_pack(
        self, repository: Casfs, source: Path, where: float
    ) -> None:
        repository.backup(source)
        objects = StoredObjects(repository)
        for pack in objects.packs():
            objects.flip(pack.name, int(where * (pack.size - 1)))
            reported = str(repository.json("check", "--read-data", expect=5).of_type("damage"))
            assert pack.digest in reported
            objects.flip(pack.name, int(where * (pack.size - 1)))
            repository.run("check", "--read-data")


class TestRestoreOfDamage:
    def test_restore_leaves_out_a_damaged_file_and_restores_the_others(
        self, damaged: Damaged, tmp_path: Path
    ) -> None:
        target = tmp_path / "target"
        result = damaged.casfs.json("restore", "latest", "--target", target, expect=5)
        (problem,) = result.of_type("problem")
        assert problem["path"].endswith("source/big")
        assert not (target / "source/big").exists()
        assert sorted(os.listdir(target / "source")) == [
            *("documents", "link", "pictures", "readme.txt"),
        ]
        (damaged.source / "big").unlink()
        os.utime(damaged.source, ns=(0, (target / "source").stat().st_mtime_ns))
        assert tree_differences(damaged.source, target / "source") == []
        people = damaged.casfs.run("restore", "latest", "--target", target, expect=5)
        assert "source/big" in people.complaint

    def test_restore_keeps_an_existing_file_in_place_of_a_damaged_one(
        self, damaged: Damaged, tmp_path: Path
    ) -> None:
        (tmp_path / "target/source").mkdir(parents=True)
        (tmp_path / "target/source/big").write_bytes(b"an older copy")
        damaged.casfs.run("restore", "latest", "--target", tmp_path / "target", expect=5)
        assert (tmp_path / "target/source/big").read_bytes() == b"an older copy"

    def test_restore_with_salvage_writes_zeros_for_lost_ranges_and_lists_them(
        self, damaged: Damaged, tmp_path: Path
    ) -> None:
        target = tmp_path / "target"
        result = damaged.casfs.json("restore", "latest", "--target", target, "--salvage", expect=5)
        saved = (target / "source/big").read_bytes()
        assert len(saved) == len(damaged.big)
        wrong = [
            offset
            for offset in range(0, len(saved), 4096)
            if saved[offset : offset + 4096] != damaged.big[offset : offset + 4096]
        ]
        assert wrong
        assert wrong[-1] - wrong[0] < 8 * MIB
        lost = saved[wrong[0] + 4096 : wrong[-1]]
        assert lost.count(0) == len(lost)
        (problem,) = result.of_type("problem")
        assert problem["path"].endswith("source/big")
        numbers = _numbers(problem)
        start = next(n for n in range(wrong[0], wrong[0] + 4096) if saved[n] != damaged.big[n])
        assert any(start - 64 <= number <= start for number in numbers), (problem, start)

    def test_restore_of_an_intact_part_of_a_damaged_snapshot_succeeds(
        self, damaged: Damaged, tmp_path: Path
    ) -> None:
        damaged.casfs.run("restore", "latest:source/documents", "--target", tmp_path / "target")
        assert tree_differences(damaged.source / "documents", tmp_path / "target") == []

    def test_restore_without_a_pack_names_every_lost_file_and_continues(
        self, damaged: Damaged, tmp_path: Path
    ) -> None:
        (damaged.source / "later").write_bytes(b"in another pack")
        damaged.casfs.backup("source", cwd=tmp_path)
        StoredObjects(damaged.casfs).delete(damaged.pack.name)
        result = damaged.casfs.json("restore", "latest", "--target", tmp_path / "target", expect=5)
        lost = {problem["path"].rpartition("source/")[2] for problem in result.of_type("problem")}
        assert "big" in lost
        assert (tmp_path / "target/source/later").read_bytes() == b"in another pack"


def _numbers(value: object) -> set[int]:
    """Return every number in a JSON value, however it is arranged."""
    if isinstance(value, str):
        return {int(digits) for digits in re.findall(r"\d+", value)}
    if isinstance(value, int):
        return {value}
    if isinstance(value, dict):
        return {n for item in value.values() for n in _numbers(item)}
    if isinstance(value, list):
        return {n for item in value for n in _numbers(item)}
    return set()


class TestOtherCommands:
    def test_dump_of_a_damaged_file_fails_and_of_another_does_not(self, damaged: Damaged) -> None:
        result = damaged.casfs.run("dump", "latest:source/big", expect=None)
        assert result.exit in (1, 5), result
        assert damaged.big.startswith(result.out)
        assert len(result.out) < len(damaged.big)
        assert result.complaints
        assert damaged.casfs.run("dump", "latest:source/readme.txt").out == b"read me\n"

    def test_ls_and_find_and_a_new_backup_still_work(
        self, damaged: Damaged, tmp_path: Path
    ) -> None:
        assert "source/big" in damaged.casfs.run("ls", "latest").text
        damaged.casfs.run("find", "big")
        damaged.casfs.backup("source", cwd=tmp_path)

    def test_a_deleted_index_loses_nothing(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        repository.backup("source", cwd=tmp_path)
        StoredObjects(repository).delete_index()
        repository.run("restore", "latest", "--target", tmp_path / "target")
        assert tree_differences(source, tmp_path / "target/source") == []
        again = repository.backup("--no-parent", "source", cwd=tmp_path)
        assert again["new_bytes"] < 65536
        assert repository.json("check", "--read-data").one("summary")["ok"] is True
