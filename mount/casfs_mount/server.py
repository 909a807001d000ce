"""The life of a mount: check, open the repository, mount, serve requests, and end cleanly.

For a background mount, everything except the checks happens after the fork. The mount is usable when it
has answered a request. SIGINT, SIGTERM, SIGHUP and an unmount end it; a request that waits for a disk
without an answer does not prevent that.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyfuse3
import trio

from casfs.display import escape_path
from casfs.errors import CasfsError, KeyMissingError, UsageError
from casfs.format.tree import NodeType
from casfs.repository.opening import OpenOptions, open_for_reading
from casfs.repository.place import LocalPlace, Place
from casfs.repository.repository import Repository
from casfs.repository.snapshot_filter import ALL_SNAPSHOTS, SnapshotFilter
from casfs_mount.background import BackgroundPool
from casfs_mount.blob_reader import INDEX_PREFETCH_BYTES, BlobReader
from casfs_mount.chunk_cache import DEFAULT_CACHE_BYTES, ChunkCache
from casfs_mount.daemon import ReadinessPipe, captured_stderr, run_in_background
from casfs_mount.event_library import fast_event_library
from casfs_mount.event_loop_guard import EventLoopGuard
from casfs_mount.handlers import DisplayOptions, FileSystem
from casfs_mount.inodes import ROOT
from casfs_mount.mountpoint import check_fuse, check_mountpoint, held_mountpoint
from casfs_mount.repository_view import RepositoryView
from casfs_mount.tree_cache import TreeCache
from casfs_mount.view import MountContext, SnapshotView, View

if TYPE_CHECKING:
    from casfs.crypto.identities import Identities

log = logging.getLogger(__name__)

READ_AHEAD_KIB = 1024
"""The kernel's read-ahead, and so the size of its requests; without root it stays at 128 KiB."""

_SWITCH_S = 0.001
"""How long a worker thread may hold the interpreter's lock while the event-loop thread wants it."""

_ALLOCATOR = ((-8, 1), (-3, 32 * 1024 * 1024), (-1, 128 * 1024 * 1024))
"""Options of glibc's mallopt: one arena; use mmap only above the size of a chunk; the trim threshold."""

_END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_END_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class MountRequest:
    """What to mount and where: `snapshot` is SNAP or SNAP:PATH, or None for the whole repository.

    `latest_of` narrows the SNAP `latest`.
    """

    repository: Place
    mountpoint: Path
    snapshot: str | None = None
    latest_of: SnapshotFilter = ALL_SNAPSHOTS
    allow_other: bool = False
    owner: tuple[int, int] | None = None
    cache_bytes: int = DEFAULT_CACHE_BYTES
    deny_changed: bool = False
    kernel_cache: bool = True
    log_file: Path | None = None
    flags: tuple[str, ...] = ()
    """Further mount options for the kernel, such as noexec and nodev."""
    identities: Identities | None = None
    """The identities for an encrypted repository, asked for before the process goes to the background."""


def mount_in_background(request: MountRequest) -> Path:
    """Mount, serve in a background process, and return the real mountpoint when the mount is usable.

    Raises CasfsError if that fails.
    """
    checked = _check(request)
    run_in_background(lambda pipe: _serve_in_background(checked, pipe), checked.log_file)
    return checked.mountpoint


def mount_here(request: MountRequest, on_ready: Callable[[Path], None]) -> None:
    """Mount and serve until unmounted or interrupted; call `on_ready` when the mount is usable."""
    checked = _check(request)
    _serve(checked, lambda: on_ready(checked.mountpoint))


def _check(request: MountRequest) -> MountRequest:
    """Check FUSE and the mountpoint before anything is opened; return the request with absolute paths."""
    check_fuse(request.allow_other)
    mountpoint = check_mountpoint(request.mountpoint, _folder(request.repository))
    log_file = request.log_file
    return replace(
        request,
        mountpoint=mountpoint,
        log_file=Path(os.path.abspath(log_file)) if log_file is not None else None,
    )


def _folder(place: Place) -> Path | None:
    """Return the folder of a local repository."""
    return place.root if isinstance(place, LocalPlace) else None


def _serve_in_background(request: MountRequest, pipe: ReadinessPipe) -> None:
    os.chdir("/")
    _serve(request, pipe.ready)


