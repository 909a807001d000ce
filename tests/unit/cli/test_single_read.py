"""What decides trust is read once: every command, on a storage that answers a second read with a lie."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import click
import msgspec
import pytest
from click.testing import CliRunner

from casfs.cli.app import VERBS, casfs
from casfs.cli.settings import Settings
from casfs.crypto import passphrase as passphrase_module
from casfs.crypto.keyring import Keyring
from casfs.crypto.recipients import RECIPIENTS_NAME, RecipientList, read_recipients
from casfs.crypto.session_files import session_ids
from casfs.crypto.trust_state import load_state
from casfs.errors import KeyMissingError, TrustError, UsageError
from casfs.format.config import CONFIG_NAME, ChunkerConfig, RepositoryConfig, encode_config
from casfs.repository.creation import create_repository
from casfs.repository.opening import OpenOptions, open_for_reading
from casfs.repository.place import LocalPlace, read_config
from casfs.storage.local import LocalStorage
from tests.support.encryption import (
    OTHER,
    OTHER_SECRET,
    PUBLIC,
    RECIPIENT,
    SECRET,
    identities,
)

COMMANDS: dict[str, tuple[str, ...]] = {
    "backup": ("{source}",),
    "backup (with recipients)": ("{source}", "--recipients-file", "{recipients}"),
    "snapshots": (),
    "ls": ("latest",),
    "find": ("*",),
    "changed": ("latest",),
    "diff": ("latest", "latest"),
    "log": ("latest:{source}/file",),
    "dump": ("latest:{source}/file",),
    "mount": ("--foreground", "latest", "{target}"),
    "restore": ("latest", "--target", "{target}"),
    "check": ("--read-data",),
    "check --storage": (),
    "forget": ("--keep-last", "1"),
    "forget --prune": ("--keep-last", "1"),
    "prune": (),
    "repair index": (),
    "repair snapshots": (),
    "stats": (),
    "tag": ("latest", "--add", "more"),
    "mirror": ("{target}",),
    "copy": ("latest", "--to", "{other}"),
    "rewrite": ("latest", "--exclude", "/{source}/file"),
    "recompress": ("--compression", "1"),
    "key list": (),
    "upgrade": (),
    "locks": (),
    "key add": ("--recipient", "{more}"),
    "key remove": ("{public}",),
    "key rewrap": (),
    "key passwd": ("--passphrase-file", "{old}", "--new-passphrase-file", "{new}"),
    "key accept": (),
}
"""Every command that opens a repository, with its arguments."""

NEEDS_NO_KEY = {"key list", "key remove", "locks", "upgrade"}

OPENS_NOTHING = {"init", "umount", "run", "config", "schedule", "help", "version", "completion"}
"""Commands that create a repository, start other processes, or work without one."""

ONLY_IN_A_BUCKET = {"lock-policy"}

MORE_PUBLIC = "age169cv388tenh49q7hfg5g8jqnrzpr8vftc3k6fzvg6u7hpycnedfsv6jn66"


class LyingStorage(LocalStorage):
    """A storage whose second answer for what decides trust is the attacker's."""

    reads: ClassVar[Counter[tuple[str, str]]] = Counter()

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        true = super().read(name, offset, size)
        self.reads[self.url, name] += 1
        if self.reads[self.url, name] < 2:
            return true
        if name == CONFIG_NAME:
            return encode_config(RepositoryConfig("f" * 64, "today"))
        return RecipientList.of([RECIPIENT, OTHER]).data if name == RECIPIENTS_NAME else true


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little work for a passphrase."""
    monkeypatch.setattr(passphrase_module, "_MEMORY_KIB", 64)
    monkeypatch.setattr(passphrase_module, "_LEAST_MEMORY_KIB", 64)
    monkeypatch.setattr(passphrase_module, "_ITERATIONS", 1)


@pytest.fixture
def words(tmp_path: Path, own_home: Path) -> dict[str, str]:
    """A repository with a snapshot, and the words that the arguments of commands stand for."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_bytes(b"content")
    (tmp_path / "target").mkdir()
    create_repository(tmp_path / "repository", [RECIPIENT], "old")
    create_repository(tmp_path / "other")
    for name, text in (("old", "old"), ("new", "new"), ("identity", SECRET)):
        (tmp_path / name).write_text(text + "\n")
    found = {name: str(tmp_path / name) for name in os.listdir(tmp_path)}
    run(found, "backup", "{source}")
    storage = LocalStorage(tmp_path / "repository")
    lines = [one.line for one in read_recipients(storage).recipients]
    (tmp_path / "recipients").write_text("\n".join(lines) + "\n")
    found |= {"recipients": str(tmp_path / "recipients"), "public": PUBLIC, "more": MORE_PUBLIC}
    return found


