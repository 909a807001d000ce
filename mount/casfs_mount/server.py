"""The life of a mount: checks, repository, FUSE session, requests, and a clean end.

In the background everything but the checks happens after the fork. The mount counts as usable when a
request to it was answered. SIGINT, SIGTERM and SIGHUP unmount and end it, as does unmounting it; a
request that a disk never answers does not keep it from ending.
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
from casfs.repository.repository import Repository
from casfs_mount.background import BackgroundPool
from casfs_mount.blob_reader import BlobReader
from casfs_mount.chunk_cache import DEFAULT_CACHE_BYTES, ChunkCache
from casfs_mount.daemon import Background, captured_stderr, run_in_background
from casfs_mount.event_loop_guard import EventLoopGuard
from casfs_mount.handlers import DisplayOptions, FileSystem
from casfs_mount.inodes import ROOT
from casfs_mount.mountpoint import check_fuse, check_mountpoint
from casfs_mount.repository_view import RepositoryView
from casfs_mount.tree_cache import TreeCache
from casfs_mount.view import MountContext, SnapshotView, View

if TYPE_CHECKING:
    from casfs.crypto.identities import Identities

log = logging.getLogger(__name__)

READ_AHEAD_KIB = 1024
"""What the kernel may ask for at once; without root it stays at its default of 128."""

INDEX_PREFETCH_BYTES = 64 * 1024 * 1024
"""An index up to this size is read in advance: its pages are needed in no order at all."""

_SWITCH_S = 0.001
"""How long a worker thread may keep the interpreter from the event loop, which has requests to answer."""

_ALLOCATOR = ((-8, 1), (-3, 32 * 1024 * 1024), (-1, 128 * 1024 * 1024))
"""glibc's mallopt: one arena; map only what is larger than a chunk; keep this much at the top."""

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_END_PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True)
class MountRequest:
    """What to mount where: `snapshot` is SNAP or SNAP:PATH, or None for the whole repository."""

    repository: Path
    mountpoint: Path
    snapshot: str | None = None
    allow_other: bool = False
    owner: tuple[int, int] | None = None
    cache_bytes: int = DEFAULT_CACHE_BYTES
    deny_changed: bool = False
    kernel_cache: bool = True
    log_file: Path | None = None
    flags: tuple[str, ...] = ()
    """What the kernel is told of the mount besides: noexec, nodev and the like."""
    identities: Identities | None = None
    """What opens the repository if it is encrypted, gathered before anything goes to the background."""


def mount_in_background(request: MountRequest) -> Path:
    """Mount, return the real mountpoint when the mount is usable, and serve it in another process.

    Raises CasfsError with one sentence when it does not work.
    """
    checked = _check(request)
    run_in_background(lambda background: _serve_behind(checked, background), checked.log_file)
    return checked.mountpoint


def mount_here(request: MountRequest, on_ready: Callable[[Path], None]) -> None:
    """Mount and serve until unmounted or interrupted; `on_ready` is called when it is usable."""
    checked = _check(request)
    _serve(checked, lambda: on_ready(checked.mountpoint))


def _check(request: MountRequest) -> MountRequest:
    """Refuse what can be refused before anything is opened, and make the paths absolute."""
    check_fuse(request.allow_other)
    mountpoint = check_mountpoint(request.mountpoint, request.repository)
    log_file = request.log_file
    return replace(
        request,
        repository=Path(os.path.abspath(request.repository)),
        mountpoint=mountpoint,
        log_file=Path(os.path.abspath(log_file)) if log_file is not None else None,
    )


def _serve_behind(request: MountRequest, background: Background) -> None:
    os.chdir("/")
    _serve(request, background.ready)


