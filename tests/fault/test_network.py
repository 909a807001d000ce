"""Each request of the everyday verbs fails once, in every way that a network and a server can fail.

The server is a real one, SeaweedFS, behind a proxy. After each failure every published snapshot is listed,
nothing else is, and the message is one sentence. At the end of each matrix every byte is verified.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from casfs.backup.run import BackupOptions, run_backup
from casfs.digest import SnapshotId
from casfs.errors import CasfsError, IntegrityError, StorageDeniedError
from casfs.maintenance.check import Checker
from casfs.maintenance.scrub import PackSelection
from casfs.monitor import RecordingMonitor
from casfs.repository.opening import open_for_reading, open_for_writing
from casfs.repository.place import RemotePlace
from casfs.restore.restorer import RestoreOptions, Restorer
from casfs.storage import object_store, retry
from casfs.storage.url import parse_address
from tests.support.comparing import tree_differences
from tests.support.effort import EFFORT
from tests.support.faulty_proxy import Fault, ProxiedRequest
from tests.support.network_scene import NetworkScene

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 * EFFORT)]

_serials = itertools.count()

REPEATED = frozenset(
    [
        Fault.SILENT,
        Fault.SILENT_DONE,
        Fault.CLOSED,
        Fault.CLOSED_DONE,
        Fault.RESET_REQUEST,
        Fault.RESET_ANSWER,
        Fault.STATUS_409,
        Fault.STATUS_429,
        Fault.STATUS_500,
        Fault.STATUS_503,
    ]
)
"""A network and a busy server get better: a verb that meets one of these succeeds."""


ALIKE = (
    (Fault.SILENT, Fault.CLOSED, Fault.RESET_REQUEST, Fault.RESET_ANSWER),
    (Fault.SILENT_DONE, Fault.CLOSED_DONE),
    (Fault.STATUS_409, Fault.STATUS_429, Fault.STATUS_500, Fault.STATUS_503),
)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time out and try again soon: what a request meets does not depend on how long it waits."""
    monkeypatch.setattr(object_store, "_TIMEOUT_S", 1)
    policy = retry.RetryPolicy
    monkeypatch.setattr(
        "casfs.storage.remote.RetryPolicy",
        lambda patience_s, first_patience_s: policy(
            patience_s, first_patience_s, first_pause_s=0.01
        ),
    )


def message_of(error: CasfsError) -> str:
    """Return a message, which is one line that says something."""
    message = str(error)
    assert message.strip() and "\n" not in message and "Traceback" not in message
    return message


def fail_everywhere(
    network: NetworkScene, fault: Fault, verb: Callable[[], None], requests: int
) -> Iterator[CasfsError | None]:
    """Do a verb once for each of its requests, which fails; yield the error that the verb raised.

    Failures that look alike to the client take turns at the requests, unless CASFS_EFFORT is given.
    """
    alike = next((group for group in ALIKE if fault in group), (fault,))
    step = len(alike) if EFFORT == 1 else 1
    for number in range(alike.index(fault) if step > 1 else 0, requests, step):
        network.proxy.fail_once(number, fault)
        error = None
        try:
            verb()
        except CasfsError as raised:
            error = raised
            message_of(raised)
        if fault in REPEATED:
            assert error is None, (number, network.proxy.requests[number], error)
        if fault is Fault.STATUS_403 and error is not None:
            assert isinstance(error, StorageDeniedError | CasfsError)
        network.proxy.begin()
        yield error


