"""The loop that every training shares, as an object: `Training`. It writes the run's log, checkpoints and status.

The way of a step:

    numbers     Timetable.numbers       which micro-batches belong to it
    batches     Task.micro_batch        each made by its number, on a GPU ahead of time in a thread (`prefetch`)
    launch      Launcher.launch         forward and backward of each micro-batch, division by the count of the whole step, clipping,
                                        update (`step`); where memory ends, again in smaller ones (`halving`)
    read        Training._read_oldest   wait for its numbers; if they are not finite, the run has diverged
    log         Training._log           a line of metrics.jsonl, the bar
    look        Training._look          has the training made its model worse? Only where losses have raised a suspicion
    pause       Training._pause         where due: estimate, save; stop if asked to

On a GPU the next step is launched before the last one is read, so at most two are outstanding. Nothing after `log` is done
while one is: weights, random state and log then belong to the same step, and a run that is read late is, to the bit, the run
that is read at once.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from tunesmith.device import peak_memory_gb, return_freed_memory
from tunesmith.errors import Interrupted
from tunesmith.files.run import RunLog
from tunesmith.progress import STOP, Progress
from tunesmith.train.checkpoint import load_state, prune, save_checkpoint
from tunesmith.train.choice import Choice, choice_lines, choose_checkpoint, read_estimates
from tunesmith.train.clock import seconds_between
from tunesmith.train.course import Timetable, TrainingState
from tunesmith.train.divergence import Watch, batches_to_judge_by, broken, sound_steps
from tunesmith.train.halving import Halved
from tunesmith.train.launch import Launched, Launcher
from tunesmith.train.outlook import Outlook
from tunesmith.train.step import StepStats
from tunesmith.train.task import Sampled, Task
from tunesmith.train.trainee import Trainee

UNSPOKEN = ("train_accuracy", "_reward", "_drift_chosen", "_drift_rejected")  # metrics that go to the log only
STOPPING = "stopping after this step, with a checkpoint (a running estimate is cut short); a second signal ends at once, without one"


def fit(
    log: RunLog,
    task: Task,
    timetable: Timetable,
    launcher: Launcher,
    trainee: Trainee,
    *,
    resume: bool,
    settle: Callable[[], None],
) -> None:
    """Train until the last step, a divergence, patience or a signal; status.json says which.

    resume: go on from the newest checkpoint, if there is one.
    settle: called once, as soon as that checkpoint has turned out to be readable, before the first line is logged.
    """
    checkpoints = log.run.checkpoints() if resume else []
    if checkpoints:
        stored = load_state(checkpoints[-1][1], trainee.read, launcher.optimizer, launcher.scaler)
        stored["progress"].pop("first_loss", None)  # of an earlier version: on other rows, or of one batch
        state = TrainingState(**stored["progress"])
        for line in log.rewind(state.step):
            print(f"note: {line}")
        if state.split_setup == launcher.halving.setup:  # else the limit was another memory's
            launcher.halving.limit = state.split_limit
    else:
        state = TrainingState(owes_estimate=timetable.eval_at_start)
        log.rewind(None)  # a run that was cut before its first checkpoint begins anew
        for event, values in task.opening:
            log.record(event, 0, **values)
    settle()
    Training(log, task, timetable, launcher, trainee, state).run()


class Training:
    """A training on its way from where `state` stands. `run` is all there is to call.

    trouble: why it has diverged, "" while it has not; diverged_at: the step that showed it.
    stopped: a signal has ended it, and the status says so.
    """

    def __init__(
        self, log: RunLog, task: Task, timetable: Timetable, launcher: Launcher, trainee: Trainee, state: TrainingState
    ) -> None:
        self.log, self.task, self.timetable, self.launcher, self.trainee = log, task, timetable, launcher, trainee
        self.state = state
        self.watch = Watch(timetable.diverge_after, state.loss_before, state.look_at, state.recent)
        t = timetable
        self.outlook = Outlook(state.step, t.steps, t.eval_every, t.eval_at_start, t.eval_cost)
        self.bar = Progress(timetable.steps, state.step)
        self.waiting: deque[Launched] = deque()  # launched and not read, oldest first; at most two
        self.sampled: Sampled = []  # an estimate and the loss that the same step is judged by share what they compute
        self.trouble, self.diverged_at, self.stopped = "", 0, False

    def run(self) -> None:
        """Train to the end, whatever that is; status.json then tells it."""
        self._report_running()
        with self.bar, STOP.catching(STOPPING, last_words=self.log.ended_at_once):
            self._measure_start()
            self._look()
            owed = self.state.owes_estimate
            if not self.trouble and (owed or STOP.requested):
                self._pause(estimating=owed)
            while self._goes_on():
                self._advance()
                if self.waiting or self.trouble:
                    continue
                self._look()
                if not self.trouble:
                    self._pause(estimating=self.timetable.estimates_after(self.state.step))
            if not self.stopped:
                self._finish()

    def _goes_on(self) -> bool:
        return self.state.step < self.timetable.steps and not (self.trouble or self.stopped or self._patience_is_over())

    def _patience_is_over(self) -> bool:
        """Whether patience ends the run before its steps do; where such a run is resumed, that is before another step."""
        patience = self.timetable.patience
        return patience is not None and self.state.since_lowest >= patience and self.state.step < self.timetable.steps

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Read one step, with another one launched behind it where the device would have nothing to do meanwhile."""
        if not self.waiting:
            self._launch()
        if self.launcher.ahead and self.waiting and not self._pauses_after(self.waiting[-1].number):
            self._launch()
        if self.waiting:  # a launch that failed has read them all
            self._read_oldest()

    def _pauses_after(self, number: int) -> bool:
        """Whether something is to be done between this step and the next."""
        due = self.timetable.estimates_after(number) or self.timetable.saves_after(number)
        return due or number == self.watch.look_at or STOP.requested

    def _launch(self) -> None:
        """Give the device the next step. Raises: whatever making its batches or taking it does."""
        began = self.waiting[-1].ended if self.waiting else self.launcher.now()
        number = self.state.step + len(self.waiting) + 1
        self.sampled.clear()  # of the weights before this step
        try:
            batches = [self.task.micro_batch(i) for i in self.timetable.numbers(number)]
            lr = self.timetable.learning_rate(number)
            launched = self.launcher.launch(number, batches, lr, began, self._report_halved)
        except BaseException as error:
            self._read_all()  # the steps before this one were taken and belong in the log, whatever happened to it
            if self.trouble and isinstance(error, Exception):
                return  # the run was over before this step: what went wrong in it is nobody's concern
            raise
        if not self.trouble:  # halving has read the steps before, and one of them may have diverged
            self.waiting.append(launched)

    def _report_halved(self, halved: Halved) -> None:
        """A micro-batch of the step that is being launched did not fit, and will be tried in parts."""
        self._read_all()  # what was before comes first in the log
        if self.trouble:
            return
        state = self.state
        state.split_limit, state.split_setup = halved.limit, self.launcher.halving.setup
        self.log.record("split", state.step + 1, tokens=halved.failed, limit=halved.limit)
        self.bar.say(f"step {state.step + 1:,}: {halved.line}")

    def _read_all(self) -> None:
        while self.waiting:
            self._read_oldest()

    def _read_oldest(self) -> None:
        """Wait for the oldest step and log it; or find that the training has diverged, and forget what came after."""
        done = self.waiting.popleft()
        stats = done.result.read()
        if reason := broken(stats, self.launcher.scaler):
            self._diverged_at(done.number, reason, loss=stats.loss, grad_norm=stats.grad_norm)
            return
        self.watch.take(done.number, stats.loss)
        self._log(done, stats)

    def _log(self, done: Launched, stats: StepStats) -> None:
        state, task = self.state, self.task
        seconds = seconds_between(done.began, done.ended)
        tokens = sum(b.tokens for b in done.batches)
        state.step, state.tokens, state.examples = done.number, state.tokens + tokens, state.examples + stats.count
        observed = dict(zip(task.observed, stats.observed, strict=True))
        line = {"loss": stats.loss, **observed, "lr": done.lr, "grad_norm": stats.grad_norm, "tokens": state.tokens}
        line |= {task.counted: state.examples, "tokens_per_s": round(tokens / seconds, 1)}
        self.log.record("train", state.step, **line, peak_memory_gb=round(peak_memory_gb(self.launcher.device), 3))
        self.bar.advance(state.step, stats.loss, tokens)
        if outlook := self.outlook.after_step(seconds):
            self.bar.say(outlook)

    # ---- divergence --------------------------------------------------------------------------------------------------

    def _measure_start(self) -> None:
        """Take the loss before the first step, against which a divergence is judged; after a stop the resumed run does."""
        if not self.timetable.diverge_after or self.watch.before is not None:
            return
        state = self.state
        state.judged_on = batches_to_judge_by(self.timetable.micro_batches)
        with contextlib.suppress(Interrupted):
            self.watch.before = state.loss_before = self._judged_loss()

    def _judged_loss(self) -> float:
        """The loss by which a divergence is judged. Raises: Interrupted."""
        return self.task.train_loss(self.state.judged_on, self.sampled)

    def _look(self) -> None:
        """Take the loss that a divergence is judged by, if losses have raised a suspicion. A stop leaves that to the resumed run."""
        watch, step = self.watch, self.state.step
        if watch.look_at is None or not watch.look_at <= step < self.timetable.steps:  # `_finish` looks after the last
            return
        with contextlib.suppress(Interrupted):
            loss = self._judged_loss()
            if reason := watch.judge(loss):
                self._diverged_at(step, reason, loss=loss)

    def _diverged_at(self, number: int, reason: str, **observed: float) -> None:
        """A step, or the look after it, has shown a divergence: the run ends, and what was launched since counts for nothing."""
        batches = [self.task.micro_batch(i) for i in self.timetable.numbers(number)]
        place = f"at step {number:,} (rows {self.task.describe_rows(batches)})"
        self._diverged(number, f"{reason} {place}", " or look at these rows", **observed)
        self.waiting.clear()

    def _diverged(self, number: int, reason: str, or_else: str = "", **observed: float) -> None:
        lr, self.diverged_at = self.timetable.learning_rate(number), number
        self.log.record("diverged", number, **observed, lr=lr)
        way_out = f"lower --optimizer.lr (now {lr:g}){or_else}"
        if self._began_broken():
            before = f"the loss was {self.watch.before:g} before the first step already"
            way_out = f"{before}: look at the weights it began with"
            if (precision := self.log.run.config["train"]["precision"]) != "fp32":
                way_out += f", or use --train.precision fp32 (now {precision})"
        self.trouble = f"{reason}; {way_out}"

    def _began_broken(self) -> bool:
        """Whether the loss was not finite before any weight had moved: then neither rate nor step is at fault."""
        return self.watch.before is not None and not math.isfinite(self.watch.before)

    # ---- between two steps -------------------------------------------------------------------------------------------

    def _pause(self, *, estimating: bool) -> None:
        """Estimate where that is due, save, and stop where that was asked for. Nothing is outstanding."""
        state, step = self.state, self.state.step
        if estimating:
            state.owes_estimate = True  # what is saved if a stop cuts it short
            with contextlib.suppress(Interrupted):
                STOP.check()
                self._estimate()
                state.owes_estimate = False
        stopping, last = STOP.requested, step == self.timetable.steps
        if self.timetable.saves_after(step) or stopping or self._patience_is_over() or state.best_step == step:
            self._save()
        if stopping and (state.owes_estimate or not last):
            self._stop()

    def _estimate(self) -> None:
        """Losses on fixed rows, and where asked for the rewards of answers. Raises: Interrupted, with nothing logged."""
        state, iters, began = self.state, self.timetable.eval_iters, time.perf_counter()
        shared = min(len(self.sampled), iters)
        metrics, parts = self.task.evaluate(self.sampled)
        spared = (time.perf_counter() - began) * shared / (2 * iters - shared)  # the next estimates share nothing
        spoken = {k: v for k, v in metrics.items() if not k.endswith(UNSPOKEN)}
        self._say(", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in spoken.items()))
        rewards = self.task.reward_at(state.step) if self.task.reward_at else {}  # may be broken off too: log after it
        self.log.record("eval", state.step, **metrics)
        self.log.keep_losses(state.step, parts)
        self.outlook.estimate_seconds.append(time.perf_counter() - began + spared)
        state.take_estimate(metrics["validation_loss"])
        if rewards:
            self.log.record("reward", state.step, **rewards)
            self._say(f"reward {rewards['mean']:.3f} ({_bounds(rewards)}, {rewards['n']} prompts)")
            chosen = choose_checkpoint(self.log.run, {state.step, *self._saved_steps()})
            state.best_step = chosen.best_step if chosen else state.lowest_step
        return_freed_memory()  # other sizes than a step's leave holes in the heap that its tensors do not fit

    def _save(self) -> None:
        state, launcher = self.state, self.launcher
        state.take_watch(self.watch)
        progress = {"progress": vars(state)}
        save_checkpoint(self.log.run, state.step, self.trainee.write, launcher.optimizer, progress, launcher.scaler)
        prune(self.log.run, self.timetable.keep, (state.best_step, state.lowest_step))
        self._report_running()

    def _saved_steps(self) -> list[int]:
        return [step for step, _ in self.log.run.checkpoints()]

    def _say(self, what: str) -> None:
        self.bar.say(f"step {self.state.step:,}: {what}")

    def _report_running(self) -> None:
        steps, best_step = self.timetable.steps, self.state.best_step
        self.log.status("running", self.state.step, steps=steps, best_step=best_step)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """All steps are taken, patience is over, or the training has diverged, which may only be found now."""
        if self.timetable.diverge_after and not self.trouble:
            try:
                loss = self._judged_loss()
            except Interrupted:
                self._stop()
                return
            if reason := self.watch.judge_end(loss):
                self._diverged(self.state.step, f"{reason} after step {self.state.step:,}", loss=loss)
        if self.trouble:
            self._end_diverged()
        elif self._patience_is_over():
            patience, since = self.timetable.patience, self.state.lowest_step
            reason = f"the validation loss has not fallen for {patience} estimates, since step {since:,}"
            self._end("finished", reason, self._choice())
        else:
            self._end("finished", "", self._choice())

    def _stop(self) -> None:
        self.stopped = True
        reason = f"{STOP.reason}; continue it with: {self.log.run.resume_command}"
        self._end("stopped", reason, self._choice())

    def _choice(self) -> Choice | None:
        return choose_checkpoint(self.log.run, self._saved_steps())

    def _end_diverged(self) -> None:
        """The checkpoint of a step that showed the divergence is the newest, and may be the only one: it is never the one to use."""
        run, state, estimates = self.log.run, self.state, read_estimates(self.log.run)
        sound = sound_steps(estimates, state.loss_before, self.diverged_at).intersection(self._saved_steps())
        choice = choose_checkpoint(run, sound, among=sound)
        state.best_step = choice.best_step if choice else None
        state.best_loss = min((e.validation_loss for e in estimates if e.step in sound), default=None)
        if choice:
            way_out = f"the best checkpoint from before is that of step {choice.best_step:,}"
        elif self.trainee.base and not self._began_broken():
            way_out = f"it has no good checkpoint: go on from {run.config['model']['name']}, with which it began"
        else:
            way_out = "it has no good checkpoint"
        self._end("diverged", f"{self.trouble}; {way_out}", choice)

    def _end(self, kind: str, reason: str, choice: Choice | None) -> None:
        """Write the last status and say it, with the checkpoint to use."""
        state = self.state
        optional: dict[str, Any] = {"choice": choice.as_dict()} if choice else {}
        if state.split_limit:
            optional["split_limit"] = state.split_limit
        best = {"best_step": state.best_step, "best_validation_loss": state.best_loss}
        self.log.status(kind, state.step, reason, **best, steps=self.timetable.steps, **optional)
        for line in choice_lines(choice, read_estimates(self.log.run), self.log.run) if choice else ():
            self.bar.say(line)
        # A divergence is shown by a step that counts for nothing, after the last that does: its reason names it.
        ended = kind if kind == "diverged" else f"{kind} at step {state.step:,}"
        self.bar.say(f"{ended}{': ' + reason if reason else ''}")


def _bounds(rewards: dict[str, Any]) -> str:
    return "no interval" if rewards["low"] is None else f"{rewards['low']:.3f} to {rewards['high']:.3f}"
