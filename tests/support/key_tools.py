"""Keys of every kind, made by the tools that people make them with, and a terminal to be asked at."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import shutil
import subprocess
import tempfile
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.cli import Argument, Casfs, Result, program

SSH_PASSPHRASE = "open sesame"
PASSPHRASE = "gehe\u0301im: 12 $wörds"
HUNG_S = 60


@dataclass(frozen=True, slots=True)
class Keys:
    """Files with identities, their recipients, and a GPG home; `stranger` opens nothing."""

    age: Path
    age_public: str
    stranger: Path
    stranger_public: str
    ssh: Path
    ssh_public: str
    locked_ssh: Path
    locked_ssh_public: str
    gpg_home: Path
    gpg: str
    passphrase: Path

    def secrets(self) -> list[bytes]:
        """Return the secrets that must appear nowhere: age identity, SSH keys, passphrases."""
        ssh = b"".join(self.ssh.read_bytes().splitlines()[2:-1])
        return [
            _secret_of(self.age).encode(),
            ssh[20:60],
            SSH_PASSPHRASE.encode(),
            PASSPHRASE.encode(),
        ]


@contextmanager
def made_keys() -> Iterator[Keys]:
    """Make keys; their folder has a short name, since GPG's agent listens on a socket in it."""
    folder = Path(tempfile.mkdtemp(prefix="ck"))
    try:
        (folder / "passphrase").write_text(PASSPHRASE + "\n")
        yield Keys(
            *_age(folder / "age"),
            *_age(folder / "stranger"),
            *_ssh(folder / "ssh", ""),
            *_ssh(folder / "locked", SSH_PASSPHRASE),
            *_gpg(folder / "gpg"),
            folder / "passphrase",
        )
    finally:
        subprocess.run(
            ["gpgconf", "--kill", "all"], env=gpg_environment(folder / "gpg"), check=False
        )
        shutil.rmtree(folder, ignore_errors=True)


def gpg_environment(home: Path) -> dict[str, str]:
    return dict(os.environ) | {"GNUPGHOME": str(home)}


def _age(file: Path) -> tuple[Path, str]:
    subprocess.run(["age-keygen", "-o", file], check=True, capture_output=True)
    made = subprocess.run(["age-keygen", "-y", file], check=True, capture_output=True, text=True)
    return file, made.stdout.strip()


def _secret_of(file: Path) -> str:
    return file.read_text().splitlines()[-1]


def _ssh(file: Path, passphrase: str) -> tuple[Path, str]:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-C", "me@here", "-f", file],
        check=True,
    )
    return file, file.with_suffix(".pub").read_text()


def _gpg(home: Path) -> tuple[Path, str]:
    home.mkdir(mode=0o700)
    quiet = ["gpg", "--quiet", "--batch"]
    subprocess.run(
        [*quiet, "--passphrase", "", "--quick-gen-key", "Ann <ann@example.org>", "ed25519"],
        env=gpg_environment(home),
        check=True,
        capture_output=True,
    )
    listed = subprocess.run(
        [*quiet, "--with-colons", "--list-keys"],
        env=gpg_environment(home),
        check=True,
        capture_output=True,
        text=True,
    )
    fingerprint = re.search(r"^fpr:(?:[^:]*:){8}([0-9A-F]+):", listed.stdout, re.MULTILINE)
    assert fingerprint is not None
    subprocess.run(
        [*quiet, "--passphrase", "", "--quick-add-key", fingerprint[1], "cv25519"],
        env=gpg_environment(home),
        check=True,
        capture_output=True,
    )
    return home, fingerprint[1]


def at_a_terminal(
    casfs: Casfs, *arguments: Argument, answers: Sequence[str], expect: int = 0
) -> Result:
    """Run a command at a terminal of its own and answer each question for a passphrase.

    Its output is in `err`: a terminal has one stream.
    """
    master, slave = pty.openpty()
    argv = tuple(os.fsencode(part) for part in (*program(), *arguments))
    process = subprocess.Popen(
        argv,
        stdin=slave,
        stdout=subprocess.DEVNULL,
        stderr=slave,
        env=casfs.environment(),
        cwd=casfs.home,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(slave)
    shown, left = b"", list(answers)
    asked = 0
    try:
        while _is_readable(master):
            try:
                more = os.read(master, 65536)
            except OSError:  # the other end is closed
                break
            shown += more
            if shown.count(b"passphrase of") > asked and shown.endswith(b": "):
                asked += 1
                assert left, shown
                os.write(master, left.pop(0).encode() + b"\n")
        process.wait(HUNG_S)
    finally:
        process.kill()
        process.wait()
        os.close(master)
    result = Result(argv, process.returncode, b"", shown)
    assert b"Traceback" not in shown, result
    assert result.exit == expect, f"expected exit {expect}\n{result}"
    assert not left, f"{len(left)} answers were not asked for\n{result}"
    return result


def _is_readable(master: int) -> bool:
    readable, _, _ = select.select([master], [], [], HUNG_S)
    assert readable, "the command neither says anything nor ends"
    return True
