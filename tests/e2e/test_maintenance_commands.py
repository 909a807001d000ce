"""casfs forget and casfs prune, as people use them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_json_reference import differences, read_page
from tests.support.cli import Casfs, Result
from tests.support.comparing import tree_differences
from tests.support.mounts import mounted
from tests.support.stored_objects import StoredObjects

MIB = 1 << 20


def size_of(casfs: Casfs) -> int:
    return StoredObjects(casfs).stored_bytes()


def ids(casfs: Casfs) -> list[str]:
    return [line["id"] for line in casfs.json("snapshots").of_type("snapshot")]


def verdicts(result: Result) -> dict[str, list[str]]:
    """Return the reasons for each snapshot by its time's date; none means that it goes."""
    return {line["time"][:10]: line["reasons"] for line in result.of_type("snapshot")}


@pytest.fixture
def daily(repository: Casfs, source: Path) -> Casfs:
    """Five snapshots, a day apart."""
    for day in (1, 2, 3, 4, 5):
        (source / "diary.txt").write_text(f"day {day}")
        repository.backup(source, "--time", f"2026-05-0{day}T12:00:00")
    return repository


class TestForget:
    def test_forget_keeps_what_rules_keep_and_reports_why(self, daily: Casfs) -> None:
        before = ids(daily)
        rules = ("--keep-last", "1", "--keep-daily", "2", "--keep-weekly", "2")
        dry = daily.json("forget", *rules, "--dry-run")
        assert ids(daily) == before
        assert verdicts(dry) == {
            "2026-05-05": ["last", "daily", "weekly"],
            "2026-05-04": ["daily"],
            "2026-05-03": ["weekly"],
            "2026-05-02": [],
            "2026-05-01": [],
        }
        done = daily.json("forget", *rules)
        assert verdicts(done) == verdicts(dry)
        summary = done.one("summary")
        assert (summary["forgotten"], summary["kept"], summary["dry_run"]) == (2, 3, False)
        assert ids(daily) == before[2:]
        assert daily.json("forget", *rules).one("summary")["forgotten"] == 0

    def test_forget_prints_each_snapshot_with_its_reasons(self, daily: Casfs) -> None:
        printed = daily.run("forget", "--keep-within", "1d", "-n").text
        assert printed.count("within 1d") == 2
        assert "3 snapshots would be forgotten, 2 would be kept" in printed

    def test_forget_judges_the_relative_sources_of_each_directory_apart(
        self, repository: Casfs, tmp_path: Path
    ) -> None:
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "file").write_text(folder)
            for _ in range(2):
                repository.backup(".", cwd=tmp_path / folder)
                repository.backup("--stdin", cwd=tmp_path / folder, stdin=folder.encode())
                repository.backup("--stdin", "--stdin-name", "db.sql", cwd=tmp_path / folder)
        listed = repository.json("snapshots").of_type("snapshot")
        directories = {line["directory"] for line in listed}
        assert directories == {str(tmp_path / "a"), str(tmp_path / "b"), None}
        printed = repository.run("forget", "--keep-last", "1").text
        assert f". in {tmp_path / 'a'}" in printed
        left = repository.json("snapshots").of_type("snapshot")
        assert sorted((line["paths"][0], line["directory"] or "") for line in left) == [
            (".", str(tmp_path / "a")),
            (".", str(tmp_path / "b")),
            ("db.sql", ""),
            ("stdin", str(tmp_path / "a")),
            ("stdin", str(tmp_path / "b")),
        ]

    def test_a_snapshot_from_the_future_is_reported_and_steers_nothing(
        self, daily: Casfs, source: Path
    ) -> None:
        future = daily.backup(source, "--time", "2200-01-01T00:00:00")["id"]
        done = daily.json("forget", "--keep-within", "7d")
        assert done.one("summary")["forgotten"] == 0
        assert verdicts(done)["2200-01-01"] == ["future"]
        assert f"snapshot {future[:12]} is from the future" in done.complaint
        assert (
            daily.json("tag", "--add", "x", "latest")
            .one("snapshot")["time"]
            .startswith("2026-05-05")
        )
        real = ids(daily)[-2]
        assert daily.json("forget", "--keep-last", "1").one("summary")["forgotten"] == 4
        assert ids(daily) == [real, future]

    def test_forget_removes_named_snapshots(self, daily: Casfs) -> None:
        before = ids(daily)
        daily.run("forget", before[0][:12], before[3])
        assert ids(daily) == [before[1], before[2], before[4]]
        daily.refuses("forget", before[0], mentions=["no snapshot has the id"])

    def test_a_snapshot_whose_tags_stay_equal_is_reported_as_unchanged(self, daily: Casfs) -> None:
        before = ids(daily)
        printed = daily.run("tag", before[0], "--remove", "nosuch").text
        assert printed.startswith(f"snapshot {before[0][:12]} is unchanged")
        assert ids(daily) == before

    def test_forget_keeps_tagged_snapshots_and_touches_only_chosen_ones(
        self, daily: Casfs, source: Path
    ) -> None:
        before = ids(daily)
        kept = daily.json("tag", before[0], "--add", "keep").one("snapshot")["id"]
        other = daily.backup(source, "--host", "elsewhere")["id"]
        result = daily.json(
            "forget", "--keep-last", "1", "--keep-tag", "keep", "--host", "elsewhere"
        )
        assert result.one("summary")["forgotten"] == 0
        daily.run("forget", "--keep-last", "1", "--keep-tag", "keep")
        assert set(ids(daily)) == {kept, before[4], other}

    def test_forget_refuses_to_remove_everything(self, daily: Casfs) -> None:
        before = ids(daily)
        daily.refuses("forget", "--keep-tag", "none such", mentions=["nothing was forgotten"])
        daily.refuses("forget", *before, mentions=["no snapshot would be left"])
        assert ids(daily) == before
        daily.run("forget", *before, "--unsafe-allow-remove-all")
        assert ids(daily) == []

    def test_forget_takes_the_latest_snapshot_of_a_host(
        self, repository: Casfs, source: Path
    ) -> None:
        first = repository.backup(source, "--host", "here")["id"]
        second = repository.backup(source, "--host", "there")["id"]
        repository.run("forget", "latest", "--host", "here")
        assert [one["id"] for one in repository.json("snapshots").objects] == [second] != [first]
        repository.refuses(
            "forget", "latest", "--host", "nowhere", mentions=["no snapshot matches"]
        )

    @pytest.mark.parametrize(
        "arguments",
        [
            (),
            ("--prune",),
            ("--keep-last", "0"),
            ("--keep-last", "-3"),
            ("--keep-last", "many"),
            ("--keep-within", "5"),
            ("--keep-last", "1", "--group-by", "colour"),
            ("latest", "--keep-last", "1"),
            ("0123abcd", "--host", "here"),
        ],
    )
    def test_forget_refuses_meaningless_options(
        self, daily: Casfs, arguments: tuple[str, ...]
    ) -> None:
        before = ids(daily)
        daily.refuses("forget", *arguments, expect=2)
        assert ids(daily) == before

    def test_forget_accepts_latest(self, daily: Casfs) -> None:
        before = ids(daily)
        daily.run("forget", "latest")
        assert ids(daily) == before[:-1]


