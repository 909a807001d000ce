"""The arguments of mount(8) are parsed, and unknown options are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from casfs.cli import mount_helper
from casfs.cli.mount_helper import (
    Invocation,
    MountOptions,
    parse_arguments,
    parse_options,
    split_options,
)
from casfs.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rw", ["rw"]),
        ("rw,snapshot=latest,,uid=5", ["rw", "snapshot=latest", "uid=5"]),
        (r"snapshot=latest:a\,b,ro", ["snapshot=latest:a,b", "ro"]),
        ('snapshot="latest:a,b c",ro', ["snapshot=latest:a,b c", "ro"]),
        ("a\\", ["a\\"]),
        ("", []),
    ],
)
def test_an_option_list_is_split_at_unprotected_commas(text: str, expected: list[str]) -> None:
    assert split_options(text) == expected


def test_the_arguments_of_mount_are_parsed() -> None:
    given = ["/repo", "/mnt", "-sn", "-v", "-o", "rw,noexec", "-t", "fuse.casfs", "-N", "/ns"]
    assert parse_arguments(given) == Invocation("/repo", Path("/mnt"), ("rw", "noexec"), fake=False)
    assert parse_arguments(["-f", "/repo", "/mnt"]).fake


@pytest.mark.parametrize("arguments", [[], ["/repo"], ["/a", "/b", "/c"], ["/a", "/b", "-z"]])
def test_unexpected_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(UsageError):
        parse_arguments(arguments)


def test_every_option_of_casfs_can_be_given_to_the_mount_helper() -> None:
    text = (
        "snapshot=latest:home,allow_other,uid=1000,gid=100,cache_size=1M,deny_changed,"
        "no_kernel_cache,log_file=/var/log/casfs,noexec"
    )
    wanted = parse_options(split_options(text))
    assert wanted == MountOptions(
        snapshot="latest:home",
        allow_other=True,
        uid=1000,
        gid=100,
        cache_size=1 << 20,
        deny_changed=True,
        no_kernel_cache=True,
        log_file=Path("/var/log/casfs"),
        flags=("noexec",),
    )
    assert wanted.owner() == (1000, 100)
    assert parse_options(split_options(text.replace("_", "-"))) == wanted


def test_the_mount_helper_ignores_options_of_other_programs() -> None:
    text = (
        "rw,ro,defaults,noauto,nofail,_netdev,user,users,user=anna,relatime,noatime,"
        "x-systemd.automount,x-systemd.idle-timeout=5min,comment=x,X-mount.mkdir"
    )
    assert parse_options(split_options(text)) == MountOptions()
    assert MountOptions().owner() is None


@pytest.mark.parametrize(
    "option",
    ["snapsot=latest", "uid=anna", "uid=-1", "cache_size=much", "remount", "allow_other=1", "uid"],
)
def test_the_mount_helper_refuses_unknown_options(option: str) -> None:
    with pytest.raises(UsageError):
        parse_options([option])


def test_the_mount_helper_refuses_an_owner_without_a_group() -> None:
    with pytest.raises(UsageError, match="both"):
        parse_options(["uid=5"]).owner()


class TestMountHelperCommand:
    def end(self, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
        monkeypatch.setattr("sys.argv", ["mount.fuse.casfs", *map(str, arguments)])
        with pytest.raises(SystemExit) as ending:
            mount_helper.main()
        assert isinstance(ending.value.code, int)
        return ending.value.code

    def test_the_mount_helper_exits_with_1_for_usage_and_32_for_failure(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert self.end(monkeypatch, "/repo") == 1
        assert self.end(monkeypatch, "/repo", tmp_path, "-o", "nonsense") == 1
        assert self.end(monkeypatch, tmp_path / "none", tmp_path / "nowhere") == 32
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 3
        assert all(line.startswith("mount.fuse.casfs: ") for line in lines)

    def test_the_mount_helper_mounts_nothing_in_a_dry_run(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        mount_helper.run(["-f", str(tmp_path / "none"), str(tmp_path)])