def run(words: dict[str, str], command: str, *arguments: str) -> None:
    """Run a command in this process; it succeeds."""
    is_without = command.startswith("key passwd") or command in NEEDS_NO_KEY
    keys = [] if is_without else ["--identity", words["identity"]]
    values = [argument.format(**words) for argument in arguments]
    result = CliRunner().invoke(
        casfs,
        [
            *command.partition(" (")[0].split(),
            "--repo",
            words["repository"],
            "--no-sync",
            *keys,
            *values,
        ],
        obj=Settings(),
        standalone_mode=False,
    )
    if result.exception is not None:
        raise result.exception
    assert not result.return_value, result.output


def lying(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """Put the hostile storage in the place of every folder; return what is read of it."""
    reads: Counter[tuple[str, str]] = Counter()
    monkeypatch.setattr(LyingStorage, "reads", reads)

    def open_storage(
        place: LocalPlace, sync: bool = True, on_step: Callable[[str], None] | None = None
    ) -> LocalStorage:
        return LyingStorage(place.root, sync=sync, on_step=on_step)

    monkeypatch.setattr(LocalPlace, "open_storage", open_storage)
    return reads


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_reads_what_decides_trust_once_and_uses_what_it_verified(
    words: dict[str, str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "mount":
        server = pytest.importorskip("casfs_mount.server")

        def mount_here(request: Any, report: object) -> None:
            options = OpenOptions(unlock=lambda storage, trust: request.identities)
            open_for_reading(request.repository, options, reader="mount").close()

        monkeypatch.setattr(server, "mount_here", mount_here)
    root = Path(words["repository"])
    config = read_config(root)
    with monkeypatch.context() as patch:
        reads = lying(patch)
        run(words, command, *COMMANDS[command])
    storage = LocalStorage(root)
    assert reads[storage.url, CONFIG_NAME] == 1
    assert {
        count for (_, name), count in reads.items() if name in (CONFIG_NAME, RECIPIENTS_NAME)
    } == {1}
    state = load_state(config)
    assert state is not None and state.recipients == read_recipients(storage).digest
    attacker = Keyring(storage, config, identities(OTHER_SECRET))
    assert session_ids(storage)
    for session_id in session_ids(storage):
        with pytest.raises(KeyMissingError):
            attacker.session(session_id)


def test_every_command_that_opens_a_repository_is_tried_on_the_lying_storage() -> None:
    context = click.Context(casfs)
    names = set()
    for verb in VERBS:
        command = casfs.get_command(context, verb)
        if isinstance(command, click.Group):
            names |= {f"{verb} {one}" for one in command.list_commands(context)}
        else:
            names.add(verb)
    tried = {name.partition(" (")[0].partition(" --")[0] for name in COMMANDS}
    left_out = OPENS_NOTHING | ONLY_IN_A_BUCKET
    assert tried == {name for name in names if name.partition(" ")[0] not in left_out}


class TestExpectedRepository:
    """The option that names the repository, for the first use of a location."""

    def test_a_command_refuses_another_repository_than_the_expected_one(
        self, words: dict[str, str]
    ) -> None:
        trust = LocalPlace(Path(words["repository"])).trust_root(
            LocalStorage(Path(words["repository"]))
        )
        for digest in (trust.config.id, trust.config_digest, trust.config_digest.upper()):
            run(words, "snapshots", "--expect-repository", digest)
        for command in ("snapshots", "check --storage", "key accept"):
            with pytest.raises(TrustError, match="not the expected"):
                run(words, command, "--expect-repository", "0" * 64)
        with pytest.raises(UsageError, match="64 hexadecimal digits"):
            run(words, "snapshots", "--expect-repository", trust.config.id[:12])

    def test_the_environment_names_the_expected_repository(
        self, words: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CASFS_EXPECT_REPOSITORY", "0" * 64)
        with pytest.raises(TrustError, match="not the expected"):
            run(words, "snapshots")

    def test_a_copied_id_does_not_pass_for_the_expected_configuration(
        self, words: dict[str, str]
    ) -> None:
        root = Path(words["repository"])
        trust = LocalPlace(root).trust_root(LocalStorage(root))
        forged = msgspec.structs.replace(trust.config, encryption=None, chunker=ChunkerConfig())
        (root / "config").write_bytes(encode_config(forged))
        with pytest.raises(TrustError, match="not the expected"):
            run(words, "check --storage", "--expect-repository", trust.config_digest)
