"""Describe the machine that is measured."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from bench.measure import floor_bytes
from bench.records import MachineFacts


def describe_machine(scratch: Path) -> MachineFacts:
    """Return cores, kernel, memory and the file system of the scratch folder."""
    return MachineFacts(
        cores=len(os.sched_getaffinity(0)),
        processor=_first_value("/proc/cpuinfo", "model name") or platform.machine(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=f"{platform.system()} {platform.release()} {platform.machine()}",
        system=_system_name(),
        python=platform.python_version(),
        scratch_filesystem=file_system_of(scratch),
        floor_bytes=floor_bytes(),
    )


def available_bytes() -> int:
    """Return the memory that the kernel can give to programs without swapping."""
    text = _first_value("/proc/meminfo", "MemAvailable") or "0"
    return int(text.split()[0]) * 1024


def file_system_of(folder: Path) -> str:
    """Return the type of the file system that holds a folder, such as `ext4`."""
    device = os.stat(folder).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == wanted:
            return after.split()[0]
    return "unknown"


def _system_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")
    except OSError:
        return "unknown"


def _first_value(path: str, key: str) -> str | None:
    for line in Path(path).read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
