"""Locate the user's folders, and the index of a repository: inside it, or in the user's cache directory.

LMDB maps its file and locks it through shared memory; both break on network file systems. The index of an
encrypted repository would reveal to the storage what the encryption hides, so it is never inside the
repository.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from casfs.errors import NoHomeError, RefusedError

_NETWORK_TYPES = frozenset(
    ["nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "afs", "lustre", "beegfs"]
)
"""Linux file system types on which another machine may change a file while it is mapped."""

_ALL_USERS = (1 << 32) - 1
"""How many user numbers the initial user namespace has."""


def index_dir(root: Path, repository_id: str, encrypted: bool = False) -> Path:
    """Return the folder of the index of the repository at `root`."""
    if encrypted:
        return cached_index_dir(repository_id)
    kind = file_system_type(root)
    if kind in _NETWORK_TYPES or kind.startswith("fuse") or not _is_own(root):
        return cached_index_dir(repository_id)
    return root / "index"


def is_trusted_folder(st: os.stat_result) -> bool:
    """Return whether only this user and root can change what is in a folder.

    A group of the owner's own (with the same number) counts as the owner, as for pam_umask.
    """
    writable = st.st_mode & stat.S_IWOTH or (
        st.st_mode & stat.S_IWGRP and st.st_gid not in (0, st.st_uid)
    )
    return stat.S_ISDIR(st.st_mode) and st.st_uid in (os.geteuid(), 0) and not writable


def _is_own(root: Path) -> bool:
    """Return whether only this user and root can change what is in the folder of a repository and its index.

    LMDB trusts its files, so no other user may write them.
    """
    if not is_trusted_folder(os.stat(root)):
        return False
    try:
        return is_trusted_folder(os.lstat(root / "index"))
    except FileNotFoundError:
        return True


def cached_index_dir(repository_id: str) -> Path:
    """Return the folder of this user's own index of a repository, and create its parent.

    Raise RefusedError where another user can change what is in it.
    """
    cache = user_folder("XDG_CACHE_HOME", ".cache")
    for folder in (cache, parent := cache / repository_id[:32]):
        make_private_folder(folder, "XDG_CACHE_HOME")
    return parent / "index"


def make_private_folder(folder: Path, variable: str) -> None:
    """Create a folder of this user and those above it that are missing, with mode 0700 whatever the umask.

    Raise as `require_private_folder` does.
    """
    for missing in reversed((folder, *folder.parents)):
        try:
            missing.mkdir(mode=0o700)
        except OSError:
            # It exists, perhaps on a read-only file system or below a folder that this user may not write.
            if not missing.is_dir():
                raise
    require_private_folder(folder, variable)


def require_private_folder(folder: Path, variable: str) -> None:
    """Raise RefusedError where another user can change what is in this user's folder, or replace it.

    A folder that does not exist is not refused. `variable` is the environment variable of the base folder.
    """
    try:
        st = os.stat(folder)
        changeable = _changeable_above(folder) if is_trusted_folder(st) else folder
    except OSError:
        return
    if changeable is not None:
        raise RefusedError(
            f"another user can change the folder {changeable}, in which casfs keeps what this machine "
            f"knows of repositories; make it yours with mode 0700, or set {variable} to a folder of your "
            "own (after `sudo -E` it belongs to the user who ran sudo: use `sudo -H`)"
        )


def _changeable_above(folder: Path) -> Path | None:
    """Return a folder above another one, or a symlink to it, that lets another user exchange it, or None.

    Such a user can take away what this user recorded, or lead this user to another folder.
    """
    trusted = (os.geteuid(), 0, *unmapped_users())
    if os.lstat(folder).st_uid not in trusted:
        return folder
    for above in dict.fromkeys((*folder.parents, *Path(os.path.realpath(folder)).parents)):
        st = os.lstat(above)
        is_writable = stat.S_ISDIR(st.st_mode) and st.st_mode & stat.S_IWOTH
        if st.st_uid not in trusted or (is_writable and not st.st_mode & stat.S_ISVTX):
            return above
    return None


def unmapped_users() -> tuple[int, ...]:
    """Return the number that stands for all users of the system that a user namespace does not have."""
    try:
        mapped = sum(
            int(line.split()[2]) for line in Path("/proc/self/uid_map").read_text().splitlines()
        )
        number = int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError, IndexError):
        return ()
    return (number,) if mapped < _ALL_USERS else ()


def user_folder(variable: str, usual: str) -> Path:
    """Return the user's casfs folder: below the folder in an XDG variable, or below `~/usual`.

    Raise NoHomeError for a user without a home folder.
    """
    return base_folder(variable, usual) / "casfs"


def base_folder(variable: str, usual: str) -> Path:
    """Return the folder in an XDG variable, or `~/usual`.

    A relative path in the variable is ignored, as the XDG Base Directory Specification says. Raise
    NoHomeError for a user without a home folder.
    """
    base = os.environ.get(variable, "")
    if os.path.isabs(base):
        return Path(base)
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        raise NoHomeError(
            f"this user has no home folder for the files of casfs; set HOME or {variable} to a folder"
        )
    return Path(home, usual)


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
