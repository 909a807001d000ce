"""Make a frozen encrypted repository and its manifest; run once for each format, kept to show how.

    python -m tests.data.make_encrypted tests/data/encrypted-v2 2

What it made is committed and never made again: it is what a version of that day wrote. Beside it lie the
identities that open it, which protect nothing else: an age identity, an SSH key, and a passphrase.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from casfs.backup.run import BackupOptions, run_backup
from casfs.crypto import age
from casfs.crypto.recipients import parse_recipient
from casfs.monitor import RecordingMonitor
from casfs.repository.creation import create_repository
from casfs.repository.opening import OpenOptions, open_for_writing
from tests.data.make_repository import describe, fill, shortened
from tests.support.encryption import identities

WITHOUT_IDENTITY = OpenOptions(allow_no_identity=True)
PASSPHRASE = "wie man in den Wald ruft"


def main(folder: Path, format_: int) -> None:
    """Write the repository and, beside it, the manifest and what opens it."""
    shutil.rmtree(folder, ignore_errors=True)
    secret, public = age.new_identity()
    ssh = folder.with_suffix(".ssh")
    ssh.unlink(missing_ok=True)
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "frozen", "-f", ssh], check=True
    )
    ssh_public = ssh.with_suffix(".ssh.pub")
    folder.with_suffix(".passphrase").write_text(PASSPHRASE + "\n")
    folder.with_suffix(".age").write_text(f"# public key: {public}\n{secret}\n")
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_STATE_HOME"] = os.environ["XDG_CACHE_HOME"] = f"{name}/own"
        recipients = [parse_recipient(public), parse_recipient(ssh_public.read_text())]
        create_repository(folder, recipients, PASSPHRASE, format_)
        ssh_public.unlink()
        source = Path(name) / "source"
        source.mkdir()
        fill(source)
        here = os.getcwd()
        os.chdir(source)
        try:
            for number in (1, 2):
                options = BackupOptions(
                    (b".",), host="frozen", tags=("one",), time_ns=number * 10**18
                )
                with open_for_writing(folder, "backup", WITHOUT_IDENTITY) as repository:
                    run_backup(repository, options, RecordingMonitor())
                (source / "later").write_bytes(b"in the second session\n" * 50)
        finally:
            os.chdir(here)
        manifest = shortened(describe(folder, lambda storage, config: identities(secret)))
    for empty in ("locks", "tmp"):
        (folder / empty / ".keep").touch()
    (folder / "reserve").unlink(missing_ok=True)
    text = json.dumps(manifest, indent=0, separators=(",", ":"))
    folder.with_suffix(".json").write_text(text + "\n", encoding="ascii")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]))
