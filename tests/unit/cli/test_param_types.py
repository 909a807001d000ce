"""The types of the command line's values, and the verbs that share them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from casfs.cli.app import run
from casfs.cli.param_types import COUNT, DURATION, OWNER, PERCENT, SIZE, SPAN, TAGS
from casfs.errors import UsageError
from casfs.maintenance.retention import UNLIMITED


@pytest.mark.parametrize(
    ("param_type", "text", "value"),
    [
        (SIZE, "1.5K", 1536),
        (TAGS, "a", frozenset("a")),
        (TAGS, "a,b,a", frozenset("ab")),
        (COUNT, "7", 7),
        (COUNT, "unlimited", UNLIMITED),
        (PERCENT, "25%", 0.25),
        (PERCENT, "100", 1.0),
        (DURATION, "1h30m", 5400),
        (OWNER, "1000:50", (1000, 50)),
    ],
)
def test_a_value_is_parsed_once_and_kept_when_it_is_converted_again(
    param_type: click.ParamType[Any], text: str, value: object
) -> None:
    assert param_type.convert(text, None, None) == value
    assert param_type.convert(value, None, None) == value


@pytest.mark.parametrize(
    ("param_type", "text"),
    [
        (SIZE, "many"),
        (TAGS, ""),
        (TAGS, "a,"),
        (TAGS, ",a"),
        (TAGS, "a,,b"),
        (TAGS, " "),
        (TAGS, "a, ,b"),
        (COUNT, "-2"),
        (COUNT, "²"),
        (PERCENT, "half"),
        (PERCENT, "101%"),
        (PERCENT, "-1%"),
        (PERCENT, "nan"),
        (DURATION, "30"),
        (DURATION, "1y"),
        (SPAN, "1s"),
        (OWNER, "root:root"),
        (OWNER, "1:4294967295"),
    ],
)
def test_a_value_that_means_nothing_is_refused_and_repeated_in_the_message(
    param_type: click.ParamType[Any], text: str
) -> None:
    with pytest.raises((click.UsageError, UsageError)) as raised:
        param_type.convert(text, None, None)
    message = raised.value.message if isinstance(raised.value, click.UsageError) else None
    assert repr(text) in (message or str(raised.value))


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "repository"
    (tmp_path / "file").write_text("content")
    monkeypatch.setenv("CASFS_REPOSITORY", str(root))
    assert run(["init"]) == 0
    assert run(["backup", "--no-sync", "--tag", "a,b", str(tmp_path / "file")]) == 0
    return root


@pytest.mark.parametrize(
    "arguments",
    [
        ("backup", "--tag", "a,,b", "."),
        ("snapshots", "--tag", "a,"),
        ("forget", "--keep-last", "1", "--tag", "a,", "--dry-run"),
        ("forget", "--keep-tag", "a,", "--dry-run"),
        ("tag", "latest", "--add", ",a"),
        ("tag", "latest", "--set", ""),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_an_empty_tag_is_refused_by_every_verb(
    arguments: tuple[str, ...], repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in (repository / "snapshots").rglob("*"))
    capsys.readouterr()
    assert run(list(arguments)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "contains an empty tag" in shown.err
    assert sorted(path.name for path in (repository / "snapshots").rglob("*")) == before
