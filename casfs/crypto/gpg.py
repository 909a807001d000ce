"""GnuPG: wrapping to OpenPGP keys and unwrapping with those of the user, by the command `gpg`.

What is encrypted needs no keyring: the public key was kept with the repository. What is decrypted is a
matter of the user's own keyring and agent. Nothing secret stands on a command line.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from casfs.errors import KeyMissingError, WrongKeyError

_QUIET = ("gpg", "--quiet", "--no-tty", "--batch")
_FINGERPRINT = re.compile(r"^fpr:(?:[^:]*:){8}([0-9A-F]{40,64}):", re.MULTILINE)
_KEY_ID = re.compile(r"(0x)?[0-9A-Fa-f]{8,64}|[^\s@]+@[^\s@]+")
_LONGEST_S = 300


def looks_like_key(text: str) -> bool:
    """Tell whether a text may name a key: hexadecimal digits or an address."""
    return _KEY_ID.fullmatch(text) is not None


def public_key(name: str) -> tuple[str, bytes]:
    """Return fingerprint and exported key of the one key in the user's keyring that `name` means.

    Raises WrongKeyError where there is none, where there are several, or where it cannot encrypt.
    """
    if not looks_like_key(name):
        raise WrongKeyError(f"{name!r} is no GPG key id, fingerprint or address")
    listed = _run([*_QUIET, "--with-colons", "--list-keys", "--", name])
    if listed.returncode:
        raise WrongKeyError(f"gpg has no public key {name}: {_said(listed)}")
    primaries = re.findall(r"^pub:.*\n(?:.*\n)*?fpr:(?:[^:]*:){8}([0-9A-F]+):", _text(listed), re.M)
    if len(primaries) != 1:
        raise WrongKeyError(f"gpg has {len(primaries)} keys that {name} fits; give a fingerprint")
    fingerprint = primaries[0]
    exported = _run([*_QUIET, "--export-options", "export-minimal", "--export", fingerprint])
    if exported.returncode or not exported.stdout:
        raise WrongKeyError(f"gpg does not export the key {name}: {_said(exported)}")
    wrap(b"", [exported.stdout])
    return fingerprint, exported.stdout


def wrap(data: bytes, keys: Sequence[bytes]) -> bytes:
    """Return an OpenPGP message that the owner of each of the exported public keys opens.

    Raises WrongKeyError where a key has expired or cannot encrypt.
    """
    with tempfile.TemporaryDirectory(prefix="casfs-gpg-") as home:
        command = [*_QUIET, "--no-options", "--homedir", home, "--trust-model", "always"]
        for number, key in enumerate(keys):
            file = Path(home) / f"{number}.key"
            file.write_bytes(key)
            command += ["--recipient-file", str(file)]
        done = _run([*command, "--output", "-", "--encrypt"], data)
    if done.returncode:
        raise WrongKeyError(f"gpg cannot encrypt to a recipient's key: {_said(done)}")
    return done.stdout


def unwrap(data: bytes) -> bytes:
    """Return what is in an OpenPGP message; raises KeyMissingError where the user cannot open it.

    The agent may ask for a passphrase in its own way.
    """
    environment = dict(os.environ)
    if sys.stdin is not None and sys.stdin.isatty():
        environment.setdefault("GPG_TTY", os.ttyname(sys.stdin.fileno()))
    done = _run(["gpg", "--quiet", "--no-tty", "--decrypt"], data, environment)
    if done.returncode:
        raise KeyMissingError(f"gpg does not open it: {_said(done)}")
    return done.stdout


def has_secret_key(fingerprint: str) -> bool:
    """Tell whether the user's keyring has the secret part of a key, or knows the card that has."""
    try:
        listed = _run([*_QUIET, "--with-colons", "--list-secret-keys", "--", fingerprint])
    except WrongKeyError:
        return False
    return listed.returncode == 0 and fingerprint in _FINGERPRINT.findall(_text(listed))


def _run(
    command: list[str], data: bytes = b"", environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            command,
            input=data,
            capture_output=True,
            env=environment,
            timeout=_LONGEST_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise WrongKeyError("the command gpg is not installed, and a GPG key needs it") from error
    except subprocess.TimeoutExpired as error:
        raise WrongKeyError(f"gpg did not answer within {_LONGEST_S} seconds") from error


def _text(done: subprocess.CompletedProcess[bytes]) -> str:
    return done.stdout.decode("utf-8", "backslashreplace")


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = done.stderr.decode("utf-8", "backslashreplace").strip().splitlines()
    return lines[-1].removeprefix("gpg: ") if lines else f"it ended with {done.returncode}"
