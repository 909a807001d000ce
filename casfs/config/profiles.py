"""Profiles: sources and repository, retention rules, further steps, and notifications."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from casfs.config.values import (
    AbsolutePath,
    Command,
    Duration,
    PingUrl,
    Share,
    Size,
    SpanText,
    Tag,
)

SnapshotCount = Annotated[int, msgspec.Meta(ge=1)] | Literal["unlimited"]
NonEmpty = msgspec.Meta(min_length=1)


class _Table(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """A table whose keys are written with hyphens; an unknown key is refused."""


class Keep(_Table, frozen=True, kw_only=True):
    """`keep`: the retention rules of `casfs forget`, applied to this profile's snapshots only."""

    last: SnapshotCount | None = None
    hourly: SnapshotCount | None = None
    daily: SnapshotCount | None = None
    weekly: SnapshotCount | None = None
    monthly: SnapshotCount | None = None
    yearly: SnapshotCount | None = None
    within: SpanText | None = None
    tags: tuple[Tag, ...] = ()

    def __post_init__(self) -> None:
        if not any(getattr(self, name) for name in self.__struct_fields__):
            raise ValueError("says nothing to keep; give a rule such as daily = 7")


class CheckPlan(_Table, frozen=True, kw_only=True):
    """`check`: how to check the repository, and how often (`every`; without it, at each run).

    The check reads data if `read_data`, `read_data_subset`, `older_than` or `max_duration` is given.
    """

    every: Duration | None = None
    read_data: bool = False
    read_data_subset: Share | None = None
    older_than: Duration | None = None
    max_duration: Duration | None = None


class Schedule(_Table, frozen=True, kw_only=True):
    """`schedule`: when systemd or cron runs the profile.

    `calendar` is a systemd calendar expression. A run is delayed by a random time of at most
    `random_delay`, and put off while the machine runs on battery unless `on_battery`.
    """

    calendar: Annotated[str, NonEmpty]
    random_delay: Duration | None = None
    on_battery: bool = False


class Hooks(_Table, frozen=True, kw_only=True):
    """`hooks`: shell commands around a run."""

    before: Command | None = None
    after: Command | None = None
    failure: Command | None = None
    finally_: Command | None = msgspec.field(default=None, name="finally")


class Notification(_Table, frozen=True, kw_only=True):
    """`notify`: a shell command that gets the summary on its standard input.

    `on` says after which runs: those that failed; those that failed or published a snapshot with
    warnings (`problems`); or all.
    """

    command: Command
    on: Literal["failure", "problems", "always"] = "problems"


class Profile(_Table, frozen=True, kw_only=True):
    """A table `[profiles.NAME]`; a missing key means the default of the same option of `casfs backup`."""

    repository: str
    sources: Annotated[tuple[AbsolutePath, ...], NonEmpty]
    exclude: tuple[str, ...] = ()
    exclude_file: tuple[AbsolutePath, ...] = ()
    exclude_caches: bool = False
    exclude_if_present: tuple[str, ...] = ()
    exclude_larger_than: Size | None = None
    one_file_system: bool = False
    tags: tuple[Tag, ...] = ()
    host: Annotated[str, NonEmpty] | None = None
    attempts: Annotated[int, msgspec.Meta(ge=1, le=100)] | None = None
    patience: Duration | None = None
    freeze: Literal["auto", "never", "require"] | None = None
    reread: bool = False
    changed_ok: bool = False
    compression: Annotated[int, msgspec.Meta(ge=-7, le=22)] | None = None
    keep: Keep | None = None
    prune_every: Duration | None = None
    check: CheckPlan | None = None
    mirror_to: tuple[str, ...] = ()
    schedule: Annotated[str, NonEmpty] | Schedule | None = None
    hooks: Hooks = Hooks()
    ping: PingUrl | None = None
    notify: Notification | None = None
    metrics_file: AbsolutePath | None = None

    def timetable(self) -> Schedule | None:
        """Return the schedule with all its values, also if the file gives only the calendar."""
        if isinstance(self.schedule, str):
            return Schedule(calendar=self.schedule)
        return self.schedule
