"""Whatever machines store and remove in any order, all snapshots stay readable, and the right ones proven."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from casfs.digest import SnapshotId
from casfs.errors import TrustError
from casfs.repository.opening import OpenOptions, open_for_reading
from tests.support.encryption import OTHER, OTHER_PUBLIC, RECIPIENT, unlock_other
from tests.support.fleet import OPTIONS, WRITE_ONLY, Fleet, id_of

THIEF = OpenOptions(unlock=unlock_other, sync=False)
MACHINES = ("admin", "web", "mail")

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("back up"), st.sampled_from(MACHINES)),
        st.tuples(st.just("back up without an identity"), st.sampled_from(MACHINES)),
        st.tuples(st.just("remove"), st.sampled_from(MACHINES)),
        st.tuples(st.just("forge"), st.sampled_from(("web", "another"))),
        st.tuples(st.just("prune"), st.sampled_from(MACHINES)),
    ),
    max_size=7,
)


class History:
    """A repository, what its machines published, and what former recipients forged."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fleet = Fleet(folder, monkeypatch, recipients=(RECIPIENT, OTHER))
        self.former: list[bytes] = []
        self.proven: dict[SnapshotId, bool] = {}
        self.contents: dict[SnapshotId, bytes] = {}
        for machine in MACHINES:
            self.fleet.run(machine, "key", "accept")

    def back_up(self, machine: str, options: OpenOptions = OPTIONS) -> None:
        content = os.urandom(2000)
        (self.fleet.source / "file").write_bytes(content)
        try:
            made = id_of(self.fleet.back_up(machine, options=options))
        except TrustError:
            self.fleet.run(machine, "key", "accept")
            made = id_of(self.fleet.back_up(machine, options=options))
        self.proven[made], self.contents[made] = True, content

    def remove(self, machine: str) -> None:
        """Remove the other recipient, add it again, and give it what is stored from then on."""
        before = (self.fleet.root / "recipients").read_bytes()
        for command in ("remove", "add"):
            try:
                self.fleet.run(machine, "key", command, OTHER_PUBLIC, "--no-sync")
            except TrustError:
                self.fleet.run(machine, "key", "accept")
                self.fleet.run(machine, "key", command, OTHER_PUBLIC, "--no-sync")
        self.former.append(before)

    def forge(self, host: str) -> None:
        """Publish as each recipient that was ever removed, with the keys that it can decrypt."""
        path = self.fleet.root / "recipients"
        now = path.read_bytes()
        for number, before in enumerate(self.former):
            path.write_bytes(before)
            thief = f"thief {number}"
            self.proven[id_of(self.fleet.back_up(thief, f"{host} {number}", THIEF))] = False
        path.write_bytes(now)

    def prune(self, machine: str) -> None:
        try:
            self.fleet.run(machine, "prune")
        except TrustError:
            self.fleet.run(machine, "key", "accept")
            self.fleet.run(machine, "prune")

    def require_all(self, machine: str) -> None:
        assert self.fleet.proven(machine) == self.proven
        path = self.fleet.source / "file"
        with (
            self.fleet.on(machine),
            open_for_reading(self.fleet.root, OPTIONS) as repository,
        ):
            for snapshot, content in self.contents.items():
                _, _, _, node = repository.snapshots.resolve_path(f"{snapshot.hex()}:{path}")
                blobs = repository.content(node).blobs()
                assert b"".join(map(repository.store.read, blobs)) == content


@pytest.mark.slow
@given(STEPS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_history_of_removals_leaves_all_snapshots_readable_and_no_forged_one_proven(
    steps: list[tuple[str, str]],
) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        history = History(Path(folder), monkeypatch)
        for step, name in steps:
            if step == "back up":
                history.back_up(name)
            elif step == "back up without an identity":
                history.back_up(name, WRITE_ONLY)
            elif step == "remove":
                history.remove(name)
            elif step == "forge":
                history.forge(name)
            else:
                history.prune(name)
        for machine in ("admin", "a fresh one"):
            history.require_all(machine)