class TestPrune:
    @pytest.fixture
    def bulky(self, repository: Casfs, source: Path) -> Casfs:
        """Two snapshots, of which the first alone holds 8 MiB that do not compress."""
        (source / "bulk").write_bytes(os.urandom(8 * MIB))
        repository.backup(source)
        (source / "bulk").unlink()
        (source / "new").write_bytes(os.urandom(MIB))
        repository.backup(source)
        return repository

    @pytest.mark.parametrize("at_once", [True, False])
    def test_prune_frees_what_forgotten_snapshots_held(
        self, bulky: Casfs, source: Path, tmp_path: Path, at_once: bool
    ) -> None:
        before = size_of(bulky)
        if at_once:
            result = bulky.json("forget", "--keep-last", "1", "--prune").one("prune")
        else:
            bulky.run("forget", "--keep-last", "1")
            assert size_of(bulky) == before
            result = bulky.json("prune").one("prune")
        result = bulky.settled(result)
        assert size_of(bulky) < before - 8 * MIB
        assert result["freed_bytes"] >= 8 * MIB
        assert abs(before - size_of(bulky) - result["freed_bytes"]) < 10_000
        assert bulky.json("check", "--read-data").one("summary")["ok"] is True
        bulky.run("restore", f"latest:{source}", "--target", tmp_path / "target")
        assert tree_differences(source, tmp_path / "target") == []

    def test_prune_dry_run_reports_what_would_be_freed(self, bulky: Casfs) -> None:
        bulky.run("forget", "--keep-last", "1")
        before = size_of(bulky)
        reported = bulky.json("prune", "--dry-run").one("prune")
        assert size_of(bulky) == before
        assert (
            abs(reported["freed_bytes"] - bulky.json("prune").one("prune")["freed_bytes"]) < 10_000
        )
        assert "would be freed" in bulky.run("prune", "-n").text

    @pytest.mark.fuse
    def test_prune_beside_a_mount_keeps_what_the_mount_shows(
        self, bulky: Casfs, source: Path, tmp_path: Path
    ) -> None:
        first = ids(bulky)[0]
        with mounted(bulky, first, at=tmp_path / "mount") as mount:
            bulky.run("forget", first)
            waiting = bulky.json("prune").one("prune")
            assert waiting["waiting_packs"] >= 1
            assert waiting["removed_packs"] == 0
            shown = mount / str(source).lstrip("/") / "bulk"
            assert len(shown.read_bytes()) == 8 * MIB
        assert bulky.settled(bulky.json("prune").one("prune"))["freed_bytes"] >= 8 * MIB

    @pytest.mark.fuse
    def test_prune_that_repacks_shown_data_does_not_disturb_a_mount(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        (source / "bulk").write_bytes(os.urandom(8 * MIB))
        (source / "kept").write_bytes(kept := os.urandom(MIB))
        repository.backup(source)
        (source / "bulk").unlink()
        repository.backup(source)
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            repository.run("forget", "--keep-last", "1")
            reported = repository.json("prune", "--margin", "0s").one("prune")
            # A data pack, and the metadata pack in which the parents of the source have changed.
            assert reported["repacked_packs"] == 2
            assert (mount / str(source).lstrip("/") / "kept").read_bytes() == kept
        assert repository.settled(reported)["freed_bytes"] >= 8 * MIB

    def test_prune_drops_a_draft_that_is_named_and_old_enough(self, bulky: Casfs) -> None:
        assert bulky.repository is not None
        draft = bulky.repository / "drafts" / ("ab" * 32)
        draft.parent.mkdir()
        draft.write_bytes(b"damaged")
        refused = bulky.run("prune", "--drop-draft", "abab", expect=1)
        assert "draft abababababab is not dropped: it is younger than 1 h" in refused.complaint
        hours_ago = draft.stat().st_mtime - 7200
        os.utime(draft, (hours_ago, hours_ago))
        dry = bulky.run("prune", "--dry-run", "--drop-draft", "abab").text
        assert "draft abababababab would be dropped" in dry and draft.exists()
        line = bulky.json("prune", "--drop-draft", "abab").one("draft")
        assert differences(line, read_page()[0]["prune", "draft"]) == []
        assert line["id"] == "ab" * 32 and not draft.exists()
        assert (bulky.repository / "damaged" / ("ab" * 32)).read_bytes() == b"damaged"
        missing = bulky.run("prune", "--drop-draft", "abab", expect=1)
        assert "no draft has the id 'abab'" in missing.complaint

    @pytest.mark.parametrize(
        "arguments", [("--max-unused", "x"), ("--max-unused", "120%"), ("--margin", "soon")]
    )
    def test_prune_refuses_meaningless_options(
        self, repository: Casfs, arguments: tuple[str, ...]
    ) -> None:
        repository.refuses("prune", *arguments, expect=2)

    def test_prune_refuses_to_run_where_a_needed_pack_is_missing(self, bulky: Casfs) -> None:
        objects = StoredObjects(bulky)
        objects.delete(min(objects.packs(), key=lambda pack: pack.size).name)
        before = size_of(bulky)
        result = bulky.run("prune", expect=5)
        assert "nothing was removed" in result.complaint
        assert size_of(bulky) == before


class TestRepair:
    @pytest.fixture
    def damaged(self, repository: Casfs, source: Path) -> Casfs:
        (source / "bulk").write_bytes(os.urandom(8 * MIB))
        repository.backup(source)
        objects = StoredObjects(repository)
        objects.flip(objects.largest_pack().name, 4 * MIB)
        return repository

    def test_a_new_backup_of_the_same_source_repairs_damage(
        self, damaged: Casfs, source: Path
    ) -> None:
        first = ids(damaged)[0]
        found = damaged.json("check", "--read-data", expect=5)
        assert {line["what"] for line in found.of_type("damage")} == {"pack", "blob", "file"}
        damaged.backup(source)
        healed = damaged.run("dump", f"{first}:{source}/bulk")
        assert healed.out == (source / "bulk").read_bytes()
        assert not damaged.json("check", expect=None).of_type("damage")

    def test_repair_snapshots_keeps_what_is_left_and_reports_what_is_lost(
        self, damaged: Casfs, source: Path, tmp_path: Path
    ) -> None:
        first = ids(damaged)[0]
        dry = damaged.json("repair", "snapshots", "--read-data", "--dry-run")
        assert ids(damaged) == [first]
        assert dry.one("summary")["repaired"] == 1
        done = damaged.json("repair", "snapshots", "--read-data")
        (problem,) = done.of_type("problem")
        assert problem["path"].endswith("/bulk") and "are lost" in problem["message"]
        (new,) = ids(damaged)
        assert done.one("snapshot")["replaced_by"] == new != first
        (flagged,) = (
            damaged.json("changed", "latest").of_type("flagged")
            or damaged.json("changed", "latest").objects
        )
        assert flagged["reason"] == "damaged"
        restored = damaged.run("restore", f"latest:{source}", "--target", tmp_path / "target")
        assert "zeros" in restored.complaint
        data, want = (tmp_path / "target" / "bulk").read_bytes(), (source / "bulk").read_bytes()
        assert len(data) == len(want)
        same = sum(a == b for a, b in zip(data[::4096], want[::4096], strict=True))
        assert 0 < same < len(data[::4096])
        damaged.run("prune")
        assert damaged.json("check", "--read-data").one("summary")["ok"] is True

    def test_repair_index_builds_the_index_from_the_packs(
        self, damaged: Casfs, source: Path
    ) -> None:
        StoredObjects(damaged).damage_index()
        result = damaged.json("repair", "index").one("index")
        assert (result["packs"] >= 1, result["blobs"] > 3) == (True, True)
        assert damaged.run("dump", f"latest:{source}/readme.txt").out == b"read me\n"

    @pytest.mark.parametrize("arguments", [(), ("everything",), ("index", "--fast")])
    def test_repair_refuses_meaningless_options(
        self, repository: Casfs, arguments: tuple[str, ...]
    ) -> None:
        assert repository.run("repair", *arguments, expect=2).complaints


class TestScrub:
    def test_scrub_reads_the_stalest_packs_first_and_continues_where_it_ended(
        self, repository: Casfs, source: Path
    ) -> None:
        def read(*options: str) -> dict[str, Any]:
            return repository.json("check", "--read-data", *options).one("summary")

        for number in range(3):
            (source / f"new {number}").write_bytes(os.urandom(1000))
            repository.backup(source)
        first = read("--max-duration", "0s")
        assert (first["packs_read"], first["packs_left"]) == (0, 6)
        # The check of the trees has read every blob of the metadata packs.
        assert read("--older-than", "30d")["packs_read"] == 3
        assert read("--older-than", "30d")["packs_read"] == 0
        assert read("--older-than", "0s")["packs_read"] == 6
        assert read()["packs_read"] == 6

    @pytest.mark.parametrize(
        "arguments",
        [
            ("--older-than", "x"),
            ("--read-data", "--older-than", "x"),
            ("--max-duration", "-5m"),
            ("--read-data-subset", "0%"),
            ("--storage", "--older-than", "30d"),
        ],
    )
    def test_scrub_refuses_meaningless_options(
        self, repository: Casfs, arguments: tuple[str, ...]
    ) -> None:
        repository.refuses("check", *arguments, expect=2)