def _serve(request: MountRequest, on_ready: Callable[[], None]) -> None:
    given = request.identities
    unlock = (lambda storage, config: given) if given is not None else None
    repository = open_for_reading(request.repository, OpenOptions(unlock=unlock), reader="mount")
    repository.store.index.prefetch(INDEX_PREFETCH_BYTES)
    waiting = EventLoopGuard()
    blobs = BlobReader(repository.store, waiting)
    errands = BackgroundPool()
    sources = MountContext(
        repository=repository,
        blobs=blobs,
        pieces=TreeCache(blobs.read),
        chunks=ChunkCache(blobs.read, waiting, errands, request.cache_bytes),
        waiting=waiting,
        errands=errands,
        deny_changed=request.deny_changed,
    )
    idle = False
    _prepare_process()
    try:
        view = open_view(sources, request.snapshot)
        operations = FileSystem(view, DisplayOptions(request.owner, request.kernel_cache))
        # A signal that came between mounting and serving would leave a mount without a server.
        kept = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        try:
            _mount(operations, request)
            try:
                trio.run(_run, request.mountpoint, waiting, on_ready)
            finally:
                # Detaches where that is still to be done.
                pyfuse3.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, kept)
        idle = operations.is_idle()
    finally:
        # A thread that a disk keeps waiting would still use what is closed here.
        if errands.close() and idle:
            repository.close()


def _mount(operations: FileSystem, request: MountRequest) -> None:
    said: list[str] = []
    try:
        with captured_stderr(said):
            pyfuse3.init(operations, os.fspath(request.mountpoint), _options(request))
    except RuntimeError as error:
        why = "; ".join(said) or str(error)
        name = escape_path(bytes(request.mountpoint))
        raise CasfsError(f"FUSE cannot mount on {name}: {escape_path(os.fsencode(why))}") from error


def open_view(sources: MountContext, snapshot: str | None) -> View:
    """Return the view of SNAP or SNAP:PATH, or of the whole repository.

    Raises NotFoundError, AmbiguousIdError and UsageError, and what the repository raises.
    """
    if snapshot is None:
        _refuse_if_closed(sources.repository)
        return RepositoryView(sources)
    snapshot_id, loaded, path, root = sources.repository.snapshots.resolve_path(snapshot)
    if root.kind != NodeType.DIRECTORY:
        raise UsageError(f"only a directory can be mounted: {escape_path(path)} is none")
    return SnapshotView(sources, snapshot_id, loaded, root, ROOT)


def _refuse_if_closed(repository: Repository) -> None:
    """Raise KeyMissingError where there are snapshots, and the identities open none of them."""
    missing: KeyMissingError | None = None
    for snapshot_id in repository.snapshots.ids() if repository.vault is not None else ():
        try:
            repository.snapshots.load(snapshot_id)
        except KeyMissingError as error:
            missing = error
        except CasfsError:
            continue  # the view tells of it
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
    """Return what stands for the device in tables of mounts: the repository, if it can stand there."""
    path = os.fspath(request.repository)
    plain = path.isascii() and path.isprintable() and not set(path) & set(",\\")
    return path if plain else "casfs"


def _prepare_process() -> None:
    """Set what suits a process that answers small requests and holds some large buffers for long."""
    sys.setswitchinterval(_SWITCH_S)
    gc.collect()
    gc.freeze()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # Chunks come and go all the time. To give their pages back and to fault them in again costs
        # as much as decoding them, and an arena for every thread keeps memory that no other can use.
        for option, value in _ALLOCATOR:
            mallopt(option, value)


async def _run(mountpoint: Path, waiting: EventLoopGuard, on_ready: Callable[[], None]) -> None:
    waiting.bind()
    with trio.open_signal_receiver(*_ENDING) as signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_end_at_a_signal, signals, nursery.cancel_scope)
            nursery.start_soon(_announce_ready, mountpoint, on_ready)
            await pyfuse3.main()
            nursery.cancel_scope.cancel()
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)


async def _end_at_a_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for number in signals:
        log.info("the mount ends at signal %d", number)
        pyfuse3.terminate()
        await trio.sleep(_END_PATIENCE_S)
        # A request still waits, for a disk that may never answer.
        scope.cancel()


async def _announce_ready(mountpoint: Path, on_ready: Callable[[], None]) -> None:
    """Ask the mount something, which shows that it answers, and let the kernel read further ahead."""
    status = await trio.to_thread.run_sync(os.stat, mountpoint, abandon_on_cancel=True)
    raise_read_ahead(status.st_dev)
    on_ready()


def raise_read_ahead(device: int) -> None:
    """Raise the read-ahead of the mount on this device number, where this user may."""
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    try:
        setting.write_text(f"{READ_AHEAD_KIB}\n", encoding="ascii")
    except OSError as error:
        log.debug("the read-ahead stays as it is: %s", error)
