"""The pages on configuration and schedules name every key, variable, field and metric that there is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import casfs
from casfs.config.file import load_configuration, parse_file
from casfs.config.profiles import Profile
from casfs.config.repositories import NamedRepository
from casfs.run import profile_run
from casfs.run.metrics import profile_metrics
from casfs.run.outcome import HookOutcome, RunSummary, StepOutcome
from casfs.run.state import ProfileState

DOCS = Path(casfs.__file__).parent.parent / "docs"
CONFIGURATION = (DOCS / "configuration.md").read_text("utf-8")
SCHEDULES = (DOCS / "schedules.md").read_text("utf-8")
JSON = (DOCS / "json.md").read_text("utf-8")
DASHBOARD = (DOCS / "grafana-dashboard.json").read_text("utf-8")
METRICS = {metric.name for metric in profile_metrics(ProfileState(profile="home"))}


def words(page: str) -> set[str]:
    """Return everything that a page sets in code."""
    return {
        word for code in re.findall(r"`([^`\n]+)`", page) for word in re.split(r"[\s:=]+", code)
    }


def keys(kind: Any) -> Iterator[str]:
    """Yield the keys of a table, and those of the tables inside it."""
    info = msgspec.inspect.type_info(kind)
    pending = [info]
    while pending:
        current = pending.pop()
        if isinstance(current, msgspec.inspect.UnionType):
            pending += current.types
        if isinstance(current, msgspec.inspect.StructType):
            for field in current.fields:
                yield field.encode_name
                pending.append(field.type)


def blocks(page: str) -> list[str]:
    return re.findall(r"^```toml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("key", sorted({*keys(Profile), *keys(NamedRepository)}))
def test_every_key_is_on_the_pages(key: str) -> None:
    assert key in words(CONFIGURATION) | words(SCHEDULES)


@pytest.mark.parametrize("kind", [RunSummary, StepOutcome, HookOutcome])
def test_every_field_of_the_summary_is_on_the_page(kind: type[msgspec.Struct]) -> None:
    assert {field.encode_name for field in msgspec.structs.fields(kind)} <= words(JSON)


def test_the_page_names_the_variables_of_hooks_and_no_others() -> None:
    source = Path(profile_run.__file__).read_text("utf-8")
    table = CONFIGURATION.partition("| variable | meaning |")[2].partition("\n\n")[0]
    documented = set(re.findall(r"`(CASFS_[A-Z_]+)`", table))
    assert documented == set(re.findall(r'"(CASFS_[A-Z_]+)"', source)) | {"CASFS_CONFIG"}


def test_the_page_names_the_metrics_and_no_others() -> None:
    table = CONFIGURATION.partition("| metric | meaning |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == METRICS


def test_alerts_and_the_dashboard_ask_for_metrics_that_exist() -> None:
    dashboard = json.loads(DASHBOARD)
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    used = set(re.findall(r"casfs_\w+", " ".join(expressions)))
    assert used <= METRICS
    assert len(used) > 15
    alerts = re.findall(r"expr: (.*)", CONFIGURATION)
    assert len(alerts) == 3
    assert set(re.findall(r"casfs_\w+", " ".join(alerts))) <= METRICS


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in json.loads(DASHBOARD)["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, (panel["title"], taken[x, y])
                taken[x, y] = panel["title"]


def test_the_complete_example_is_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(blocks(CONFIGURATION)[0])
    path.chmod(0o600)
    configuration = load_configuration(str(path))
    assert set(configuration.repositories) == {"nas", "usb"}
    profile = configuration.profile("home")
    assert profile.hooks.failure is not None and profile.notify is not None


@pytest.mark.parametrize("text", blocks(CONFIGURATION) + blocks(SCHEDULES))
def test_every_example_is_understood(text: str) -> None:
    _, tables = parse_file(Path("config.toml"), text)
    assert tables
