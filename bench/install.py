"""Install the peers: restic from the distribution, borg into its own environment.

Borg is compiled on this machine from its package's source, so that its extension modules are
built as the distribution's compiler builds them; that needs a few development packages. As root
what is missing is installed; otherwise the command is printed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench.peers import borg

PACKAGES = (
    "restic",
    "zstd",
    "fuse3",
    "gcc",
    "pkg-config",
    "libacl1-dev",
    "libfuse3-dev",
    "liblz4-dev",
    "libssl-dev",
    "libxxhash-dev",
    "libzstd-dev",
)
APT_OPTIONS = ("--yes", "--quiet", "--option", "DPkg::Lock::Timeout=300")
REQUIREMENT = f"borgbackup[pyfuse3]=={borg.SERIES}.*"


def install_peers(peers: Path) -> int:
    """Install missing peers, print each step, and return an exit code."""
    missing = _missing_packages()
    if missing and not _install_packages(missing):
        return 1
    program = peers / "bin" / "borg"
    if not program.is_file():
        print(f"Installing borg {borg.SERIES} into {peers} (it is compiled, about a minute)")
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(peers)],
            [str(peers / "bin" / "pip"), "install", "--quiet", REQUIREMENT],
        ):
            if subprocess.run(command, check=False).returncode != 0:
                print(f"`{' '.join(command)}` failed; borg stays missing.", file=sys.stderr)
                return 1
    for command in ([str(program), "--version"], ["restic", "version"]):
        subprocess.run(command, check=False)
    return 0


def _missing_packages() -> tuple[str, ...]:
    if shutil.which("dpkg-query") is None:
        return PACKAGES
    query = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\\n", *PACKAGES],
        capture_output=True,
        text=True,
        check=False,
    )
    installed = {f"{name} installed" for name in PACKAGES} & set(query.stdout.splitlines())
    return tuple(name for name in PACKAGES if f"{name} installed" not in installed)


def _install_packages(missing: tuple[str, ...]) -> bool:
    if shutil.which("apt-get") is None:
        names = " ".join(missing)
        print(f"Missing: what Debian has in the packages {names}.", file=sys.stderr)
        return False
    install = ["apt-get", *APT_OPTIONS, "install", "--no-install-recommends", *missing]
    if os.geteuid() != 0:
        shown = " ".join(install)
        print(f"System packages are missing. Install them with:\n  sudo {shown}", file=sys.stderr)
        return False
    print(f"Installing system packages: {' '.join(missing)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # Old lists may still do where the archive cannot be reached.
    subprocess.run(["apt-get", *APT_OPTIONS, "update"], env=environment, check=False)
    return subprocess.run(install, env=environment, check=False).returncode == 0