def _serve(request: MountRequest, on_ready: Callable[[], None]) -> None:
    given = request.identities
    unlock = (lambda storage, config: given) if given is not None else None
    repository = open_for_reading(request.repository, OpenOptions(unlock=unlock), reader="mount")
    repository.store.index.prefetch(INDEX_PREFETCH_BYTES)
    guard = EventLoopGuard()
    blobs = BlobReader(repository.store, guard)
    background = BackgroundPool()
    context = MountContext(
        repository=repository,
        blobs=blobs,
        tree_cache=TreeCache(blobs.read),
        chunk_cache=ChunkCache(blobs.read, guard, background, request.cache_bytes),
        guard=guard,
        background=background,
        deny_changed=request.deny_changed,
    )
    idle = False
    _prepare_process()
    try:
        view = open_view(context, request.snapshot, request.latest_of)
        operations = FileSystem(
            view, DisplayOptions(request.owner, request.kernel_cache), pyfuse3.notify_store
        )
        # A signal between mounting and serving would leave a mount without a server.
        kept = signal.pthread_sigmask(signal.SIG_BLOCK, _END_SIGNALS)
        try:
            _mount(operations, request)
            try:
                with fast_event_library(operations.is_idle, operations.idle_reader):
                    trio.run(_run, request.mountpoint, guard, on_ready)
            finally:
                # Unmounts, unless the user already did.
                pyfuse3.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, kept)
        idle = operations.is_idle()
    finally:
        # A thread that still waits for a disk uses the repository, so it stays open until the exit.
        if background.close() and idle:
            repository.close()


def _mount(operations: FileSystem, request: MountRequest) -> None:
    said: list[str] = []
    with held_mountpoint(request.mountpoint) as require_same:
        try:
            with captured_stderr(said):
                pyfuse3.init(operations, os.fspath(request.mountpoint), _options(request))
        except RuntimeError as error:
            why = "; ".join(said) or str(error)
            name = escape_path(bytes(request.mountpoint))
            raise CasfsError(
                f"FUSE cannot mount on {name}: {escape_path(os.fsencode(why))}"
            ) from error
        try:
            require_same()
        except CasfsError:
            pyfuse3.close()
            raise


def open_view(
    context: MountContext, snapshot: str | None, latest_of: SnapshotFilter = ALL_SNAPSHOTS
) -> View:
    """Return the view of SNAP or SNAP:PATH, or of the whole repository.

    Raises NotFoundError, AmbiguousIdError, UsageError and the errors of the repository.
    """
    if snapshot is None:
        _require_readable(context.repository)
        return RepositoryView(context)
    snapshot_id, loaded, path, root = context.repository.snapshots.resolve_path(snapshot, latest_of)
    if root.kind != NodeType.DIRECTORY:
        raise UsageError(f"only a directory can be mounted; {escape_path(path)} is not a directory")
    return SnapshotView(context, snapshot_id, loaded, root, ROOT)


def _require_readable(repository: Repository) -> None:
    """Raise KeyMissingError if the repository has snapshots and the identities open none of them."""
    missing: KeyMissingError | None = None
    for snapshot_id in repository.snapshots.ids() if repository.key_manager is not None else ():
        try:
            repository.snapshots.load(snapshot_id)
        except KeyMissingError as error:
            missing = error
        except CasfsError:
            continue  # the view reports it
        else:
            return
    if missing is not None:
        raise missing


def _options(request: MountRequest) -> set[str]:
    options = {*pyfuse3.default_options, f"fsname={_source(request)}", "subtype=casfs", "ro"}
    options.update(request.flags)
    if request.allow_other:
        options.add("allow_other")
    return options


def _source(request: MountRequest) -> str:
    """Return the device name for the table of mounts: the repository's path, if its characters allow."""
    path = str(request.repository)
    plain = path.isascii() and path.isprintable() and not set(path) & set(",\\")
    return path if plain else "casfs"


def _prepare_process() -> None:
    """Tune the interpreter and the allocator for many small requests and long-lived large buffers."""
    sys.setswitchinterval(_SWITCH_S)
    gc.collect()
    gc.freeze()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # Chunks are allocated and freed all the time. Returning their pages to the kernel and faulting
        # them in again costs as much as decoding, and memory in one thread's arena is lost to others.
        for option, value in _ALLOCATOR:
            mallopt(option, value)


async def _run(mountpoint: Path, guard: EventLoopGuard, on_ready: Callable[[], None]) -> None:
    guard.bind()
    with trio.open_signal_receiver(*_END_SIGNALS) as signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _END_SIGNALS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_end_on_signal, signals, nursery.cancel_scope)
            nursery.start_soon(_announce_ready, mountpoint, on_ready)
            await pyfuse3.main()
            nursery.cancel_scope.cancel()
        signal.pthread_sigmask(signal.SIG_BLOCK, _END_SIGNALS)


async def _end_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for number in signals:
        log.info("the mount ends because of signal %d", number)
        pyfuse3.terminate()
        await trio.sleep(_END_TIMEOUT_S)
        # A request still waits for a disk, which may never answer.
        scope.cancel()


async def _announce_ready(mountpoint: Path, on_ready: Callable[[], None]) -> None:
    """Send the mount a request, raise the kernel's read-ahead, and call `on_ready`."""
    status = await trio.to_thread.run_sync(os.stat, mountpoint, abandon_on_cancel=True)
    raise_read_ahead(status.st_dev)
    on_ready()


def raise_read_ahead(device: int) -> None:
    """Raise the kernel's read-ahead for the mount with this device number, if this user may."""
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    try:
        setting.write_text(f"{READ_AHEAD_KIB}\n", encoding="ascii")
    except OSError as error:
        log.debug("the read-ahead stays as it is: %s", error)
