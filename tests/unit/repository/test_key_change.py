"""Changes of the keys of a repository that several hosts reach: one at a time, and never without a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from casfs.crypto import age
from casfs.crypto.identities import Identities
from casfs.crypto.key_manager import rewrap_sessions
from casfs.crypto.recipients import parse_recipient
from casfs.errors import LockedError, RefusedError, StorageDeniedError
from casfs.repository import presence as presence_module
from casfs.repository.key_change import open_for_key_change
from casfs.repository.opening import OpenOptions, open_for_writing
from casfs.repository.presence import FOLDER, present_processes
from casfs.storage.base import Storage
from casfs.storage.clock import elapsed_ns
from tests.support.encryption import PUBLIC, SECRET
from tests.support.far_repository import HOUR_NS, FarRepository
from tests.support.storage_double import Call, Failure


@pytest.fixture
def far(tmp_path: Path, own_home: Path) -> FarRepository:
    return FarRepository(tmp_path, [parse_recipient(PUBLIC)])


def identities(storage: Storage) -> Identities:
    return Identities([age.identity_from_line(SECRET)])


def test_two_hosts_do_not_change_the_keys_at_the_same_time(far: FarRepository) -> None:
    with open_for_key_change(far.host("a"), "key add"):
        with (
            pytest.raises(LockedError, match="another machine changes the keys: key add"),
            open_for_key_change(far.host("b"), "key remove"),
        ):
            pass
        assert len(present_processes(far.memory)) == 1
    with open_for_key_change(far.host("b"), "key remove"):
        pass
    assert far.names(FOLDER) == []


def test_a_host_that_died_while_it_changed_keys_excludes_others_for_half_an_hour(
    far: FarRepository,
) -> None:
    with open_for_key_change(far.host("a"), "key add"):
        far.now_ns += HOUR_NS
        with open_for_key_change(far.host("b"), "key remove"):
            pass


def test_backups_of_other_hosts_go_on_while_keys_are_changed(far: FarRepository) -> None:
    options = OpenOptions(sync=False, allow_no_identity=True)
    with (
        open_for_writing(far.host("b"), "backup", options),
        open_for_key_change(far.host("a"), "key add"),
    ):
        pass


def test_keys_are_not_changed_where_other_hosts_would_not_see_it(far: FarRepository) -> None:
    def denied(call: Call) -> StorageDeniedError:
        return StorageDeniedError(call.method, call.name, PermissionError(13, "denied"))

    far.storage.script.failures.append(
        Failure(lambda call: call.name.startswith(FOLDER), denied, times=1000)
    )
    with (
        pytest.raises(RefusedError, match="accepts no presence object"),
        open_for_key_change(far.host("a"), "key add"),
    ):
        pass


def test_a_host_that_was_suspended_changes_nothing_more(
    far: FarRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_for_key_change(far.host("a"), "key add") as change:
        change.storage.write("recipients", change.storage.read("recipients"))
        later_ns = elapsed_ns() + HOUR_NS
        monkeypatch.setattr(presence_module, "elapsed_ns", lambda: later_ns)
        with pytest.raises(RefusedError, match="was suspended"):
            change.storage.write("recipients", b"x")
        with pytest.raises(RefusedError, match="was suspended"):
            change.storage.create("recipients", b"x")
        with pytest.raises(RefusedError, match="was suspended"):
            change.storage.delete("recipients")
    assert far.memory.read("recipients") != b"x"


def test_two_rewraps_at_once_leave_a_file_of_every_session(far: FarRepository) -> None:
    """Another rewrap runs between the list of the files of a session and the new files of this one."""
    with open_for_key_change(far.host("a"), "key rewrap") as change:
        assert change.clock is not None
        other_files: list[str] = []

        def rewrap_too(call: Call) -> None:
            if call.method == "write" and call.name.startswith("sessions/"):
                far.storage.script.before = None
                before = set(far.names("sessions"))
                rewrap_sessions(far.memory, change.trust, identities(far.memory), change.clock)
                other_files.extend(set(far.names("sessions")) - before)

        far.storage.script.before = rewrap_too
        rewrap_sessions(change.storage, change.trust, identities(far.memory), change.clock)
    files = far.names("sessions")
    assert other_files and set(other_files) < set(files)
    assert len(files) == 2
