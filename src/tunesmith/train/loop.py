"""The loop that every training command shares: step, log, estimate, save, resume, stop."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol

import torch
from torch.amp import GradScaler
from torch.optim import Optimizer

from tunesmith.device import peak_memory_gb
from tunesmith.errors import Interrupted
from tunesmith.files.run import RunLog
from tunesmith.progress import STOP, Progress
from tunesmith.train.checkpoint import load_state, prune, save_checkpoint
from tunesmith.train.choice import Sums, choice_lines, choose_checkpoint, read_estimates
from tunesmith.train.clock import Mark, mark, seconds_between
from tunesmith.train.divergence import Watch, batches_to_judge_by, broken
from tunesmith.train.method import B
from tunesmith.train.optim import OneByOne, set_learning_rate
from tunesmith.train.outlook import Outlook
from tunesmith.train.splitting import Split, Splitting, step_in_memory
from tunesmith.train.step import StepStats

UNSPOKEN = ("train_accuracy", "_reward", "_drift_chosen", "_drift_rejected")  # metrics that go to the log only
STOPPING = "stopping after this step, with a checkpoint (a running estimate is cut short); a second signal ends at once, without one"


class Readable(Protocol):
    """A step that was launched; `read` waits for it where the device is still at it."""

    def read(self) -> StepStats: ...


@dataclass(frozen=True)
class Launched(Generic[B]):
    """A step that the device was given and that the host has not looked at yet. number: from 1.

    began: the end of the step before where the device went on to this one at once, else the moment of the launch.
    """

    number: int
    batches: Sequence[B]
    lr: float
    began: Mark
    ended: Mark
    seen: Readable


@dataclass
class TrainingState:
    """Where a training stands; stored with each checkpoint."""

    step: int = 0
    tokens: int = 0  # through the model, padding not counted
    examples: int = 0  # what the loss is a mean over: target tokens, or pairs
    judged_on: int = 0  # micro-batches whose loss a divergence is judged by (`divergence.Watch`), as the next three
    loss_before: float | None = None
    look_at: int | None = None
    recent: list[float] = field(default_factory=list)
    best_loss: float | None = None
    lowest_step: int | None = None  # where the validation loss was lowest
    since_lowest: int = 0  # estimates since then
    best_step: int | None = None  # the checkpoint to use
    split_limit: int | None = None  # tokens of the largest micro-batch that fits, where one did not
    split_setup: str = ""  # with this model, precision and device
    owes_estimate: bool = False  # the run was stopped before, or in, the estimate of this step


def fit(
    *,
    log: RunLog,
    device: torch.device,
    write_weights: Callable[[Path], None],
    read_weights: Callable[[Path], None],
    optimizer: Optimizer | OneByOne,
    scaler: GradScaler | None,
    micro_batch: Callable[[int], B],
    take_step: Callable[[Sequence[B]], Readable],
    ahead: bool,
    splitting: Splitting,
    learning_rate: Callable[[int], float],
    evaluate: Callable[[], tuple[dict[str, float], Sums]],
    train_loss: Callable[[int], float],
    describe_rows: Callable[[Sequence[B]], str],
    counted: str,
    observed: Sequence[str] = (),
    opening: Sequence[tuple[str, dict[str, Any]]] = (),
    settle: Callable[[], None],
    reward_at: Callable[[int], dict[str, Any]] | None = None,
    steps: int,
    numbers: Callable[[int], range],
    eval_every: int,
    eval_at_start: bool,
    eval_cost: float = 0.0,
    patience: int | None = None,
    checkpoint_every: int,
    keep: int,
    diverge_after: int,
    resume: bool,
) -> None:
    """Train until `steps`, a divergence, or a signal; status.json says which.

    Args:
        micro_batch: number from 0 -> batch on the device; the same number always gives the same batch.
        numbers: step -> the numbers of its micro-batches; steps follow each other.
        take_step: micro-batches -> `step.optimizer_step` of them, or a step that is read later.
        ahead: launch a step before the one before it is read, so that the device never waits for the host. What is logged,
            saved and decided is the same; `take_step` must leave the weights alone after a step that was not finite.
        splitting: what to do with a micro-batch that does not fit into memory; a resumed run goes on with the limit that it found.
        evaluate: -> metrics, `validation_loss` among them, and that loss batch by batch.
        train_loss: number of micro-batches -> the loss on so many, drawn from all the training rows and always the same.
        describe_rows: says where the rows of the given batches come from, for the message about a divergence.
        write_weights, read_weights: put the model into a checkpoint's directory, and back.
        counted: what the log calls the number of examples that the loss is a mean over.
        observed: names of what a step gives beside the loss.
        opening: (event, values) to log at the very start of a run.
        settle: called once, as soon as a resumed run's checkpoint has turned out to be readable, before the first line is logged.
        reward_at: step -> what to log of the rewards of its answers, which then choose the best checkpoint; without, the
            validation loss does.
        eval_cost: forward passes of an estimate, as many micro-batches as it reads, in times of a step.
        patience: estimates without a lower validation loss after which the training is over.
    """
    state = TrainingState()
    saved = log.run.checkpoints() if resume else []
    if saved:
        stored = load_state(saved[-1][1], read_weights, optimizer, scaler)
        stored["progress"].pop("first_loss", None)  # of an earlier version: on other rows, or of one batch
        state = TrainingState(**stored["progress"])
        for line in log.rewind(state.step):
            print(f"note: {line}")
        if state.split_setup == splitting.setup:  # with other memory or another need of it the limit says nothing
            splitting.limit = state.split_limit
    else:
        log.rewind(None)  # a run that was cut before its first checkpoint begins anew
        for event, values in opening:
            log.record(event, 0, **values)
    settle()

    outlook = Outlook(state.step, steps, eval_every, eval_at_start, eval_cost)
    watch = Watch(diverge_after, state.loss_before, state.look_at, state.recent)
    waiting: deque[Launched[B]] = deque()  # at most two
    trouble, clock = "", device if ahead else torch.device("cpu")  # a step that is read at once is over for the host

    def save() -> None:
        save_checkpoint(log.run, state.step, write_weights, optimizer, {"progress": vars(state)}, scaler)
        prune(log.run, keep, (state.best_step, state.lowest_step))

    def estimate() -> None:
        began = time.perf_counter()
        metrics, parts = evaluate()
        told = {k: v for k, v in metrics.items() if not k.endswith(UNSPOKEN)}
        bar.say(f"step {state.step:,}: " + ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in told.items()))
        found = reward_at(state.step) if reward_at else {}  # before anything is logged: it may be broken off too
        log.record("eval", state.step, **metrics)
        log.keep_losses(state.step, parts)
        outlook.estimate_seconds.append(time.perf_counter() - began)
        loss = metrics["validation_loss"]
        if state.best_loss is None or loss < state.best_loss:
            state.best_loss, state.lowest_step, state.since_lowest = loss, state.step, 0
        else:
            state.since_lowest += 1
        state.best_step = state.lowest_step
        if found:
            log.record("reward", state.step, **found)
            bar.say(f"step {state.step:,}: reward {found['mean']:.3f} ({_bounds(found)}, {found['n']} prompts)")
            chosen = choose_checkpoint(log.run, {state.step, *(step for step, _ in log.run.checkpoints())})
            state.best_step = chosen.best_step if chosen else state.lowest_step

    def tell(split: Split) -> None:
        read_all()  # what was before comes first in the log
        if trouble:
            return
        state.split_limit, state.split_setup = split.limit, splitting.setup
        log.record("split", state.step + 1, tokens=split.failed, limit=split.limit)
        bar.say(f"step {state.step + 1:,}: {split.line}")

    def launch() -> None:
        began, number = waiting[-1].ended if waiting else mark(clock), state.step + len(waiting) + 1
        try:
            batches = [micro_batch(i) for i in numbers(number)]
            lr = learning_rate(number)
            set_learning_rate(optimizer, lr)
            seen = step_in_memory(batches, take_step, optimizer, splitting, tell, device)
        except BaseException as error:
            read_all()
            if trouble and isinstance(error, Exception):
                return  # the run is over before this step
            raise
        if not trouble:
            waiting.append(Launched(number, batches, lr, began, mark(clock), seen))

    def read_one() -> None:
        """Wait for the oldest step and log it; or find that the training has diverged, and forget what came after."""
        done = waiting.popleft()
        stats = done.seen.read()
        if reason := broken(stats, scaler):
            diverged(reason, done.number, loss=stats.loss, grad_norm=stats.grad_norm)
            return
        watch.saw(done.number, stats.loss)
        state.step = done.number
        seconds = seconds_between(done.began, done.ended)
        state.tokens += (tokens := sum(b.tokens for b in done.batches))
        state.examples += stats.count
        state.recent, state.look_at = list(watch.losses), watch.look_at
        log.record(
            "train", state.step, loss=stats.loss, **dict(zip(observed, stats.observed, strict=True)), lr=done.lr,
            grad_norm=stats.grad_norm, tokens=state.tokens, **{counted: state.examples},
            tokens_per_s=round(tokens / seconds, 1), peak_memory_gb=round(peak_memory_gb(device), 3),
        )  # fmt: skip
        bar.advance(state.step, stats.loss, tokens)
        if line := outlook.after_step(seconds):
            bar.say(line)

    def look() -> None:
        """Take the loss that a divergence is judged by, if losses have raised a suspicion. A stop leaves that to the resumed run."""
        if watch.look_at is None or not watch.look_at <= state.step < steps:
            return
        with contextlib.suppress(Interrupted):
            reason = watch.found(loss := train_loss(state.judged_on))
            state.recent, state.look_at = list(watch.losses), watch.look_at
            if reason:
                diverged(reason, state.step, loss=loss)

    def diverged(reason: str, number: int, **seen: float) -> None:
        nonlocal trouble
        lr, where = learning_rate(number), describe_rows([micro_batch(i) for i in numbers(number)])
        trouble = f"{reason} at step {number:,} (rows {where}); lower --optimizer.lr (now {lr:g}) or look at these rows"
        log.record("diverged", number, **seen, lr=lr)
        waiting.clear()

    def read_all() -> None:
        while waiting:
            read_one()

    def pauses(number: int) -> bool:
        """Whether something is to be done between this step and the next."""
        due = number % eval_every == 0 or number % checkpoint_every == 0 or number in (steps, watch.look_at)
        return due or STOP.requested

    def enough() -> bool:
        """Whether patience ends the run before its steps do; where such a run is resumed, that is before another step."""
        return patience is not None and state.since_lowest >= patience and state.step < steps

    def end(kind: str, reason: str = "") -> None:
        choice = choose_checkpoint(log.run, [step for step, _ in log.run.checkpoints()])
        more: dict[str, Any] = {"choice": choice.as_dict()} if choice else {}
        if state.split_limit:
            more["split_limit"] = state.split_limit
        log.status(
            kind,
            state.step,
            reason,
            best_step=state.best_step,
            best_validation_loss=state.best_loss,
            steps=steps,
            **more,
        )
        for line in choice_lines(choice, read_estimates(log.run)) if choice else ():
            bar.say(line)
        bar.say(f"{kind} at step {state.step:,}{': ' + reason if reason else ''}")

    def pause(*, due: bool) -> bool:
        """Between two steps: estimate where that is due, and save; whether the run stops here because it was asked to."""
        if due:
            state.owes_estimate = True
            with contextlib.suppress(Interrupted):
                STOP.check()
                estimate()
                state.owes_estimate = False
        last, stopping = state.step == steps, STOP.requested
        if state.step % checkpoint_every == 0 or last or stopping or enough() or state.best_step == state.step:
            save()
            log.status("running", state.step, steps=steps, best_step=state.best_step)
        if stopping and (state.owes_estimate or not last):
            end("stopped", f"{STOP.reason}; continue it with: {log.run.resume_command}")
            return True
        return False

    log.status("running", state.step, steps=steps, best_step=state.best_step)
    with Progress(steps, state.step) as bar, STOP.catching(STOPPING, last_words=log.ended_at_once):
        if diverge_after and watch.before is None:
            state.judged_on = batches_to_judge_by(numbers(steps)[-1] + 1)
            with contextlib.suppress(Interrupted):
                watch.before = state.loss_before = train_loss(state.judged_on)
        look()
        owed = state.owes_estimate or (not saved and eval_at_start)
        if not trouble and (owed or STOP.requested) and pause(due=owed):
            return
        while state.step < steps and not trouble and not enough():
            if not waiting:
                launch()
            if ahead and waiting and not pauses(waiting[-1].number):
                launch()
            if waiting:
                read_one()
            if not waiting and not trouble:
                look()
            if waiting or trouble:
                continue
            if pause(due=state.step % eval_every == 0 or state.step == steps):
                return
        if diverge_after and not trouble:
            try:
                loss = train_loss(state.judged_on)
            except Interrupted:
                end("stopped", f"{STOP.reason}; continue it with: {log.run.resume_command}")
                return
            if found := watch.found_at_end(loss):
                lr = learning_rate(state.step)
                log.record("diverged", state.step, loss=loss, lr=lr)
                trouble = f"{found} after step {state.step:,}; lower --optimizer.lr (now {lr:g})"
        if trouble:
            end("diverged", trouble)
        elif enough():
            end(
                "finished",
                f"the validation loss has not fallen for {patience} estimates, since step {state.lowest_step:,}",
            )
        else:
            end("finished")


def _bounds(found: dict[str, Any]) -> str:
    return "no interval" if found["low"] is None else f"{found['low']:.3f} to {found['high']:.3f}"
