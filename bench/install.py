"""Install the peers: restic of Debian unstable, borg in its own environment.

The restic of a stable distribution is years old; the newest one that Debian has is a program in one
file, which runs here as well. Where it cannot be had, the distribution's is used.

Borg is compiled on this machine from its package's source, so that its extension modules are
built as the distribution's compiler builds them; that needs a few development packages. As root
what is missing is installed; otherwise the command is printed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.peers import borg, restic
from bench.peers.restic import NAME

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
    newest = restic.newest_program(peers)
    if not newest.is_file() and not _unpack_newest_restic(newest):
        print("The newest restic could not be fetched; the distribution's is used.")
    for command in ([str(program), "--version"], [restic.find_program(peers) or NAME, "version"]):
        subprocess.run(command, check=False)
    return 0


def _unpack_newest_restic(program: Path) -> bool:
    """Unpack restic from Debian unstable as `program` if it runs on this machine.

    The lists and the package stay apart from the machine's own, so that nothing else is upgraded.
    """
    keyring, sites = Path("/usr/share/keyrings/debian-archive-keyring.gpg"), _archive_sites()
    if not (keyring.is_file() and sites and shutil.which("dpkg-deb")):
        return False
    print("Fetching the newest restic from Debian unstable")
    with tempfile.TemporaryDirectory(prefix="casfs-bench-apt-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        for part in ("state/lists/partial", "cache/archives/partial"):
            (folder / part).mkdir(parents=True)
        source = folder / "unstable.list"
        source.write_text(f"deb [signed-by={keyring}] {sites[0]} unstable main\n")
        places = {
            "Dir::Etc::SourceList": source,
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::State": folder / "state",
            "Dir::Cache": folder / "cache",
            "APT::Sandbox::User": "root",
        }
        apt = ["apt-get", "--quiet", *(f"--option={key}={value}" for key, value in places.items())]
        for command in ([*apt, "update"], [*apt, "download", NAME]):
            if subprocess.run(command, cwd=folder, check=False).returncode != 0:
                return False
        (package,) = folder.glob(f"{NAME}_*.deb")
        unpack = ["dpkg-deb", "--extract", str(package), str(folder / "root")]
        unpacked = folder / "root/usr/bin" / NAME
        for command in (unpack, [str(unpacked), "version"]):
            if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode != 0:
                return False
        program.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(unpacked, program)
    return True


def _archive_sites() -> list[str]:
    """Return the addresses of the distribution's archive, where this is Debian."""
    done = subprocess.run(
        [
            "apt-get",
            "indextargets",
            "--format",
            "$(SITE)",
            "Created-By: Packages",
            "Origin: Debian",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return [site for site in done.stdout.split() if "security" not in site]


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
