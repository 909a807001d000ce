"""The page of JSON and the lines that the commands print: each field of each, with its type."""

from __future__ import annotations

import base64
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.places import MakeCasfs
from tests.support.cli import Casfs
from tests.support.every_verb import Line, lines_of_every_verb
from tests.support.mounts import mounted

PAGE = Path(__file__).parent.parent.parent / "docs" / "json.md"

NOT_PROVOKED = {
    ("check", "lock"),
    ("check", "short_lock"),
    ("check", "unreadable"),
    ("changed", "changed"),
    ("find", "omitted"),
    ("forget", "omitted"),
    ("stats", "omitted"),
    ("lock-policy", "lock_policy"),
    ("copy", "damage"),
    ("mirror", "damage"),
    ("prune", "draft"),
    ("repair snapshots", "returned"),
}
"""What a healthy machine and one repository do not print; the tests of these commands provoke it."""


@dataclass(slots=True)
class Documented:
    """The fields of one type of line: the JSON types of each, and the fields that may be absent."""

    types: dict[str, set[str]] = field(default_factory=dict)
    optional: set[str] = field(default_factory=set)

    def add(self, row: str) -> None:
        name, types, _ = (cell.strip() for cell in row.strip("| ").split(" | ", 2))
        text, is_optional, _ = types.partition(", optional")
        self.types[name.strip("`")] = set(text.split(" or "))
        if is_optional:
            self.optional.add(name.strip("`"))


def read_page() -> tuple[dict[tuple[str, str], Documented], Documented]:
    """Return the documented lines by command ("" for every command) and type, and the fields of an entry."""
    lines: dict[tuple[str, str], Documented] = {}
    entry = Documented()
    with_entry = []
    current = [entry]
    for line in PAGE.read_text("utf-8").splitlines():
        if line == "## An entry":
            current = [entry]
        elif found := re.fullmatch(r"### (.*): `([\w./]+)`", line):
            commands = re.findall(r"`([a-z -]+)`", found[1]) or [""]
            current = [lines.setdefault((command, found[2]), Documented()) for command in commands]
        elif line.endswith("Also the fields of an [entry](#an-entry)."):
            with_entry += current
        elif line.startswith("| `"):
            for one in current:
                one.add(line)
    for one in with_entry:
        one.types |= {name: types for name, types in entry.types.items() if name not in one.types}
        one.optional |= entry.optional
    return lines, entry


def is_of_type(value: Any, name: str) -> bool:
    """Return whether a value is of a documented JSON type."""
    if name.startswith("array of "):
        inner = name.removeprefix("array of ")
        return isinstance(value, list) and all(is_of_type(item, inner) for item in value)
    if isinstance(value, bool):
        return name in ("any", "boolean")
    classes: dict[str, type | tuple[type, ...]] = {
        "string": str,
        "integer": int,
        "number": (int, float),
        "object": dict,
        "null": type(None),
    }
    return name == "any" or (name in classes and isinstance(value, classes[name]))


def differences(line: Line, documented: Documented) -> list[str]:
    """Return how the fields of a line differ from the page."""
    present = set(line) - {"type"}
    found = [f"{name} is not documented" for name in present - documented.types.keys()]
    required = documented.types.keys() - documented.optional
    found += [f"{name} is missing" for name in required - present]
    for name in present & documented.types.keys():
        if not any(is_of_type(line[name], one) for one in documented.types[name]):
            found.append(f"{name} is {line[name]!r}, not {documented.types[name]}")
    return found


@pytest.fixture(scope="module")
def printed(
    tmp_path_factory: pytest.TempPathFactory, make_casfs: MakeCasfs
) -> list[tuple[str, Line]]:
    folder = tmp_path_factory.mktemp("json")
    for name in ("home", "work"):
        (folder / name).mkdir()
    casfs = make_casfs(folder, folder / "home")
    return list(lines_of_every_verb(casfs, folder / "work"))


@pytest.mark.slow
def test_every_printed_line_has_the_documented_fields_and_types(
    printed: list[tuple[str, Line]],
) -> None:
    lines, entry = read_page()
    wrong = []
    for command, line in printed:
        documented = lines.get((command, line["type"])) or lines.get(("", line["type"]))
        if documented is None:
            wrong.append(f"{command}: the type {line['type']} is not documented")
            continue
        wrong += [f"{command} {line['type']}: {text}" for text in differences(line, documented)]
        for side in (line.get("before"), line.get("after")):
            if isinstance(side, dict):
                wrong += [f"{command}: {text}" for text in differences(side, entry)]
    assert sorted(set(wrong)) == []


@pytest.mark.slow
def test_every_documented_line_is_printed(printed: list[tuple[str, Line]]) -> None:
    lines, _ = read_page()
    assert len(lines) > 40
    seen = {(command, line["type"]) for command, line in printed}
    missing = {key for key in lines if key[0]} - seen - NOT_PROVOKED
    assert missing == set()


def test_a_name_has_one_type_in_all_lines() -> None:
    lines, entry = read_page()
    found: dict[str, dict[str, set[str]]] = {}
    for command, documented in [*lines.items(), (("", "an entry"), entry)]:
        for name, types in documented.types.items():
            for kind in types - {"null"}:
                found.setdefault(name, {}).setdefault(kind, set()).add(" ".join(command))
    assert len(found) > 100
    assert {name: kinds for name, kinds in found.items() if len(kinds) > 1} == {}


def test_the_comparison_notices_each_kind_of_difference() -> None:
    lines, entry = read_page()
    version = lines["version", "version"]
    good = {"type": "version", "casfs": "1", "format": 1, "python": "3"}
    assert differences(good, version) == []
    assert differences(good | {"more": 1}, version) == ["more is not documented"]
    assert differences(good | {"format": "1"}, version)
    assert differences({"type": "version", "casfs": "1", "format": 1}, version)
    assert "mode" in lines["ls", "node"].types and "mode" in entry.types


@pytest.mark.fuse
def test_the_report_of_a_mounted_snapshot_has_the_documented_fields(
    repository: Casfs, source: Path, tmp_path: Path
) -> None:
    repository.backup("source", "--tag", "weekly", cwd=source.parent)
    documented = read_page()[0]["", ".casfs/snapshot.json"]
    with mounted(repository, "latest", at=tmp_path / "mount") as mount:
        report = json.loads((mount / ".casfs/snapshot.json").read_bytes())
    assert differences(report, documented) == []
    (totals,) = re.findall(r"\| `stats` \| .*", PAGE.read_text("utf-8"))
    assert set(report["stats"]) == set(re.findall(r"`(\w+)`", totals)) - {"stats"}


def test_json_gives_names_that_are_not_utf8_in_base64_too(
    repository: Casfs, tmp_path: Path
) -> None:
    source = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(source)
    with open(source + b"/file", "wb") as file:
        file.write(b"content")
    found = repository.json("backup", source).one("snapshot")
    assert [base64.b64decode(path) for path in found["paths_b64"]] == [source]
    (listed,) = repository.json("snapshots").objects
    assert [base64.b64decode(path) for path in listed["paths_b64"]] == [source]
    target = os.fsencode(tmp_path) + b"/aim\xe9"
    restored = repository.json("restore", "latest", "--target", target).one("summary")
    assert base64.b64decode(restored["target_b64"]) == target