def requests_of(network: NetworkScene, verb: Callable[[], None]) -> int:
    """Return how many requests a verb makes when none fails."""
    network.proxy.begin()
    verb()
    assert network.proxy.requests
    return len(network.proxy.requests)


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name.lower())
def test_a_backup_publishes_whole_or_not_at_all_whichever_request_fails(
    network: NetworkScene, fault: Fault
) -> None:
    published: list[SnapshotId] = []

    def back_up() -> None:
        network.change()
        published.append(network.back_up())

    requests = requests_of(network, back_up)
    network.published[published.pop()] = network.source
    for error in fail_everywhere(network, fault, back_up, requests):
        if error is None:
            network.published[published.pop()] = network.source
            network.must_list()
            continue
        # An answer that was falsified after the snapshot had been stored leaves the snapshot, whole.
        (listed,) = [*(network.ids(network.direct) - set(network.published)), None][:1]
        if listed is not None:
            assert not isinstance(error, StorageDeniedError)
            network.published[listed] = network.source
        network.must_list()
    network.must_be_intact()


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name.lower())
@pytest.mark.parametrize("is_cold", [True, False], ids=["cold", "warm"])
def test_a_restore_is_right_or_reports_an_error_whichever_request_fails(
    network: NetworkScene, fault: Fault, is_cold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    homes = itertools.count()
    newest = list(network.published)[-1].hex()

    def restore() -> None:
        number = next(homes)
        if is_cold:
            monkeypatch.setenv("XDG_CACHE_HOME", str(network.folder / f"cache {number}"))
        target = network.folder / f"target {number}"
        # Not `latest`: a snapshot that cannot be read is omitted with a warning.
        with open_for_reading(network.place()) as repository:
            *_, node = repository.snapshots.resolve_path(f"{newest}:{network.source}")
            restorer = Restorer(repository, RestoreOptions(), RecordingMonitor())
            result = restorer.restore(b"", node, bytes(target), with_root=True)
            if result.damaged or result.failed:
                raise IntegrityError("reported by the restore")
        assert tree_differences(network.source, target) == []

    requests = requests_of(network, restore)
    for _ in fail_everywhere(network, fault, restore, requests):
        pass
    network.must_list()
    restore()


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name.lower())
@pytest.mark.expect_errors
def test_a_check_finds_damage_only_where_answers_are_false(
    network: NetworkScene, fault: Fault
) -> None:
    found: list[object] = []

    def check() -> None:
        with open_for_reading(network.place(), may_write_index=True) as repository:
            found[:] = Checker(repository, RecordingMonitor()).check(PackSelection()).damage

    requests = requests_of(network, check)
    assert found == []
    for error in fail_everywhere(network, fault, check, requests):
        if fault in REPEATED and error is None:
            assert found == []
        # What a false answer made the check believe lasts no longer than the answer.
        if error is not None or found:
            check()
            check()
            assert found == []
    network.must_be_intact()


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name.lower())
def test_a_forget_and_a_new_tag_lose_no_other_snapshot(network: NetworkScene, fault: Fault) -> None:
    def retag_and_forget() -> None:
        with open_for_writing(network.place(), "tag") as repository:
            snapshots = repository.snapshots
            extra, snapshot = next(iter(snapshots.iterate()))
            changed, _ = snapshots.retag(extra, snapshot, (f"tag {next(_serials)}",))
            network.published.pop(extra, None)
            network.published[changed] = network.source

    requests = requests_of(network, retag_and_forget)
    for error in fail_everywhere(network, fault, retag_and_forget, requests):
        with open_for_reading(network.direct) as repository:
            listed = [snapshot_id for snapshot_id, _ in repository.snapshots.iterate()]
        assert len(listed) == 2
        if error is not None:
            # The next change of the tags removes what this one has left.
            network.published = dict.fromkeys(listed, network.source)
            retag_and_forget()
    network.must_be_intact()


def test_a_network_that_goes_away_in_the_middle_of_a_backup_costs_time_only(
    network: NetworkScene, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    network.change()
    network.proxy.begin()
    cuts: list[ProxiedRequest] = []

    def cut(request: ProxiedRequest) -> None:
        # The network goes away at each of the first uploads, until a pause between attempts is over.
        if request.changes and len(cuts) < 3:
            network.proxy.is_cut.set()
            cuts.append(request)

    network.proxy.before = cut
    real = retry.Retrier._wait

    def come_back(self: retry.Retrier, seconds: float) -> bool:
        stopped = real(self, seconds)
        if network.proxy.is_cut.is_set() and seconds > 0.05:
            network.proxy.is_cut.clear()
        return stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry.Retrier, "_wait", come_back)
        try:
            published = network.back_up()
        finally:
            network.proxy.before = lambda request: None
            network.proxy.is_cut.clear()
    assert len(cuts) == 3
    network.published[published] = network.source
    network.must_list()
    network.must_be_intact()


def test_a_server_that_is_gone_for_good_ends_a_backup_with_a_sentence(
    network: NetworkScene,
) -> None:
    network.change()
    network.proxy.begin(
        lambda request: Fault.STATUS_503 if request.method in ("PUT", "POST") else None
    )
    options = replace(network.place().options, patience_s=0.5, first_patience_s=0.5)
    place = RemotePlace(parse_address(network.url), options)
    with pytest.raises(CasfsError) as raised, open_for_writing(place, "backup") as repository:
        run_backup(
            repository, BackupOptions(paths=(bytes(network.source),), host="x"), RecordingMonitor()
        )
    assert "the server answered 503" in message_of(raised.value)
    network.proxy.begin()
    network.must_list()
    network.must_be_intact()
