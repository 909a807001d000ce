"""The whole repository as one view: what is where, and what happens when snapshots come and go."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from casfs_mount.event_loop_guard import WouldBlock
from casfs_mount.inodes import LISTINGS_END, ROOT, StaleError
from casfs_mount.repository_view import FRESH_S, RepositoryView
from casfs_mount.snapshot_names import digits_that_differ, safe_name, time_name

from casfs.digest import SnapshotId, digest_of
from casfs.errors import CasfsError
from casfs.format.tree import Node, NodeType
from casfs.repository.snapshots import SnapshotStore
from tests.support.builders import RepositoryFixture
from tests.unit.mount.test_view import sources_of

SECOND_NS = 1_000_000_000
NOON_NS = 1_700_000_000 * SECOND_NS


@pytest.fixture(autouse=True)
def universal_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


class RepositoryViewFixture:
    """A view of a repository with a clock that is turned by hand.

    LMDB opens a repository once in a process, so it is closed while something is published.
    """

    def __init__(self, repo: RepositoryFixture) -> None:
        self.repo = repo
        self.now = 1000.0
        self.repository = repo.reading()
        self.context = sources_of(self.repository)
        self.view = RepositoryView(self.context, lambda: self.now)

    def change(self, what: Callable[[], object]) -> None:
        self.repository.close()
        what()
        again = self.repo.reading()
        self.repository.store.index = again.store.index
        self.context.repository.store.index = again.store.index
        self.now += FRESH_S + 0.1

    def listed(self, *path: bytes) -> dict[bytes, tuple[int, Node]]:
        number = self.find(*path)
        return {node.name: (below, node) for below, node, _ in self.view.entries(number, 0)}

    def find(self, *path: bytes) -> int:
        number = ROOT
        for name in path:
            found = self.view.lookup(number, name)
            assert found is not None, path
            number = found[0]
        return number

    def follow(self, *path: bytes) -> int:
        """Return the number that a path leads to, symbolic links followed."""
        at: list[bytes] = []
        rest = list(path)
        while rest:
            name = rest.pop(0)
            if name == b"..":
                at.pop()
                continue
            node = self.view.node(self.find(*at, name))
            if node.kind == NodeType.SYMLINK:
                rest = node.content.split(b"/") + rest
            else:
                at.append(name)
        return self.find(*at)


@pytest.fixture
def repo(tmp_path: Path) -> RepositoryFixture:
    return RepositoryFixture(tmp_path)


def publish(repo: RepositoryFixture, seconds: int, **fields: object) -> SnapshotId:
    plan = {b"file": b"content at %d" % seconds}
    return repo.publish(plan, **({"time_ns": NOON_NS + seconds * SECOND_NS} | fields))[0]


def test_every_snapshot_is_found_by_time_id_host_and_tag(repo: RepositoryFixture) -> None:
    first = publish(repo, 0, host="attic", tags=("daily",))
    second = publish(repo, 60, host="cellar", tags=("daily", "weekly"))
    mounted = RepositoryViewFixture(repo)
    assert set(mounted.listed()) == {b"hosts", b"ids", b"snapshots", b"tags", b"versions"}
    times = [b"2023-11-14T22-13-20", b"2023-11-14T22-14-20"]
    assert list(mounted.listed(b"snapshots")) == [times[0], b"latest", times[1]]
    assert set(mounted.listed(b"hosts")) == {b"attic", b"cellar"}
    assert set(mounted.listed(b"tags")) == {b"daily", b"weekly"}
    assert set(mounted.listed(b"tags", b"daily")) == {*times, b"latest"}
    roots = [mounted.find(b"snapshots", name) for name in times]
    for root, identity, places in (
        (roots[0], first, [(b"hosts", b"attic", b"latest"), (b"tags", b"daily", times[0])]),
        (roots[1], second, [(b"hosts", b"cellar", times[1]), (b"tags", b"daily", b"latest")]),
    ):
        text = identity.hex().encode()
        for path in (*places, (b"ids", text[:12]), (b"ids", text)):
            assert mounted.follow(*path) == root, path
    assert mounted.follow(b"snapshots", b"latest") == roots[1]
    assert mounted.follow(b"ids", b"latest") == roots[1]
    for root, content in zip(roots, (b"content at 0", b"content at 60"), strict=True):
        found = mounted.view.lookup(root, b"file")
        assert found is not None
        assert b"".join(mounted.view.open(found[0]).read(0, 100)) == content
        assert mounted.view.parent(root) == mounted.find(b"snapshots")
        assert mounted.view.parent(found[0]) == root


def test_whole_ids_are_found_but_not_listed(repo: RepositoryFixture) -> None:
    identity = publish(repo, 0).hex().encode()
    mounted = RepositoryViewFixture(repo)
    assert set(mounted.listed(b"ids")) == {identity[:12], b"latest"}
    node = mounted.view.node(mounted.find(b"ids", identity))
    assert node.content == b"../snapshots/2023-11-14T22-13-20"
    assert mounted.view.lookup(mounted.find(b"ids"), identity[:20]) is None


def test_an_empty_repository_view_has_its_directories(repo: RepositoryFixture) -> None:
    mounted = RepositoryViewFixture(repo)
    for name in mounted.listed():
        assert mounted.listed(name) == {}
    assert mounted.view.statfs_totals() == (0, 0)


def test_numbers_of_different_snapshots_never_meet_and_stay_the_same(
    repo: RepositoryFixture,
) -> None:
    for n in range(20):
        publish(repo, n)
    numbers = []
    for _ in range(2):
        mounted = RepositoryViewFixture(repo)
        found = {}
        for name, (root, node) in mounted.listed(b"snapshots").items():
            if node.kind == NodeType.DIRECTORY:
                found[name] = root
                found[name + b"/"] = mounted.find(b"snapshots", name, b"file")
        mounted.repository.close()
        assert len(set(found.values())) == len(found) == 40
        assert min(found.values()) >= LISTINGS_END
        numbers.append(found)
    assert numbers[0] == numbers[1]


def test_snapshots_of_the_same_second_have_different_names(repo: RepositoryFixture) -> None:
    for n in range(3):
        publish(repo, 0, user=f"user {n}")
    mounted = RepositoryViewFixture(repo)
    names = sorted(name for name in mounted.listed(b"snapshots") if name != b"latest")
    assert len(names) == 3
    assert names[0] == b"2023-11-14T22-13-20"
    assert all(name.startswith(names[0]) for name in names)
    assert len({mounted.find(b"snapshots", name) for name in names}) == 3


def test_a_new_snapshot_appears_and_is_the_latest(repo: RepositoryFixture) -> None:
    publish(repo, 0)
    mounted = RepositoryViewFixture(repo)
    before = mounted.listed(b"snapshots")
    assert mounted.follow(b"snapshots", b"latest") == mounted.find(
        b"snapshots", b"2023-11-14T22-13-20"
    )
    mounted.change(lambda: publish(repo, 60, host="new"))
    after = mounted.listed(b"snapshots")
    assert len(after) == len(before) + 1
    assert before[b"2023-11-14T22-13-20"][0] == after[b"2023-11-14T22-13-20"][0]
    assert mounted.follow(b"snapshots", b"latest") == after[b"2023-11-14T22-14-20"][0]
    assert b"new" in mounted.listed(b"hosts")


def test_the_list_is_not_read_again_within_a_second(
    repo: RepositoryFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(repo, 0)
    mounted = RepositoryViewFixture(repo)
    reads: list[float] = []
    whole = SnapshotStore.ids

    def counted(snapshots: SnapshotStore) -> list[SnapshotId]:
        reads.append(mounted.now)
        return whole(snapshots)

    monkeypatch.setattr(SnapshotStore, "ids", counted)
    for step in (0.0, 0.3, 0.3, 0.3, 0.3):
        mounted.now += step
        mounted.listed(b"snapshots")
    assert len(reads) == 2


def test_a_forgotten_snapshot_leaves_the_lists_and_still_serves_its_users(
    repo: RepositoryFixture,
) -> None:
    first = publish(repo, 0, host="gone", tags=("gone",))
    publish(repo, 60)
    mounted = RepositoryViewFixture(repo)
    file = mounted.find(b"snapshots", b"2023-11-14T22-13-20", b"file")

    def forget() -> None:
        with repo.writing() as repository:
            repository.snapshots.delete(first)

    link = mounted.find(b"hosts", b"gone", b"latest")
    folder = mounted.find(b"hosts", b"gone")
    mounted.change(forget)
    assert set(mounted.listed(b"snapshots")) == {b"2023-11-14T22-14-20", b"latest"}
    assert set(mounted.listed(b"ids")) != {first.hex()[:12].encode()}
    assert b"gone" not in {**mounted.listed(b"hosts"), **mounted.listed(b"tags")}
    for number in (link, folder):
        with pytest.raises(StaleError):
            mounted.view.node(number)
    assert b"".join(mounted.view.open(file).read(0, 100)) == b"content at 0"
    mounted.now += 30 * 3600
    mounted.listed(b"snapshots")
    mounted.now += 30 * 3600
    mounted.listed(b"snapshots")
    with pytest.raises(StaleError):
        mounted.view.node(file)


def test_a_listing_continues_where_it_was_although_snapshots_come_and_go(
    repo: RepositoryFixture,
) -> None:
    ids = [publish(repo, 60 * n) for n in range(6)]
    mounted = RepositoryViewFixture(repo)
    snapshots = mounted.find(b"snapshots")
    whole = list(mounted.view.entries(snapshots, 0))
    position = whole[3][2]

    def both() -> None:
        with repo.writing() as repository:
            repository.snapshots.delete(ids[0])
        publish(repo, 60 * 6)

    mounted.change(both)
    rest = [node.name for _, node, _ in mounted.view.entries(snapshots, position)]
    seen = {node.name for _, node, _ in whole[:4]}
    assert rest[:-1] == [node.name for _, node, _ in whole[4:]]
    assert rest[-1] == time_name(NOON_NS + 360 * SECOND_NS)
    assert seen.isdisjoint(rest)


def test_a_snapshot_that_another_replaces_is_not_shown(repo: RepositoryFixture) -> None:
    first = publish(repo, 0)
    publish(repo, 0, tags=("kept",), replaces=bytes(first))
    mounted = RepositoryViewFixture(repo)
    assert len(mounted.listed(b"ids")) == 2
    assert b"kept" in mounted.listed(b"tags")


@pytest.mark.expect_errors("casfs_mount.repository_view")
def test_a_damaged_snapshot_is_logged_once_and_the_others_are_shown(
    repo: RepositoryFixture, caplog: pytest.LogCaptureFixture
) -> None:
    bad = publish(repo, 0)
    publish(repo, 60)
    path = repo.root / "snapshots" / bad.hex()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    mounted = RepositoryViewFixture(repo)
    for _ in range(3):
        assert set(mounted.listed(b"snapshots")) == {b"2023-11-14T22-14-20", b"latest"}
        mounted.now += 2 * FRESH_S
    assert len([r for r in caplog.records if r.name == "casfs_mount.repository_view"]) == 1


def test_a_repository_that_went_away_is_an_error_and_not_an_empty_list(
    repo: RepositoryFixture,
) -> None:
    publish(repo, 0)
    mounted = RepositoryViewFixture(repo)
    mounted.listed(b"snapshots")
    aside = repo.root.with_name("aside")
    aside.mkdir()
    for name in ("snapshots", "config"):
        (repo.root / name).rename(aside / name)
    mounted.now += 2 * FRESH_S
    with pytest.raises(CasfsError):
        mounted.listed(b"snapshots")
    for name in ("snapshots", "config"):
        (aside / name).rename(repo.root / name)
    assert len(mounted.listed(b"snapshots")) == 2


def test_a_repository_that_is_renamed_stays_readable(repo: RepositoryFixture) -> None:
    publish(repo, 0)
    mounted = RepositoryViewFixture(repo)
    before = mounted.listed(b"snapshots")
    repo.root.rename(repo.root.with_name("elsewhere"))
    mounted.now += 2 * FRESH_S
    assert mounted.listed(b"snapshots") == before
    repo.root.with_name("elsewhere").rename(repo.root)


def test_the_event_loop_thread_never_reads_the_list_of_snapshots(repo: RepositoryFixture) -> None:
    publish(repo, 0)
    mounted = RepositoryViewFixture(repo)
    mounted.context.guard.bind()
    with pytest.raises(WouldBlock):
        mounted.view.node(ROOT)


def test_hosts_and_tags_of_any_text_are_different_and_possible_names(
    repo: RepositoryFixture,
) -> None:
    texts = ["a/b", "a%2Fb", ".", "..", "%", "", "x" * 300, "x" * 299 + "y", "tab\t", "é", "latest"]
    for n, text in enumerate(texts):
        publish(repo, n, host=text)
    mounted = RepositoryViewFixture(repo)
    names = set(mounted.listed(b"hosts"))
    assert len(names) == len(texts)
    for name in names:
        assert 0 < len(name) <= 255 and b"/" not in name and name not in (b".", b"..")
        assert mounted.view.lookup(mounted.follow(b"hosts", name, b"latest"), b"file") is not None


def test_safe_names_are_readable_where_they_can_be() -> None:
    assert safe_name("laptop-1.home") == b"laptop-1.home"
    assert safe_name("a/b%c\n\0") == b"a%2Fb%25c%0A%00"
    assert safe_name("naïve") == "naïve".encode()
    assert safe_name("\udcff") == b"\xff"


def test_times_beyond_the_calendar_have_names_too() -> None:
    assert time_name(NOON_NS) == b"2023-11-14T22-13-20"
    assert time_name(-SECOND_NS) == b"1969-12-31T23-59-59"
    assert time_name(1 << 62) == b"2116-02-20T23-53-38"
    assert time_name(10**27) == b"@%d" % 10**18


def test_ids_are_shown_with_enough_digits_to_differ() -> None:
    assert digits_that_differ([]) == 12
    one = digest_of(b"x").hex()
    assert digits_that_differ([one, digest_of(b"y").hex()]) == 12
    assert digits_that_differ([one, one[:30] + "z" * 34, "0" * 64]) == 31


def test_no_name_in_the_mount_has_a_colon_and_those_of_older_versions_are_still_found(
    repo: RepositoryFixture,
) -> None:
    publish(repo, 0, host="fe80::1", tags=("a:b",))
    publish(repo, 60, host="attic", tags=("a:b",))
    mounted = RepositoryViewFixture(repo)
    folders = [(b"snapshots",), (b"hosts",), (b"tags",), (b"hosts", b"attic"), (b"tags", b"a%3Ab")]
    for folder in folders:
        assert b":" not in b"".join(mounted.listed(*folder))
    root = mounted.find(b"snapshots", b"2023-11-14T22-13-20")
    old = b"2023-11-14T22:13:20"
    for path in ((b"snapshots", old), (b"hosts", b"fe80::1", old), (b"tags", b"a:b", old)):
        assert mounted.follow(*path) == root
        number = mounted.find(*path[:-1]) if path[0] == b"snapshots" else mounted.follow(*path[:-1])
        assert old not in {node.name for _, node, _ in mounted.view.entries(number, 0)}
    assert mounted.view.lookup(mounted.find(b"snapshots"), b"2023-11-14T22:13:21") is None
    link = mounted.find(b"snapshots", old)
    assert mounted.view.node(link).content == b"2023-11-14T22-13-20"


def test_a_snapshot_from_the_future_is_the_latest_only_where_there_is_no_other(
    repo: RepositoryFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = publish(repo, 0, host="attic")
    publish(repo, 400 * 86_400, host="attic")
    publish(repo, 400 * 86_400, host="cellar")
    monkeypatch.setattr(time, "time_ns", lambda: NOON_NS + SECOND_NS)
    mounted = RepositoryViewFixture(repo)
    root = mounted.follow(b"ids", now.hex().encode())
    for path in ((b"snapshots",), (b"ids",), (b"hosts", b"attic")):
        assert mounted.follow(*path, b"latest") == root
    assert mounted.follow(b"hosts", b"cellar", b"latest") != root
    monkeypatch.setattr(time, "time_ns", lambda: NOON_NS + 401 * 86_400 * SECOND_NS)
    mounted.now += FRESH_S + 1
    assert mounted.follow(b"hosts", b"attic", b"latest") != root
