"""A machine that says that its packs hold what they do not hold: others verify before they rely on it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from casfs.backup.run import BackupOptions, BackupResult, run_backup
from casfs.backup.stability import is_racy
from casfs.cli.app import casfs
from casfs.cli.settings import Settings
from casfs.format.codec import BlobKind
from casfs.format.delta import DeltaBuilder, DeltaPack
from casfs.format.pack import PackEntry
from casfs.maintenance.check import Checker
from casfs.maintenance.scrub import PackSelection
from casfs.monitor import RecordingMonitor
from casfs.repository.creation import create_repository
from casfs.repository.opening import (
    OpenOptions,
    open_for_maintenance,
    open_for_reading,
    open_for_writing,
)
from casfs.repository.place import LocalPlace, Place
from casfs.repository.repository import Repository
from casfs.storage.memory import MemoryStorage
from casfs.storage.url import Scheme, StorageAddress
from tests.support.encryption import RECIPIENT, unlock
from tests.support.far_repository import HostPlace
from tests.support.observation import look_at_snapshots, look_at_source
from tests.support.storage_double import RecordingStorage
from tests.support.stores import noise
from tests.support.waiting import wait_until

VICTIM = noise("the content of a file", 40_000)


class Machines:
    """Machines with a state and a cache of their own that use one repository."""

    def __init__(
        self,
        folder: Path,
        patch: pytest.MonkeyPatch,
        is_far: bool = True,
        is_encrypted: bool = False,
        format_: int = 2,
    ) -> None:
        self.folder = folder
        self.root = folder / "repository"
        self.storage = RecordingStorage(MemoryStorage("s3://bucket/r"))
        self._patch = patch
        self._is_far = is_far
        self._options = OpenOptions(unlock=unlock if is_encrypted else None, sync=False)
        recipients = (RECIPIENT,) if is_encrypted else ()
        with self.on("owner"):
            create_repository(self.place("owner"), recipients, format_=format_)

    def place(self, machine: str) -> Place:
        if not self._is_far:
            return LocalPlace(self.root)
        address = StorageAddress(Scheme.S3, "r", bucket="bucket")
        cache = self.folder / machine / "index folder"
        return HostPlace(address, storage=self.storage, cache=cache)

    @contextmanager
    def on(self, machine: str) -> Iterator[None]:
        """Be a machine."""
        with self._patch.context() as patch:
            for name in ("state", "cache"):
                path = self.folder / machine / name
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
                patch.setenv(f"XDG_{name.upper()}_HOME", str(path))
            yield

    @contextmanager
    def writing(self, machine: str, options: OpenOptions | None = None) -> Iterator[Repository]:
        chosen = options if options is not None else self._options
        with (
            self.on(machine),
            open_for_writing(self.place(machine), "backup", chosen) as repository,
        ):
            yield repository

    def source(self, name: str, **files: bytes) -> Path:
        folder = self.folder / "sources" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        return folder

    def back_up(
        self,
        machine: str,
        source: Path,
        can_read: bool = True,
        reread: bool = False,
        use_parent: bool = True,
    ) -> BackupResult:
        wait_until(
            lambda: not any(is_racy(path.lstat(), time.time_ns()) for path in source.iterdir()),
            "files older than a tick of the clock",
        )
        options = BackupOptions(
            (bytes(source),), host=machine, patience_s=0.0, reread=reread, use_parent=use_parent
        )
        opened = None if can_read else OpenOptions(allow_no_identity=True, sync=False)
        self.storage.calls.clear()
        with self.writing(machine, opened) as repository:
            return run_backup(repository, options, RecordingMonitor())

    def claim(self, *contents: bytes, machine: str = "liar") -> None:
        """Store other bytes under the digests of some contents, and publish that."""
        with self.writing(machine) as repository:
            index = repository.store.index
            index.distrust({record.ordinal for record in index.packs()})
            writer = repository.writer()
            try:
                for content in contents:
                    digest = repository.codec.digest(content)
                    writer.put(BlobKind.DATA, digest, b"?" * len(content))
                assert writer.finish().new_blobs == len(contents)
            finally:
                writer.close()
            if repository.deltas is not None:
                repository.deltas.publish()

    def require_whole(self, source: Path) -> None:
        """Read the snapshots of a source as a machine that never saw the repository."""
        expected = look_at_source(source)
        with self.on("reader"), open_for_reading(self.place("reader"), self._options) as repository:
            found = look_at_snapshots(repository).values()
        of_source = [files for files in found if files.keys() >= expected.keys()]
        assert of_source
        assert all(files[path] == expected[path] for files in of_source for path in expected)

    def check(self, machine: str, reads: bool = False) -> set[str]:
        """Return the messages of a check of packs."""
        with (
            self.on(machine),
            open_for_maintenance(self.place(machine), "check", self._options) as repository,
        ):
            selected = PackSelection() if reads else None
            result = Checker(repository, RecordingMonitor()).check(selected)
            return {finding.message for finding in result.damage if finding.what == "pack"}

    def pack_bytes_read(self) -> int:
        return sum(
            call.size
            for call in self.storage.calls
            if call.method == "read" and call.name.startswith("packs/")
        )


MachinesOf = Callable[..., Machines]


@pytest.fixture
def machines_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MachinesOf:
    return lambda **kind: Machines(tmp_path, monkeypatch, **kind)


@pytest.mark.parametrize("format_", [1, 2])
@pytest.mark.parametrize("is_encrypted", [False, True], ids=["plain", "encrypted"])
@pytest.mark.parametrize("is_far", [False, True], ids=["local", "far"])
def test_a_backup_stores_what_another_machine_only_says_that_it_stored(
    machines_of: MachinesOf, is_far: bool, is_encrypted: bool, format_: int
) -> None:
    machines = machines_of(is_far=is_far, is_encrypted=is_encrypted, format_=format_)
    machines.claim(VICTIM)
    source = machines.source("files", file=VICTIM)
    first = machines.back_up("owner", source)
    assert first.false_packs == 1
    assert any("says it holds" in message for message in machines.check("owner"))
    again = machines.back_up("owner", source, reread=True)
    assert again.false_packs == 0
    assert again.snapshot.stats.new_plain_bytes < len(VICTIM)
    machines.require_whole(source)


def test_a_claim_of_an_index_delta_alone_is_found_false(machines_of: MachinesOf) -> None:
    machines = machines_of()
    other = machines.source("other", file=noise("other", 50_000))
    machines.back_up("liar", other)
    with machines.writing("liar") as repository:
        record = next(one for one in repository.store.index.packs() if not one.pack.is_meta)
        entries = repository.store.read_directory(record.pack, record.pack_bytes)
        digest = repository.codec.digest(VICTIM)
        lie = PackEntry(digest, entries[0].offset, len(VICTIM), len(VICTIM), 1, 0)
        builder = DeltaBuilder()
        builder.add(DeltaPack(record.pack, record.pack_bytes, [lie]))
        name, data = builder.encode(repository.clock.now_ns() // 1_000_000 + 1)
        repository.store.storage.create(str(name), data)
    source = machines.source("files", file=VICTIM)
    assert machines.back_up("owner", source).false_packs == 1
    machines.require_whole(source)


def test_a_machine_verifies_once_what_another_machine_stored(machines_of: MachinesOf) -> None:
    machines = machines_of()
    source = machines.source("files", **{f"f{n}": noise(f"f{n}", 300_000) for n in range(20)})
    machines.back_up("owner", source)
    first = machines.back_up("second", source)
    assert first.false_packs == 0
    assert first.snapshot.stats.new_plain_bytes < 100_000
    assert 6_000_000 < machines.pack_bytes_read() < 7_000_000
    machines.back_up("second", source, reread=True)
    assert machines.pack_bytes_read() == 0


def test_a_machine_reads_no_pack_that_it_stored_itself(machines_of: MachinesOf) -> None:
    machines = machines_of()
    source = machines.source("files", file=VICTIM)
    machines.back_up("owner", source)
    machines.back_up("other", machines.source("other", file=noise("other", 1000)))
    machines.back_up("owner", source, reread=True, use_parent=False)
    assert machines.pack_bytes_read() == 0


def test_few_blobs_of_a_large_pack_are_read_alone(machines_of: MachinesOf) -> None:
    machines = machines_of()
    large = machines.source("large", file=noise("large", 8_000_000), small=VICTIM)
    machines.back_up("owner", large)
    machines.back_up("second", machines.source("files", file=VICTIM))
    assert len(VICTIM) <= machines.pack_bytes_read() < 2 * len(VICTIM)


def test_a_claim_of_another_size_costs_no_read(machines_of: MachinesOf) -> None:
    machines = machines_of()
    with machines.writing("liar") as repository:
        writer = repository.writer()
        try:
            digest = repository.codec.digest(VICTIM)
            writer.put(BlobKind.DATA, digest, noise("as large as a blob may be", 16_000_000))
            writer.finish()
        finally:
            writer.close()
        assert repository.deltas is not None
        repository.deltas.publish()
    source = machines.source("files", file=VICTIM)
    assert machines.back_up("owner", source).false_packs == 1
    assert machines.pack_bytes_read() == 0
    machines.require_whole(source)


def test_a_machine_that_lost_its_index_reads_no_unchanged_data_again(
    machines_of: MachinesOf,
) -> None:
    machines = machines_of()
    source = machines.source("files", file=noise("unchanged", 3_000_000))
    machines.back_up("owner", source)
    for path in (machines.folder / "owner" / "index folder" / "index").iterdir():
        path.unlink()
    again = machines.back_up("owner", source)
    assert again.snapshot.stats.unchanged == 1
    assert machines.pack_bytes_read() == 0


def test_a_claim_does_not_stand_in_for_a_lost_pack_of_an_unchanged_file(
    machines_of: MachinesOf,
) -> None:
    machines = machines_of()
    source = machines.source("files", file=VICTIM)
    machines.back_up("owner", source)
    machines.claim(VICTIM)
    with machines.writing("owner") as repository:
        own = {
            one.ordinal: one.pack
            for one in repository.store.index.packs()
            if not repository.store.index.is_claimed(one.ordinal) and not one.pack.is_meta
        }
        repository.store.index.remove_packs(own, lost=True)
        for pack in own.values():
            repository.store.storage.delete(f"packs/{pack.id.hex()[:2]}/{pack.id.hex()}")
    assert machines.back_up("owner", source).false_packs == 1
    machines.require_whole(source)


def test_a_host_without_an_identity_relies_on_its_own_packs_only(machines_of: MachinesOf) -> None:
    machines = machines_of(is_encrypted=True)
    source = machines.source("files", file=VICTIM)
    machines.back_up("owner", source)
    # With an identity it learns where the data of the others are; without one it cannot verify that.
    machines.back_up("host", machines.source("other", file=b"other"))
    first = machines.back_up("host", source, can_read=False).snapshot.stats
    assert first.new_plain_bytes > len(VICTIM)
    second = machines.back_up("host", source, can_read=False, use_parent=False).snapshot.stats
    assert second.unchanged == 0 and second.new_plain_bytes < len(VICTIM)
    assert machines.pack_bytes_read() == 0


def test_a_check_that_reads_the_data_verifies_the_packs_of_other_machines(
    machines_of: MachinesOf,
) -> None:
    machines = machines_of()
    source = machines.source("files", file=noise("shared", 3_000_000))
    machines.back_up("owner", source)
    assert machines.check("second", reads=True) == set()
    machines.back_up("second", source)
    assert machines.pack_bytes_read() == 0


def test_a_prune_removes_a_pack_with_false_claims(machines_of: MachinesOf) -> None:
    machines = machines_of(is_far=False)
    machines.claim(VICTIM)
    source = machines.source("files", file=VICTIM)
    machines.back_up("owner", source)
    result = run(machines, "owner", "prune")
    assert result.exit_code == 0, result.output
    assert machines.check("owner", reads=True) == set()
    machines.require_whole(source)


def test_a_backup_that_found_a_false_claim_says_so_and_fails_as_for_damage(
    machines_of: MachinesOf,
) -> None:
    machines = machines_of(is_far=False)
    machines.claim(VICTIM)
    source = machines.source("files", file=VICTIM)
    result = run(machines, "owner", "backup", str(source), "--json")
    assert result.return_value == 5
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    (summary,) = [line for line in lines if line["type"] == "snapshot"]
    assert summary["id"] is not None and summary["false_packs"] == 1
    checked = run(machines, "owner", "check")
    assert checked.return_value == 5
    assert "find out which machine that is" in checked.output


def run(machines: Machines, machine: str, *arguments: str) -> Result:
    """Run a command on a machine."""
    with machines.on(machine):
        result = CliRunner().invoke(
            casfs,
            [*arguments, "--repo", str(machines.root)],
            obj=Settings(),
            standalone_mode=False,
        )
    if result.exception is not None:
        raise result.exception
    return result
