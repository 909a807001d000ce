"""GnuPG: encryption to OpenPGP keys and decryption with the user's keys, through the command `gpg`.

Encryption uses the exported public keys in the repository and no keyring. Decryption uses the user's keyring
and agent. No secret is passed on a command line.
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

MAX_PLAIN_BYTES = 8 * 1024 * 1024
"""The most plaintext of a message: a session with all domains has 4 MiB."""

MAX_MESSAGE_BYTES = 16 * 1024 * 1024


def looks_like_key(text: str) -> bool:
    """Return whether a text may identify a key: hexadecimal digits or an address."""
    return _KEY_ID.fullmatch(text) is not None


def public_key(name: str) -> tuple[str, bytes]:
    """Return the fingerprint and the exported key of the only key in the user's keyring that matches `name`.

    Raise WrongKeyError where no key or several keys match, or where the key cannot encrypt.
    """
    if not looks_like_key(name):
        raise WrongKeyError(f"{name!r} is not a GPG key id, fingerprint or address")
    listed = _run([*_QUIET, "--with-colons", "--list-keys", "--", name])
    if listed.returncode:
        raise WrongKeyError(f"gpg has no public key {name}: {_last_message(listed)}")
    primaries = re.findall(r"^pub:.*\n(?:.*\n)*?fpr:(?:[^:]*:){8}([0-9A-F]+):", _text(listed), re.M)
    if len(primaries) != 1:
        raise WrongKeyError(f"{len(primaries)} gpg keys match {name}; give a fingerprint")
    fingerprint = primaries[0]
    exported = _run([*_QUIET, "--export-options", "export-minimal", "--export", fingerprint])
    if exported.returncode or not exported.stdout:
        raise WrongKeyError(f"gpg cannot export the key {name}: {_last_message(exported)}")
    wrap(b"", [exported.stdout])
    return fingerprint, exported.stdout


def wrap(data: bytes, keys: Sequence[bytes]) -> bytes:
    """Return an OpenPGP message that the owner of each of the exported public keys can decrypt.

    Raise WrongKeyError where a key has expired or cannot encrypt.
    """
    with tempfile.TemporaryDirectory(prefix="casfs-gpg-") as home:
        command = [*_QUIET, "--no-options", "--homedir", home, "--trust-model", "always"]
        for number, key in enumerate(keys):
            file = Path(home) / f"{number}.key"
            file.write_bytes(key)
            command += ["--recipient-file", str(file)]
        done = _run([*command, "--output", "-", "--encrypt"], data)
    if done.returncode:
        raise WrongKeyError(f"gpg cannot encrypt to a recipient's key: {_last_message(done)}")
    return done.stdout


def unwrap(data: bytes) -> bytes:
    """Return the plaintext of an OpenPGP message, at most `MAX_PLAIN_BYTES`.

    Raise KeyMissingError where the user's keys do not decrypt it, or where it is not encrypted or too large:
    a small hostile message may expand to gigabytes. The agent may ask the user for a passphrase.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise KeyMissingError("the OpenPGP message is too large")
    environment = dict(os.environ)
    if sys.stdin is not None and sys.stdin.isatty():
        environment.setdefault("GPG_TTY", os.ttyname(sys.stdin.fileno()))
    command = ["gpg", "--quiet", "--no-tty", "--status-fd", "2"]
    command += ["--max-output", str(MAX_PLAIN_BYTES), "--decrypt"]
    done = _run(command, data, environment)
    if done.returncode:
        raise KeyMissingError(f"gpg cannot decrypt it: {_last_message(done)}")
    if b"[GNUPG:] DECRYPTION_OKAY" not in done.stderr.splitlines():
        raise KeyMissingError(
            "gpg cannot decrypt it: the message is not encrypted and authenticated"
        )
    return done.stdout


def has_secret_key(fingerprint: str) -> bool:
    """Return whether the user's keyring has the secret part of a key, or knows the card that has it."""
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
        raise WrongKeyError(
            "the command gpg is not installed; install it to use GPG keys"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise WrongKeyError(f"gpg did not answer within {_LONGEST_S} seconds") from error


def _text(done: subprocess.CompletedProcess[bytes]) -> str:
    return done.stdout.decode("utf-8", "backslashreplace")


def _last_message(done: subprocess.CompletedProcess[bytes]) -> str:
    text = done.stderr.decode("utf-8", "backslashreplace").strip()
    lines = [line for line in text.splitlines() if not line.startswith("[GNUPG:] ")]
    return lines[-1].removeprefix("gpg: ") if lines else f"exit code {done.returncode}"
