"""Power and network as the kernel shows them, from files that a test writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from casfs.schedule.conditions import has_network, is_on_battery

ROUTES = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
LOCAL = "eth0\t0000A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
DEFAULT = "eth0\t00000000\t0100A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
DEFAULT_DOWN = DEFAULT.replace("0003", "0002")
ZERO = "0" * 32
LO_6 = f"{ZERO} 00 {ZERO} 00 {ZERO} ffffffff 00000001 00000000 00200200       lo\n"
DEFAULT_6 = f"{ZERO} 00 {ZERO} 00 fe80{'0' * 27}1 00000400 00000001 00000000 00000003 eth0\n"


def supplies(folder: Path, **found: dict[str, str]) -> Path:
    for name, files in found.items():
        (folder / name).mkdir(parents=True)
        for file, text in files.items():
            (folder / name / file).write_text(f"{text}\n")
    return folder


MAINS_OFF = {"type": "Mains", "online": "0"}
MAINS_ON = {"type": "Mains", "online": "1"}
DISCHARGING = {"type": "Battery", "status": "Discharging"}


def test_a_machine_without_a_battery_is_on_mains(tmp_path: Path) -> None:
    assert not is_on_battery(tmp_path / "missing")
    assert not is_on_battery(supplies(tmp_path, AC=MAINS_OFF))


def test_a_battery_that_discharges_without_mains_is_what_the_machine_runs_on(
    tmp_path: Path,
) -> None:
    assert is_on_battery(supplies(tmp_path, AC=MAINS_OFF, BAT0=DISCHARGING))


@pytest.mark.parametrize(
    "others",
    [
        {"AC": MAINS_ON, "BAT0": DISCHARGING},
        {"BAT0": DISCHARGING, "usb": {"type": "USB", "online": "1"}},
        {"AC": MAINS_OFF, "BAT0": {"type": "Battery", "status": "Full"}},
        {"mouse": {**DISCHARGING, "scope": "Device"}},
        {"AC": MAINS_OFF, "odd": {}},
    ],
)
def test_mains_a_full_battery_and_a_mouse_put_nothing_off(
    tmp_path: Path, others: dict[str, dict[str, str]]
) -> None:
    assert not is_on_battery(supplies(tmp_path, **others))


@pytest.mark.parametrize(
    ("routes", "routes_6", "expected"),
    [
        ("", "", False),
        (ROUTES + LOCAL, LO_6, False),
        (ROUTES + LOCAL + DEFAULT, "", True),
        (ROUTES + DEFAULT_DOWN, "", False),
        (ROUTES, LO_6 + DEFAULT_6, True),
    ],
)
def test_a_network_is_a_route_to_everywhere(
    tmp_path: Path, routes: str, routes_6: str, expected: bool
) -> None:
    (tmp_path / "route").write_text(routes)
    (tmp_path / "ipv6_route").write_text(routes_6)
    assert has_network(tmp_path / "route", tmp_path / "ipv6_route") is expected


def test_a_kernel_that_shows_no_routes_has_no_network(tmp_path: Path) -> None:
    assert not has_network(tmp_path / "a", tmp_path / "b")
