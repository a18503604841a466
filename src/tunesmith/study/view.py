"""The one live view of a whole study: what runs, what is left, how long it will take. Plain lines where nobody watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tunesmith.files.run import Run
from tunesmith.progress import span
from tunesmith.study.ledger import DONE, Ledger
from tunesmith.study.matrix import directory_of

SAID_EVERY = 30.0  # seconds between two plain lines
DRAWN_EVERY = 0.5
STYLE = {"finished": "green", "diverged": "yellow", "failed": "red", "stopped": "yellow"}


class View:
    """Draws a ledger. left: -> seconds that the study will still take, or None; names: the runs that were asked for."""

    def __init__(
        self, ledger: Ledger, names: Sequence[str], left: Callable[[], float | None], console: Console | None = None
    ) -> None:
        self.ledger, self.names, self.left = ledger, list(names), left
        self.console = console or Console(soft_wrap=True, highlight=False)
        self.where: dict[str, str] = {}
        self.said_at = self.drawn = time.monotonic()
        # drawn by hand: a thread of its own would stand in the way of starting processes
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None

    def __enter__(self) -> View:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.live:
            self.live.stop()

    def say(self, line: str, style: str = "") -> None:
        """A line that stays."""
        self.console.print(Text(line, style=style))

    def started(self, name: str, where: str, resumed: bool) -> None:
        """A run has begun."""
        self.where[name] = where
        if not self.live:
            self.say(f"{name}: {'continues' if resumed else 'starts'}{f' on {where}' if where else ''}")

    def ended(self, name: str) -> None:
        """A run has ended."""
        entry = self.ledger.runs[name]
        done, state = self.ledger.count(self.names, *DONE), entry["state"]
        reason = f": {entry['reason']}" if entry["reason"] else ""
        self.say(
            f"{name}: {state} after {span(entry['seconds'])}{reason} ({done} of {len(self.names)} done)",
            STYLE.get(state, ""),
        )
        self.said_at = time.monotonic()

    def tick(self) -> None:
        """Called often; draws when it is time to."""
        now = time.monotonic()
        if self.live and now - self.drawn >= DRAWN_EVERY:
            self.drawn = now
            self.live.update(self.draw(), refresh=True)
        elif not self.live and now - self.said_at >= SAID_EVERY:
            self.said_at = now
            for name in self.running():
                step, steps, loss = Run(self.ledger.out / directory_of(name)).position()
                self.say(f"{name}: step {step:,}/{steps:,}{'' if loss is None else f', loss {loss:.3f}'}")
            self.say(self.summary())

    def running(self) -> list[str]:
        """The runs whose processes live now."""
        return [name for name in self.names if self.ledger.state(name) == "running"]

    def summary(self) -> str:
        """`7 of 26 done, 1 running, 18 waiting; about 4.2 min left`."""
        count, names = self.ledger.count, self.names
        parts = [f"{count(names, *DONE)} of {len(names)} done"]
        parts += [f"{n} {state}" for state in ("running", "waiting", "failed", "stopped") if (n := count(names, state))]
        left = self.left()
        return ", ".join(parts) + ("" if left is None else f"; about {span(left)} left")

    def draw(self) -> RenderableType:
        """The summary and one line a running run."""
        table = Table.grid(padding=(0, 2))
        for name in self.running():
            step, steps, loss = Run(self.ledger.out / directory_of(name)).position()
            spent = span(time.time() - self.ledger.runs[name]["started"])
            note = f"step {step:,}/{steps:,}" + ("" if loss is None else f"  loss {loss:.3f}") if steps else "preparing"
            bar = ProgressBar(total=max(1, steps), completed=step, width=24)
            table.add_row(
                Text(name), bar, Text(note), Text(spent, style="dim"), Text(self.where.get(name, ""), style="dim")
            )
        return Group(Text(self.summary(), style="bold"), table)
