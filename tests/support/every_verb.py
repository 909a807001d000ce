"""One run of every command with --json, on repositories that make each print all that it can."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.support.cli import Casfs, finish, interrupt
from tests.support.encryption import OTHER_PUBLIC, PUBLIC
from tests.support.stored_objects import StoredObjects

Line = dict[str, Any]


def lines_of_every_verb(casfs: Casfs, folder: Path) -> Iterator[tuple[str, Line]]:
    """Yield each JSON line that the commands print, with the command that printed it.

    `casfs` has no repository yet; `folder` is empty.
    """

    def run(
        verb: str,
        *arguments: str | Path,
        expect: int = 0,
        on: Casfs = casfs,
        env: Mapping[str, str] | None = None,
    ) -> list[Line]:
        result = on.run(*verb.split(), "--json", *arguments, expect=expect, cwd=folder, env=env)
        found.extend((verb, line) for line in result.objects)
        return result.objects

    found: list[tuple[str, Line]] = []
    source = _write_source(folder)
    run("init")
    run("backup", "-v", "source")
    first = _only_snapshot(run("snapshots"))
    os.utime(source / "letter", (1, 1))
    (source / "grown").write_bytes(os.urandom(300_000))
    (source / "odd").rmdir()
    (source / b"caf\xe9".decode("utf-8", "surrogateescape")).touch()
    run("backup", "source", "missing", "--tag", "a,b", expect=3)
    run("backup", "--dry-run", "source")
    run("backup", "--progress", "json", "--stdin-from-command", "--", "sleep", "2")
    run("backup", "source", "--tag", "a,b")
    for verb, arguments in (
        ("snapshots", ()),
        ("ls", ("latest",)),
        ("find", ("*",)),
        ("diff", (first, "latest")),
        ("log", ("latest:source/letter",)),
        ("log", ("latest:source",)),
        ("changed", ("latest",)),
        ("dump", ("latest:source/letter", "--output", "dumped")),
        ("stats", ()),
        ("stats", ("latest",)),
        ("stats", ("--storage",)),
        ("tag", ("latest", "--add", "c")),
        ("upgrade", ()),
        ("locks", ()),
        ("repair index", ()),
        ("repair snapshots", ("--dry-run",)),
        ("version", ()),
        ("help", ("ls",)),
        ("completion", ("bash",)),
        ("mirror", ("mirrored",)),
    ):
        run(verb, *arguments)
    run("restore", "latest", "-v", "--target", "target")
    (folder / "target" / "source" / "new").touch()
    run(
        "restore",
        "latest",
        "--target",
        "target",
        "--delete",
        "--include",
        "source",
        "--include",
        "zz",
    )
    _mount(run, folder)
    run("init", on=casfs.at(folder / "copied"))
    run("copy", "latest", "--to", folder / "copied")
    run("rewrite", "latest", "--exclude", "link")
    run("recompress", "--compression", "9", on=casfs.at(folder / "copied"))
    _run_a_profile(run, casfs, folder)
    process = casfs.start("backup", "--stdin-from-command", "--", "sleep", "1000")
    try:
        while not run("locks"):
            assert process.poll() is None
    finally:
        interrupt(process)
        finish(process)
    run("forget", "--keep-last", "1", "--prune")
    run("forget", "latest", "--dry-run", "--unsafe-allow-remove-all")
    run("prune", "--dry-run")
    run("check", "--read-data")
    run("check", "--storage")
    run("ls", "nonsense", expect=1)
    _damage(casfs)
    run("check", "--read-data", expect=5)
    run("check", "--storage", expect=5)
    run("repair snapshots", "--read-data")
    encrypted = casfs.at(folder / "encrypted")
    passphrase, other = folder / "passphrase", folder / "other"
    passphrase.write_text("one\n")
    other.write_text("two\n")
    key = ("--passphrase-file", passphrase)
    run("init", "--recipient", PUBLIC, *key, on=encrypted)
    run("key list", on=encrypted)
    run("key add", OTHER_PUBLIC, *key, on=encrypted)
    run("key remove", OTHER_PUBLIC, on=encrypted)
    run("key list", on=encrypted)
    run("backup", "source", on=encrypted)
    run("snapshots", on=encrypted)
    run("key rewrap", *key, on=encrypted)
    run("key accept", *key, on=encrypted)
    run("key list", on=encrypted)
    run("key passwd", *key, "--new-passphrase-file", other, on=encrypted)
    yield from found


def _run_a_profile(run: Any, casfs: Casfs, folder: Path) -> None:
    """Run a profile, and schedule it in a crontab that a program of the test keeps."""
    config = casfs.home / ".config" / "casfs" / "config.toml"
    config.parent.mkdir(parents=True)
    run("init", on=casfs.at(folder / "nas"))
    config.write_text(
        f'[repositories.nas]\nurl = "{folder}/nas"\n[repositories.usb]\nurl = "{folder}/usb"\n'
        f'[profiles.home]\nrepository = "nas"\nsources = ["{folder}/source", "/no/source"]\n'
        'schedule = "daily"\nmirror-to = ["usb"]\nkeep = { last = 1 }\nhooks = { before = "true" }\n'
    )
    config.chmod(0o600)
    run("config show")
    run("run", "--dry-run", "home", on=casfs.at(None))
    run("run", "home", on=casfs.at(None), expect=3)
    (lock,) = (casfs.home / ".local" / "state" / "casfs" / "profiles").glob("*.lock")
    with open(lock, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        run("run", "--scheduled", "home", on=casfs.at(None), expect=75)
    crontab = folder / "bin" / "crontab"
    crontab.parent.mkdir()
    crontab.write_text(
        f'#!/bin/sh\nif [ "$1" = -l ]; then cat {folder}/table; else cat > {folder}/table; fi\n'
    )
    crontab.chmod(0o755)
    (folder / "table").touch()
    env = {"PATH": f"{crontab.parent}:{os.environ['PATH']}"}
    run("schedule install", "home", "--scheduler", "cron", "--print", env=env)
    for verb in ("install", "status", "remove"):
        run(f"schedule {verb}", "home", "--scheduler", "cron", env=env)


def _write_source(folder: Path) -> Path:
    source = folder / "source"
    source.mkdir()
    (source / "letter").write_text("Dear Anna")
    (source / "odd").mkdir()
    (source / "link").symlink_to("letter")
    os.setxattr(source / "letter", "user.note", b"1")
    os.mkfifo(source / "pipe")
    return source


def _only_snapshot(lines: list[Line]) -> str:
    assert len(lines) == 1
    return str(lines[0]["id"])


def _mount(run: Any, folder: Path) -> None:
    mountpoint = folder / "mountpoint"
    mountpoint.mkdir()
    run("mount", "latest", mountpoint)
    with contextlib.ExitStack() as stack:
        stack.callback(run, "umount", mountpoint)


def _damage(casfs: Casfs) -> None:
    """Change a byte of the largest pack, in the data of a file."""
    objects = StoredObjects(casfs)
    pack = objects.largest_pack()
    objects.flip(pack.name, pack.size // 3)
