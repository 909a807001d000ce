"""The arguments of the verb that runs each step of a profile.

They name repositories as the configuration does, and each process reads the configuration itself. So the
arguments, which every user of the machine can see, contain no secret and no path to one.
"""

from __future__ import annotations

from casfs.config.profiles import CheckPlan, Keep, Profile
from casfs.run.outcome import StepName


def step_arguments(
    step: StepName, target: str | None, name: str, profile: Profile, host: str
) -> list[str]:
    """Return the verb of a step and its arguments, except those that all steps share."""
    if step is StepName.BACKUP:
        return _backup(name, profile, host)
    if step is StepName.FORGET and profile.keep is not None:
        return _forget(name, profile.keep, host)
    if step is StepName.CHECK and profile.check is not None:
        return _check(profile.check)
    if step is StepName.MIRROR and target is not None:
        return ["mirror", target]
    return [str(step)]


def profile_tag(name: str) -> str:
    """Return the tag that marks the snapshots of a profile."""
    return f"profile:{name}"


def _backup(name: str, profile: Profile, host: str) -> list[str]:
    found = ["backup", f"--host={host}", f"--tag={profile_tag(name)}"]
    found += [f"--tag={tag.text}" for tag in profile.tags]
    found += [f"--exclude={pattern}" for pattern in profile.exclude]
    found += [f"--exclude-file={file.path}" for file in profile.exclude_file]
    found += [f"--exclude-if-present={name}" for name in profile.exclude_if_present]
    if profile.exclude_larger_than is not None:
        found.append(f"--exclude-larger-than={profile.exclude_larger_than.text}")
    if profile.attempts is not None:
        found.append(f"--attempts={profile.attempts}")
    if profile.patience is not None:
        found.append(f"--patience={profile.patience.seconds}")
    if profile.freeze is not None:
        found.append(f"--freeze={profile.freeze}")
    if profile.compression is not None:
        found.append(f"--compression={profile.compression}")
    for is_set, option in (
        (profile.exclude_caches, "--exclude-caches"),
        (profile.one_file_system, "--one-file-system"),
        (profile.reread, "--reread"),
        (profile.changed_ok, "--changed-ok"),
    ):
        found += [option] if is_set else []
    return [*found, "--", *(source.path for source in profile.sources)]


def _forget(name: str, keep: Keep, host: str) -> list[str]:
    """Return arguments that apply the rules only to snapshots that this profile made on this host.

    `forget` looks at each set of paths separately. So a snapshot without a source that was missing, or from
    a profile of the same name in another user's configuration, never takes the place of a whole one.
    """
    found = ["forget", f"--host={host}", f"--tag={profile_tag(name)}", "--group-by=host,paths"]
    for period in ("last", "hourly", "daily", "weekly", "monthly", "yearly"):
        count = getattr(keep, period)
        if count is not None:
            found.append(f"--keep-{period}={count}")
    if keep.within is not None:
        found.append(f"--keep-within={keep.within.text}")
    return found + [f"--keep-tag={tag.text}" for tag in keep.tags]


def _check(plan: CheckPlan) -> list[str]:
    found = ["check"]
    if plan.read_data_subset is not None:
        found.append(f"--read-data-subset={plan.read_data_subset.text}")
    elif plan.read_data or plan.older_than is not None or plan.max_duration is not None:
        found.append("--read-data")
    if plan.older_than is not None:
        found.append(f"--older-than={plan.older_than.text}")
    if plan.max_duration is not None:
        found.append(f"--max-duration={plan.max_duration.text}")
    return found
