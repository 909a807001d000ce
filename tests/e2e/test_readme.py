"""The README's five minutes, word for word, in a root file system of the test's own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.cli import program

PROJECT = Path(__file__).parent.parent.parent

NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="it needs a root file system of its own")

# A copy of the machine's root in memory: what the commands write is gone with the mount namespace.
WORLD = r"""
set -euo pipefail
world=$1
mount -t tmpfs tmpfs "$world"
mkdir "$world"/{upper,work,root}
mount -t overlay overlay -o "lowerdir=/,upperdir=$world/upper,workdir=$world/work" "$world/root"
for folder in dev proc; do mount --rbind "/$folder" "$world/root/$folder"; done
for folder in home etc; do
    mount -t tmpfs tmpfs "$world/root/$folder"
done
mkdir -p "$world/root/home/a/letters" "$world/root/home/b" "$world/root/backup"
rm -rf "$world/root/mnt" && mkdir "$world/root/mnt"
echo 'dear reader' > "$world/root/home/a/letters/first.odt"
echo 'chapter one' > "$world/root/home/a/thesis"
echo 'scratch' > "$world/root/home/b/x.tmp"
echo '/dev/sda1 / ext4 defaults 0 1' > "$world/root/etc/fstab"
cp /etc/passwd /etc/group "$world/root/etc/"
# The command and its interpreter may lie on another file system than the root, or below /home.
for path in "${@:3}"; do
    if ! [[ -e $world/root$path ]]; then
        mkdir -p "$world/root$path"
        mount --rbind "$path" "$world/root$path"
    fi
done
exec chroot "$world/root" env -i HOME=/root TMPDIR=/tmp PATH="$2:/usr/sbin:/usr/bin:/sbin:/bin" bash -s
"""


def block(heading: str) -> str:
    """Return the first code block below a heading of the README."""
    text = (PROJECT / "README.md").read_text("utf-8")
    section = text.partition(f"\n## {heading}\n")[2]
    found = re.search(r"```\n(.*?)```", section, re.S)
    assert found is not None, heading
    return found[1]


def run_in_a_world(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    world = folder / "world"
    world.mkdir()
    bin_folder = Path(program()[0]).parent
    needed = [str(PROJECT), sys.prefix, sys.base_prefix]
    return subprocess.run(
        ["unshare", "--mount", "bash", "-c", WORLD, "world", str(world), str(bin_folder), *needed],
        input=script,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.fuse
@NEEDS_ROOT
def test_the_five_minutes_of_the_readme_work_word_for_word(tmp_path: Path) -> None:
    commands = block("Five minutes")
    assert commands.count("casfs ") >= 12
    # The README shows an id that stands for the reader's own.
    assert commands.count("3f2a") == 1
    commands = commands.replace("3f2a", "$(casfs snapshots --json | head -n 1 | cut -d'\"' -f8)")
    script = textwrap.dedent(
        """\
        set -euo pipefail
        cd /root
        {commands}
        cmp letters/first.odt /home/a/letters/first.odt
        casfs -r /backup/casfs ls -R latest > /tmp/listed
        grep -q thesis /tmp/listed
        ! grep -q x.tmp /tmp/listed
        echo all done
        """
    ).format(commands=commands)
    done = run_in_a_world(script, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all done"
    assert "dear reader" not in done.stderr
    assert "chapter" not in done.stderr


@NEEDS_ROOT
def test_the_restore_after_a_disaster_works_as_the_readme_says(tmp_path: Path) -> None:
    commands = block("Restore after a disaster")
    script = textwrap.dedent(
        """\
        set -euo pipefail
        mkdir -p /mnt/disk /mnt/new
        casfs -r /mnt/disk/casfs init
        casfs -r /mnt/disk/casfs backup /home /etc
        cp -a /home /tmp/home
        rm -rf /home/a /home/b
        {commands}
        diff -r /tmp/home /home
        diff -r /tmp/home /mnt/new/home
        echo all done
        """
    ).format(commands=commands)
    done = run_in_a_world(script, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all done"
