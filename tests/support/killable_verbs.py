"""Verbs of casfs, each done in a process of its own that may be killed at any moment.

Run as a program this is a process that has casfs loaded and no threads. For every line that it reads
it forks, so that hundreds of them cost little, and what happens to a child affects no other process. The
child prints its durable steps as they come, then its result; `stage` is the other end. Packs are small here,
so that a small source fills many of them.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import logging
import os
import resource
import signal
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from casfs.backup.run import BackupOptions, run_backup
from casfs.cli.app import run as run_command
from casfs.crypto import age
from casfs.crypto import passphrase as passphrase_module
from casfs.crypto.identities import Identities
from casfs.crypto.trust_root import TrustRoot
from casfs.digest import Digest
from casfs.errors import CasfsError, IntegrityError
from casfs.index import index as index_module
from casfs.index.index import Index
from casfs.maintenance.check import Checker
from casfs.maintenance.forget import Candidate, forget
from casfs.maintenance.prune import Pruner
from casfs.maintenance.prune_plan import PruneOptions
from casfs.maintenance.repair import SnapshotRepairer, repair_index
from casfs.maintenance.scrub import PackSelection
from casfs.monitor import Progress, RecordingMonitor
from casfs.repository import opening
from casfs.repository.opening import (
    OpenOptions,
    open_for_maintenance,
    open_for_reading,
    open_for_writing,
)
from casfs.repository.repository import Repository
from casfs.repository.upgrade import upgrade_repository
from casfs.restore.restorer import RestoreOptions, Restorer
from casfs.storage.base import Storage
from casfs.storage.local import LocalStorage
from casfs.storage.locks import LockMode
from casfs.store import pack_builder
from casfs.store import writer as writer_module
from casfs.store.layout import PackLayout
from casfs.store.writer import BlobWriter
from tests.support.loop_devices import SHUTDOWN
from tests.support.observation import look_at_snapshots, look_through_the_mount

KIB = 1 << 10
PACK_BYTES = 64 * KIB
GROUP_BYTES = 48 * KIB
HUNG_S = 120
Step = Callable[[str], None]


class KillingProgress(Progress):
    """Progress of a verb without durable steps: to come to another entry is its step."""

    on_step: Step

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "path" and value:
            self.on_step("entry")


def act_backup(
    root: Path, step: Step, source: str, host: str = "here", **options: Any
) -> dict[str, Any]:
    with open_for_writing(
        root, "backup", OpenOptions(sync=options.pop("sync", True), on_step=step)
    ) as found:
        chosen = BackupOptions((os.fsencode(source),), host=host, **options)
        monitor = RecordingMonitor()
        result = run_backup(found, chosen, monitor)
    assert result.snapshot_id is not None
    return {
        "id": result.snapshot_id.hex(),
        "new_blobs": result.snapshot.stats.new_blobs,
        "new_bytes": result.snapshot.stats.new_plain_bytes,
        "problems": [str(problem.kind) for problem in monitor.problems],
    }


def act_prune(
    root: Path, step: Step, share: float = 0.25, margin_s: float = 0.0, sync: bool = True
) -> dict[str, Any]:
    opened = open_for_maintenance(root, "prune", OpenOptions(sync=sync, on_step=step))
    with opened as repository:
        options = PruneOptions(share, margin_s)
        return dataclasses.asdict(Pruner(repository, options, RecordingMonitor()).prune())


def act_forget(root: Path, step: Step, ids: list[str], sync: bool = True) -> int:
    with open_for_writing(root, "forget", OpenOptions(sync=sync, on_step=step)) as repository:
        found = []
        for name in ids:
            snapshot_id = repository.snapshots.resolve_id(name)
            found.append(Candidate(snapshot_id, repository.snapshots.load(snapshot_id)))
        return forget(repository, found)


def act_tag(root: Path, step: Step, id: str, tags: list[str], sync: bool = True) -> str:
    with open_for_writing(root, "tag", OpenOptions(sync=sync, on_step=step)) as repository:
        snapshot_id, snapshot = repository.snapshots.resolve(id)
        return repository.snapshots.retag(snapshot_id, snapshot, tuple(tags))[0].hex()


def act_upgrade(root: Path, step: Step, sync: bool = True) -> dict[str, int]:
    storage = LocalStorage(root, sync=sync, on_step=step)
    result = upgrade_repository(root, storage)
    return {"old": result.old_format, "new": result.new_format}


def act_repair_index(root: Path, step: Step, sync: bool = True) -> dict[str, int]:
    opened = open_for_maintenance(
        root, "repair index", OpenOptions(sync=sync, on_step=step), mode=LockMode.EXCLUSIVE
    )
    with opened as repository:
        repaired = repair_index(repository, RecordingMonitor())
        return {"packs": repaired.packs, "blobs": repaired.blobs}


def act_repair_snapshots(
    root: Path, step: Step, read_data: bool = True, sync: bool = True
) -> list[dict[str, Any]]:
    monitor = RecordingMonitor()
    opened = open_for_maintenance(root, "repair snapshots", OpenOptions(sync=sync, on_step=step))
    with opened as repository:
        repairer = SnapshotRepairer(repository, monitor)
        result = repairer.repair(PackSelection() if read_data else None)
    reported = [os.fsdecode(problem.path) for problem in monitor.problems]
    return [
        {
            "id": one.snapshot_id.hex(),
            "new_id": one.new_id.hex() if one.new_id is not None else None,
            "reported": reported,
        }
        for one in result.repaired
    ]


def act_restore(
    root: Path, step: Step, target: str, snapshot: str = "latest", **options: Any
) -> dict[str, Any]:
    monitor = RecordingMonitor()
    progress = KillingProgress.__new__(KillingProgress)
    object.__setattr__(progress, "on_step", step)
    Progress.__init__(progress)
    monitor.progress = progress
    with open_for_reading(root, reader="restore") as repository:
        _, found = repository.snapshots.resolve(snapshot)
        restorer = Restorer(repository, RestoreOptions(**options), monitor)
        result = restorer.restore(b"", found.root, os.fsencode(target), False)
    problems = [
        {"kind": str(problem.kind), "path": os.fsdecode(problem.path), "message": problem.message}
        for problem in monitor.problems
    ]
    return dataclasses.asdict(result) | {"problems": problems}


def act_check(
    root: Path, step: Step, read_data: bool = True, share: float = 1.0
) -> list[dict[str, Any]]:
    with open_for_reading(root, reader="check", may_write_index=True) as repository:
        choice = PackSelection(share) if read_data else None
        result = Checker(repository, RecordingMonitor()).check(choice)
    return [
        {
            "kind": kind,
            "what": finding.what,
            "message": finding.message,
            "pack": finding.pack.hex() if finding.pack is not None else None,
            "snapshot": finding.snapshot.hex() if finding.snapshot is not None else None,
            "path": os.fsdecode(finding.path) if finding.path is not None else None,
        }
        for kind, findings in (("damage", result.damage), ("unreadable", result.unreadable))
        for finding in findings
    ]


def act_look(root: Path, step: Step) -> dict[str, dict[str, str]]:
    with open_for_reading(root) as repository:
        return look_at_snapshots(repository)


def act_look_through_the_mount(root: Path, step: Step) -> dict[str, dict[str, str]]:
    with open_for_reading(root) as repository:
        return look_through_the_mount(repository)


def act_look_with_a_key(
    root: Path, step: Step, secret: str, home: str
) -> dict[str, dict[str, dict[str, str]]]:
    """Look at all snapshots of an encrypted repository, by reading it and through the mount."""
    _live_in(home)

    def unlock(storage: Storage, trust: TrustRoot) -> Identities:
        return Identities([age.identity_from_line(secret)])

    with open_for_reading(root, OpenOptions(unlock=unlock)) as repository:
        seen = look_at_snapshots(repository)
        return {"read": seen, "mounted": look_through_the_mount(repository) if seen else {}}


def act_at_home(
    root: Path, step: Step, does: str, home: str, secret: str | None = None, **arguments: Any
) -> Any:
    """Do another act on an encrypted repository as who lives there, with a key or without any."""
    _live_in(home)

    def unlock(storage: Storage, trust: TrustRoot) -> Identities:
        return Identities([age.identity_from_line(secret)] if secret is not None else [])

    _fix_options(unlock=unlock, allow_no_identity=secret is None)
    return ACTS[does](root, step, **arguments)


def act_command(
    root: Path, step: Step, arguments: list[str], home: str, stdin: str = ""
) -> dict[str, Any]:
    """Do what the installed command does, without the time that it takes to start."""
    _live_in(home)
    _report_steps(step)
    os.environ["CASFS_REPOSITORY"] = str(root)
    kept = [os.dup(number) for number in (0, 1, 2)]
    global told_on
    told_on = kept[1]
    with TemporaryFile() as given, TemporaryFile() as out, TemporaryFile() as err:
        given.write(stdin.encode())
        given.seek(0)
        for number, file in enumerate((given, out, err)):
            os.dup2(file.fileno(), number)
        try:
            code = run_command(arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, old in enumerate(kept):
                os.dup2(old, number)
        out.seek(0)
        err.seek(0)
        printed = [stream.read().decode("utf-8", "backslashreplace") for stream in (out, err)]
    return {"exit": code, "out": printed[0], "err": printed[1]}


def _fix_options(**fixed: Any) -> None:
    """Open every repository in this process with these options, whatever the command asks for."""
    make = OpenOptions.__init__

    def made(self: OpenOptions, *rest: Any, **more: Any) -> None:
        make(self, *rest, **{**more, **fixed})

    setattr(OpenOptions, "__init__", made)  # noqa: B010 - mypy refuses to assign to a method
    for name, value in fixed.items():
        object.__setattr__(opening._DEFAULTS, name, value)


def _report_steps(step: Step) -> None:
    """Report the steps of every storage and repository that this process opens."""
    make = LocalStorage.__init__
    _fix_options(on_step=step)

    def made(self: LocalStorage, *rest: Any, **more: Any) -> None:
        make(self, *rest, **{**more, "on_step": step})

    setattr(LocalStorage, "__init__", made)  # noqa: B010 - mypy refuses to assign to a method


def _live_in(home: str) -> None:
    for name in [one for one in os.environ if one.startswith(("XDG_", "CASFS_", "GNUPG"))]:
        del os.environ[name]
    os.environ["HOME"] = home
    os.chdir(home)


def act_trusts(root: Path, step: Step, blobs: list[str]) -> list[bool]:
    """Ask the index alone, as a writer does that has it open."""
    index = Index(root / "index", readonly=True)
    try:
        return index.are_stored([Digest(bytes.fromhex(blob)) for blob in blobs])
    finally:
        index.close()


ACTS: dict[str, Callable[..., Any]] = {
    name.removeprefix("act_"): act
    for name, act in list(globals().items())
    if name.startswith("act_")
}


class Fate:
    """What comes of a process at one of its durable steps, counted from 0."""

    def __init__(self, fate: dict[str, Any]) -> None:
        self._at: int | None = fate.get("at")
        self._what: str = fate.get("what", "kill")
        self._folder: int | None = None
        if "call" in fate:
            self._at = None
        if self._what.startswith("shutdown"):
            self._folder = os.open(fate["disk"], os.O_RDONLY | os.O_DIRECTORY)
        self._lock = threading.Lock()
        self._count = 0

    def __call__(self, step: str) -> None:
        with self._lock:
            count, self._count = self._count, self._count + 1
            say({"step": step})
            if count != self._at:
                return
            if self._folder is not None:
                flags = {"shutdown with flush": 1, "shutdown": 2}[self._what]
                fcntl.ioctl(self._folder, SHUTDOWN, struct.pack("I", flags))
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()


class FailingCall:
    """A system call of this process that fails once, the `at`th time that it touches a folder."""

    def __init__(self, fate: dict[str, Any], root: Path) -> None:
        self._call: str = fate["call"]
        self._code: int = getattr(errno, fate["what"])
        self._left: int = fate["at"]
        self._folder = os.fsencode(root)
        self._real: Callable[..., Any] = getattr(os, self._call)
        self._lock = threading.Lock()
        setattr(os, self._call, self)

    def __call__(self, first: Any, *rest: Any, **more: Any) -> Any:
        if self._is_inside(first, more.get("dir_fd", more.get("src_dir_fd"))):
            with self._lock:
                left, self._left = self._left, self._left - 1
            if left == 0:
                say({"step": f"{self._call} failed"})
                raise OSError(self._code, os.strerror(self._code))
        return self._real(first, *rest, **more)

    def _is_inside(self, place: Any, folder: int | None) -> bool:
        try:
            if isinstance(place, int):
                place = os.readlink(f"/proc/self/fd/{place}")
            elif folder is not None:
                above = os.fsencode(os.readlink(f"/proc/self/fd/{folder}"))
                place = os.path.join(above, os.fsencode(place))
        except OSError:
            return False
        return os.fsencode(place).startswith(self._folder + b"/")


told_on = 1
"""The descriptor to which this process reports what it does."""


def say(message: dict[str, Any]) -> None:
    os.write(told_on, json.dumps(message).encode() + b"\n")


def be_hurt_by(job: dict[str, Any]) -> None:
    """Do a job in this process and end; everything is reported on stdout."""
    signal.alarm(HUNG_S)
    # LMDB's map is shared and not counted; what a hostile length might allocate is.
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
    root = Path(job["root"])
    if "call" in job["fate"]:
        FailingCall(job["fate"], root)
    try:
        result = ACTS[job["verb"]](root, Fate(job["fate"]), **job["arguments"])
    except CasfsError as error:
        say(
            {
                "error": str(error),
                "exit": error.exit_code,
                "is_integrity": isinstance(error, IntegrityError),
            }
        )
    except OSError as error:
        # The command line has a sentence for these too.
        say({"error": str(error), "exit": 1, "is_integrity": False, "os_error": error.errno})
    except BaseException:
        say({"bug": traceback.format_exc()})
    else:
        # A long result is more than a pipe takes at once, and no other process writes now.
        with open(1, "w", closefd=False) as out:
            out.write(json.dumps({"result": result}) + "\n")


def small_packs() -> None:
    """Make this process write packs of a few files, so that one backup has many of them.

    Even their blobs come into the index by more commits than one.
    """

    def writer(
        self: Repository, dry_run: bool = False, spool_in_memory: bool = False
    ) -> BlobWriter:
        session = self.key_manager.session if self.key_manager is not None else None
        is_new = self.config.separates_metadata
        layout = PackLayout(is_new, GROUP_BYTES if is_new else 0)
        return BlobWriter(self.store, dry_run, spool_in_memory, PACK_BYTES, session, layout)

    setattr(Repository, "writer", writer)  # noqa: B010 - mypy refuses to assign to a method
    pack_builder._BUFFER_BYTES = 4 * KIB
    writer_module._BATCH_BYTES = 32 * KIB
    index_module._CHANGED_AT_ONCE = 4
    index_module._BLOBS_PER_PAGE = 1


def cheap_passphrases() -> None:
    """Make this process wrap to passphrases with little work, which test passphrases do not need."""
    passphrase_module._MEMORY_KIB = 64
    passphrase_module._LEAST_MEMORY_KIB = 64
    passphrase_module._ITERATIONS = 1


def main() -> None:
    logging.getLogger("casfs").addHandler(logging.NullHandler())
    logging.getLogger("casfs_mount").addHandler(logging.NullHandler())
    small_packs()
    cheap_passphrases()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            be_hurt_by(json.loads(line))
            os._exit(0)
        _, status, usage = os.wait4(child, 0)
        say({"ended": os.waitstatus_to_exitcode(status), "peak_kib": usage.ru_maxrss})


if __name__ == "__main__":
    main()
