"""Locate the user's folders, and the index of a repository: inside it, or in the user's cache directory.

LMDB maps its file and locks it through shared memory; both break on network file systems. The index of an
encrypted repository would reveal to the storage what the encryption hides, so it is never inside the
repository.
"""

from __future__ import annotations

import os
from pathlib import Path

_NETWORK_TYPES = frozenset(
    ["nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "afs", "lustre", "beegfs"]
)
"""Linux file system types on which another machine may change a file while it is mapped."""


def index_dir(root: Path, repository_id: str, encrypted: bool = False) -> Path:
    """Return the folder of the index of the repository at `root`."""
    if encrypted:
        return cached_index_dir(repository_id)
    kind = file_system_type(root)
    if kind in _NETWORK_TYPES or kind.startswith("fuse"):
        return cached_index_dir(repository_id)
    return root / "index"


def cached_index_dir(repository_id: str) -> Path:
    """Return the folder of this user's own index of a repository, and create its parent."""
    parent = user_folder("XDG_CACHE_HOME", ".cache") / repository_id[:32]
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return parent / "index"


def user_folder(variable: str, usual: str) -> Path:
    """Return the user's casfs folder: below the folder in an XDG variable, or below `~/usual`."""
    base = os.environ.get(variable) or os.path.join(os.path.expanduser("~"), usual)
    return Path(base) / "casfs"


def file_system_type(path: Path) -> str:
    """Return the type of the file system that holds `path`, or "" where it is unknown."""
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
