"""How long a training will take, reported after its third step."""

from __future__ import annotations

from dataclasses import dataclass, field

from tunesmith.progress import span

FIRST, TOLD_AFTER = 1, 3  # the first step compiles, allocates and warms caches: it tells nothing of the others


@dataclass
class Outlook:
    """What the steps and estimates of this process have taken, and what those to come will.

    begun_at: the step that it began with, 0 unless the run is resumed. forwards: of an estimate, in times of a step's
    micro-batch: its time where none was made yet.
    """

    begun_at: int
    steps: int
    eval_every: int
    eval_at_start: bool
    forwards: float
    step_seconds: list[float] = field(default_factory=list)
    estimate_seconds: list[float] = field(default_factory=list)

    def after_step(self, seconds: float) -> str:
        """Hear of a step; after the third, what to say of the whole, or of a resumed run of what is left. Else nothing."""
        self.step_seconds.append(seconds)
        if len(self.step_seconds) != TOLD_AFTER or self.begun_at + TOLD_AFTER >= self.steps:
            return ""
        measured = self.step_seconds[FIRST:]
        step = sum(measured) / len(measured)
        made = self.estimate_seconds
        estimates = self.estimates() * (sum(made) / len(made) if made else step * self.forwards)
        whole = sum(self.step_seconds[:FIRST]) + (self.steps - self.begun_at - FIRST) * step + estimates
        what = "left" if self.begun_at else "in all"
        share = f", {span(max(1.0, estimates))} of it for estimates" if estimates else ""
        return f"about {span(max(1.0, whole))} {what}{share}"

    def estimates(self) -> int:
        """How many this process makes: with the one of step 0 where that is asked for, and always with one of the last step."""
        of_steps = -(-self.steps // self.eval_every) - self.begun_at // self.eval_every
        return of_steps + (self.eval_at_start and self.begun_at == 0)
