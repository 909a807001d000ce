"""Decide which steps of a profile are due, from the profile and its record. Without I/O.

A step is due again when its period has passed since it last succeeded; a step that failed is due at the
next run. A period may be a tenth shorter than it says, because a timer fires at a random time within its
window: `every = "1d"` beside a daily timer means each run.
"""

from __future__ import annotations

from dataclasses import dataclass

from casfs.config.profiles import Profile
from casfs.config.values import Duration
from casfs.run.outcome import StepName
from casfs.run.state import ProfileState

_TOLERANCE = 0.9


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step of a profile; it is due in `waits_s` seconds, or now if that is 0."""

    step: StepName
    target: str | None = None
    waits_s: float = 0.0

    @property
    def key(self) -> str:
        """Return the name of the step in the record of the profile."""
        return f"{self.step} {self.target}" if self.target is not None else str(self.step)


def plan_steps(profile: Profile, state: ProfileState, now_s: float) -> list[PlannedStep]:
    """Return the steps of a profile in their order, due or not."""
    steps = [PlannedStep(StepName.BACKUP)]
    if profile.keep is not None:
        steps.append(PlannedStep(StepName.FORGET))
    if profile.prune_every is not None:
        steps.append(_periodic(StepName.PRUNE, profile.prune_every, state, now_s))
    if profile.check is not None:
        steps.append(_periodic(StepName.CHECK, profile.check.every, state, now_s))
    return steps + [PlannedStep(StepName.MIRROR, target) for target in profile.mirror_to]


def _periodic(
    step: StepName, every: Duration | None, state: ProfileState, now_s: float
) -> PlannedStep:
    record = state.steps.get(step)
    if every is None or record is None or record.last_success_s is None or record.exit:
        return PlannedStep(step)
    if record.last_success_s > now_s:
        # The clock was set back. A time in the future does not delay the step.
        return PlannedStep(step)
    return PlannedStep(
        step, None, max(0.0, record.last_success_s + every.seconds * _TOLERANCE - now_s)
    )
