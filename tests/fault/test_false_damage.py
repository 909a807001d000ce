"""What is no damage: an index that is behind another host's prune, and objects of another user."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from casfs.maintenance.check import Checker, CheckResult
from casfs.maintenance.forget import forget, select_by_name
from casfs.maintenance.prune import Pruner
from casfs.maintenance.prune_plan import PruneOptions
from casfs.maintenance.scrub import PackSelection
from casfs.monitor import RecordingMonitor
from casfs.repository.opening import OpenOptions, open_for_maintenance, open_for_reading
from tests.support.capturing import open_backup_fixture
from tests.support.cli import WITHOUT_READING_EVERYTHING, Casfs
from tests.support.encryption import unlock
from tests.support.stores import pack_paths


def check(root: Path) -> CheckResult:
    options = OpenOptions(unlock=unlock, sync=False)
    with open_for_reading(root, options, reader="check", may_write_index=True) as repository:
        return Checker(repository, RecordingMonitor()).check(PackSelection())


def test_check_finds_no_damage_after_another_host_has_pruned(
    own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, source = own_home / "repository", tmp_path / "source"
    source.mkdir()
    for number in range(8):
        (source / str(number)).write_bytes(os.urandom(50_000))
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_home / "one host"))
    with open_backup_fixture(root, encrypted=True) as backups:
        first = backups.back_up(source).result.snapshot_id
        assert first is not None
        for number in range(6):
            (source / str(number)).unlink()
        backups.back_up(source)
    assert check(root).damage == []
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_home / "another host"))
    options = OpenOptions(unlock=unlock, sync=False)
    packs = set(pack_paths(root))
    with open_for_maintenance(root, "prune", options) as repository:
        forget(repository, select_by_name(repository, [first.hex()], False))
        Pruner(repository, PruneOptions(), RecordingMonitor()).prune()
    assert packs - set(pack_paths(root)), "the prune removed no pack"
    assert check(root).damage == []
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_home / "one host"))
    result = check(root)
    assert (result.damage, result.unreadable) == ([], [])
    # A pack that is lost is still found to be.
    lost = max(root.glob("packs/*/*"), key=lambda path: path.stat().st_size)
    lost.unlink()
    assert check(root).damage != []


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up the right to read everything")
@pytest.mark.parametrize(("prefix", "what"), [("packs", "file"), ("meta", "tree")])
@pytest.mark.parametrize("options", [(), ("--read-data",), ("--storage",)])
def test_check_reports_what_this_user_may_not_read_and_calls_it_no_damage(
    tmp_path: Path, options: tuple[str, ...], prefix: str, what: str
) -> None:
    home, source = tmp_path / "home", tmp_path / "source"
    home.mkdir()
    source.mkdir()
    (source / "file").write_bytes(os.urandom(100_000))
    casfs = Casfs(tmp_path / "repository", home).init()
    casfs.backup(source)
    (pack,) = (tmp_path / "repository").glob(f"{prefix}/*/*")
    os.chown(pack, 65534, 65534)
    os.chmod(pack, 0o600)
    result = casfs.json("check", *options, expect=1, prefix=WITHOUT_READING_EVERYTHING)
    assert result.of_type("damage") == []
    found = result.of_type("unreadable")
    is_keyless = options == ("--storage",)
    assert {one["what"] for one in found} == ({"pack"} if is_keyless else {"pack", what})
    assert "Permission denied" in found[0]["message"]
    summary = result.one("summary")
    assert (summary["ok"], summary["damage"], summary["unreadable"]) == (False, 0, len(found))
    assert casfs.json("check", *options).one("summary")["ok"]


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up the right to read everything")
def test_a_backup_refers_to_no_pack_that_its_user_may_not_read(tmp_path: Path) -> None:
    home, source = tmp_path / "home", tmp_path / "source"
    home.mkdir()
    source.mkdir()
    (source / "file").write_bytes(os.urandom(100_000))
    casfs = Casfs(tmp_path / "repository", home).init()
    casfs.backup(source)
    packs = pack_paths(tmp_path / "repository")
    assert len(packs) == 2
    for pack in packs:
        os.chown(pack, 65534, 65534)
        os.chmod(pack, 0o600)
    mine = casfs.backup(source, prefix=WITHOUT_READING_EVERYTHING)
    assert mine["new_plain_bytes"] > 100_000
    target = tmp_path / "target"
    casfs.run("restore", "latest", "--target", target, prefix=WITHOUT_READING_EVERYTHING)
    restored = target / str(source).lstrip("/") / "file"
    assert restored.read_bytes() == (source / "file").read_bytes()
    again = casfs.backup(source, prefix=WITHOUT_READING_EVERYTHING)
    assert again["new_plain_bytes"] < 100_000
    assert casfs.json("check", "--read-data").one("summary")["ok"]
