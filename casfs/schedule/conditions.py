"""Detect whether this machine has mains power and a network, from the kernel's files.

A scheduled run without them is put off. systemd's own conditions would skip it until the timer fires again.
"""

from __future__ import annotations

from pathlib import Path

_POWER_SUPPLIES = Path("/sys/class/power_supply")
_ROUTES = Path("/proc/net/route")
_ROUTES_6 = Path("/proc/net/ipv6_route")
_UP = 0x1
_ANY_ADDRESS_6 = "0" * 32


def is_on_battery(supplies: Path = _POWER_SUPPLIES) -> bool:
    """Return whether the machine runs on battery; without a battery it is on mains.

    The rule is that of systemd: a battery discharges, and no mains or USB supply is connected.
    """
    try:
        folders = sorted(supplies.iterdir())
    except OSError:
        return False
    is_discharging = False
    for folder in folders:
        kind = _read(folder / "type")
        if kind in ("Mains", "USB") and _read(folder / "online") == "1":
            return False
        is_of_a_device = _read(folder / "scope") == "Device"  # a mouse, a keyboard
        if kind == "Battery" and not is_of_a_device and _read(folder / "status") == "Discharging":
            is_discharging = True
    return is_discharging


def has_network(routes: Path = _ROUTES, routes_6: Path = _ROUTES_6) -> bool:
    """Return whether there is a route to other networks."""
    for line in _read(routes).splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and fields[1] == fields[7] == "00000000" and int(fields[3], 16) & _UP:
            return True
    for line in _read(routes_6).splitlines():
        fields = line.split()
        is_default = len(fields) > 9 and fields[:2] == [_ANY_ADDRESS_6, "00"] and fields[9] != "lo"
        if is_default and int(fields[8], 16) & _UP:
            return True
    return False


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
