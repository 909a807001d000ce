"""Select snapshots by a policy or by name, and remove them; their data stays until the next prune.

No blob is removed, so a running backup is not disturbed. A snapshot that another snapshot replaces is
removed before its replacement, so that a crash never makes a replaced snapshot visible again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from casfs.digest import SnapshotId
from casfs.errors import IntegrityError, KeyMissingError, RefusedError
from casfs.format.snapshot import Snapshot
from casfs.maintenance.retention import KeepDecision, Policy, apply_policy
from casfs.repository.repository import Repository
from casfs.repository.snapshot_filter import ALL_SNAPSHOTS, SnapshotFilter


@dataclass(frozen=True, slots=True)
class Candidate:
    """A snapshot with its id; `snapshot` is None where only the id is known: its file is damaged, or no
    identity decrypts it.
    """

    snapshot_id: SnapshotId
    snapshot: Snapshot | None

    @property
    def time_ns(self) -> int:
        """Nanoseconds since 1970."""
        return self.snapshot.time_ns if self.snapshot is not None else 0

    @property
    def tags(self) -> tuple[str, ...]:
        """Tags of the snapshot."""
        return self.snapshot.tags if self.snapshot is not None else ()


@dataclass(frozen=True, slots=True)
class Grouping:
    """The properties by which snapshots are grouped; a policy applies to each group separately."""

    host: bool = True
    paths: bool = True
    tags: bool = False

    def key(self, snapshot: Snapshot) -> GroupKey:
        """Return the key of the group of a snapshot."""
        return GroupKey(
            snapshot.host if self.host else None,
            snapshot.paths if self.paths else None,
            tuple(sorted(snapshot.tags)) if self.tags else None,
            snapshot.directory if self.paths and isinstance(snapshot.directory, bytes) else b"",
        )


@dataclass(frozen=True, slots=True, order=True)
class GroupKey:
    """The common properties of a group; a property that is not grouped by is None.

    `directory` is where relative paths lead from, and empty where that is not recorded.
    """

    host: str | None
    paths: tuple[bytes, ...] | None
    tags: tuple[str, ...] | None
    directory: bytes = b""


@dataclass(slots=True)
class ForgetPlan:
    """The decisions on the snapshots of each group, newest first.

    The `unproven` ones count in no rule and stay: their writer could otherwise displace proven snapshots. So
    do copies of a proven snapshot that a machine published that is not trusted for its host.
    """

    unproven: list[Candidate] = field(default_factory=list)
    groups: dict[GroupKey, list[KeepDecision[Candidate]]] = field(default_factory=dict)

    def forgotten(self) -> list[Candidate]:
        """Return the snapshots that no rule keeps."""
        return [v.snapshot for group in self.groups.values() for v in group if not v.is_kept]

    def from_future(self) -> list[Candidate]:
        """Return the snapshots that stay because they are from the future."""
        return [v.snapshot for group in self.groups.values() for v in group if v.is_from_future]

    def kept(self) -> int:
        """Return the number of snapshots that stay."""
        return sum(v.is_kept for group in self.groups.values() for v in group)


def plan_policy(
    repository: Repository,
    policy: Policy,
    grouping: Grouping,
    choice: SnapshotFilter,
    allow_all: bool,
    now_ns: int | None = None,
) -> ForgetPlan:
    """Return the decisions of a policy on the snapshots that `choice` accepts; `now_ns` is now by default.

    Raises RefusedError where the policy keeps no snapshot of a group, unless `allow_all`. Snapshots from the
    future, which stay in any case, do not count.
    """
    now_ns = time.time_ns() if now_ns is None else now_ns
    groups: dict[GroupKey, list[Candidate]] = {}
    unproven: list[Candidate] = []
    everything = list(repository.snapshots.iterate())
    uncounted = repository.snapshots.provenance.uncounted_copies(
        snapshot_id for snapshot_id, _ in everything
    )
    for snapshot_id, snapshot in everything:
        if not choice.accepts(snapshot):
            continue
        candidate = Candidate(snapshot_id, snapshot)
        is_proven = repository.snapshots.provenance.is_from_trusted_writer(snapshot_id)
        if is_proven and snapshot_id not in uncounted:
            groups.setdefault(grouping.key(snapshot), []).append(candidate)
        else:
            unproven.append(candidate)
    plan = ForgetPlan(
        unproven, {key: apply_policy(members, policy, now_ns) for key, members in groups.items()}
    )
    for key, decisions in plan.groups.items():
        judged = [decision for decision in decisions if not decision.is_from_future]
        if not allow_all and judged and not any(decision.is_kept for decision in judged):
            raise RefusedError(
                f"these rules keep none of the {len(judged)} snapshots of {_describe(key)}; nothing was "
                "forgotten: keep some (such as --keep-last 1), or pass --unsafe-allow-remove-all"
            )
    return plan


def select_by_name(
    repository: Repository,
    names: Sequence[str],
    allow_all: bool,
    latest_of: SnapshotFilter = ALL_SNAPSHOTS,
) -> list[Candidate]:
    """Return the snapshots that `names` select by `latest`, id or prefix, each once.

    Raises NotFoundError, AmbiguousIdError, and RefusedError where no snapshot would be left, unless
    `allow_all`.
    """
    found: dict[SnapshotId, Candidate] = {}
    for name in names:
        if name == "latest":
            snapshot_id, _ = repository.snapshots.resolve(name, latest_of)
        else:
            snapshot_id = repository.snapshots.resolve_id(name)
        try:
            found[snapshot_id] = Candidate(snapshot_id, repository.snapshots.load(snapshot_id))
        except (IntegrityError, KeyMissingError):
            found[snapshot_id] = Candidate(snapshot_id, None)
    everything = [snapshot_id for snapshot_id, _ in repository.snapshots.iterate()]
    proven = [
        one for one in everything if repository.snapshots.provenance.is_from_trusted_writer(one)
    ]
    left = set(proven or everything) - found.keys()
    if not left and not allow_all:
        raise RefusedError(
            "no snapshot would be left; nothing was forgotten (pass --unsafe-allow-remove-all to force it)"
        )
    return list(found.values())


def forget(repository: Repository, candidates: Iterable[Candidate]) -> int:
    """Remove snapshots durably, and return the number removed; over a distance several at the same time.

    The repository is open for writing. What a snapshot hides is removed before it.
    """

    def with_hidden() -> Iterator[list[SnapshotId]]:
        provenance = repository.snapshots.provenance
        for candidate in candidates:
            hidden: list[SnapshotId] = []
            if candidate.snapshot is not None:
                hidden += provenance.hidden_by(candidate.snapshot_id, candidate.snapshot)
            yield [*hidden, candidate.snapshot_id]

    return sum(repository.snapshots.delete_each(with_hidden()))


def _describe(key: GroupKey) -> str:
    parts = []
    if key.host is not None:
        parts.append(f"host {key.host}")
    if key.paths is not None:
        paths = " ".join(path.decode("utf-8", "replace") for path in key.paths)
        where = f" in {key.directory.decode('utf-8', 'replace')}" if key.directory else ""
        parts.append(f"paths {paths}{where}")
    if key.tags is not None:
        parts.append(f"tags {', '.join(key.tags) or 'none'}")
    return ", ".join(parts) or "the repository"
