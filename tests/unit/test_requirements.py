"""Requirements pin every package that is installed from them, each with the hashes of its files."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import casfs

PROJECT = Path(casfs.__file__).parent.parent
FILES = (
    "requirements.txt",
    "requirements-dev.txt",
    "requirements-docs.txt",
    "requirements-fuzz.txt",
)
PIN = re.compile(r"([A-Za-z0-9._-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)")


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(name: str) -> dict[str, str]:
    """Return the pinned versions by package, those of included files too; fail on any other line."""
    found = {}
    text = (PROJECT / name).read_text()
    for line in PIN.sub("", text).splitlines():
        if line.startswith("-r "):
            found.update(pins(line.removeprefix("-r ")))
        else:
            assert line == "" or line.startswith("#"), f"no pin with hashes: {line}"
    found.update({normalized(pin[1]): pin[2] for pin in PIN.finditer(text)})
    return found


@pytest.mark.parametrize("name", FILES)
def test_every_package_is_pinned_with_the_hashes_of_its_files(name: str) -> None:
    assert len(pins(name)) > 15


@pytest.mark.parametrize("name", FILES)
def test_what_pinned_packages_need_is_pinned_too(name: str) -> None:
    """pip would otherwise refuse the whole file, as soon as the index has a new release of it."""
    found = pins(name)
    missing = set()
    for package in found:
        try:
            needed = distribution(package).requires or ()
        except PackageNotFoundError:
            continue  # those of the documentation are not in every environment
        for one in map(Requirement, needed):
            if one.marker is None or one.marker.evaluate({"extra": ""}):
                missing |= {normalized(one.name)} - found.keys()
    assert missing == set()


def test_the_pins_of_what_casfs_runs_with_fit_what_it_declares() -> None:
    found = pins("requirements.txt")
    declared = [Requirement(text) for text in distribution("casfs").requires or ()]
    for one in declared:
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            assert found[normalized(one.name)] in one.specifier
            assert any(part.operator in ("<", "<=", "==") for part in one.specifier), one.name


def test_make_installs_nothing_from_the_index_without_its_hash() -> None:
    commands = [
        line
        for file in ("Makefile", "tools/build-deb")
        for line in (PROJECT / file).read_text().replace("\\\n", "").splitlines()
        if re.search(r"-r requirements\S*", line) and not line.startswith("#")
    ]
    assert len(commands) == 4
    assert [line for line in commands if "--require-hashes" not in line] == []
