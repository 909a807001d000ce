"""Where a repository's index lives: inside it on a local disk, in the user's cache directory otherwise.

LMDB maps its file and locks it through shared memory, which a network file system breaks. The index of an
encrypted repository tells what no storage is to see, so it never lies there.
"""

from __future__ import annotations

import os
from pathlib import Path

_NETWORK_TYPES = frozenset(
    ["nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "afs", "lustre", "beegfs"]
)
"""File system types of Linux on which two machines, or a server, may change a file under a mapping."""


def index_dir(root: Path, repository_id: str, encrypted: bool = False) -> Path:
    """Return the folder of the index of the repository in `root`."""
    if encrypted:
        return cached_index_dir(repository_id)
    kind = file_system_type(root)
    if kind in _NETWORK_TYPES or kind.startswith("fuse"):
        return cached_index_dir(repository_id)
    return root / "index"


def cached_index_dir(repository_id: str) -> Path:
    """Return the folder of this user's own index of a repository; its parent is made."""
    parent = user_folder("XDG_CACHE_HOME", ".cache") / repository_id[:32]
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return parent / "index"


def user_folder(variable: str, usual: str) -> Path:
    """Return this user's folder of casfs below the one that a variable of XDG names, or the usual one."""
    base = os.environ.get(variable) or os.path.join(os.path.expanduser("~"), usual)
    return Path(base) / "casfs"


def file_system_type(path: Path) -> str:
    """Return the type of the file system that holds `path`, or "" where the kernel does not say."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    for line in lines:
        fields = line.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1]
    return ""
