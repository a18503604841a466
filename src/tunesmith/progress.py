"""Progress of long work: a bar with rate and time left in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Shows what is done of `total`, loss, tokens a second and time left. Without a terminal: one line every ten seconds."""

    def __init__(self, total: int, done: int = 0, unit: str = "step") -> None:
        self.unit = unit
        self.total, self.first = total, done
        self.began = self.told = time.monotonic()
        self.tokens = 0
        self.smooth: float | None = None
        self.console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self.bar: RichProgress | None = None
        if self.console.is_terminal:
            text = (
                TextColumn(f"[bold]{unit}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            self.bar = RichProgress(*text, console=self.console)
            self.task = self.bar.add_task("train", total=total, completed=done, note="")

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, step: int, loss: float | None, tokens: int) -> None:
        """`step` of them are done now, the last with this many tokens."""
        self.tokens += tokens
        if loss is not None:
            self.smooth = loss if self.smooth is None else 0.9 * self.smooth + 0.1 * loss
        now = time.monotonic()
        rate = self.tokens / max(1e-9, now - self.began)
        speed = f"{rate:,.0f} tokens/s" if self.tokens else ""
        note = f"{'' if self.smooth is None else f'loss {self.smooth:.3f}  '}{speed}"
        if self.bar:
            self.bar.update(self.task, completed=step, note=note)
        elif now - self.told >= 10:
            self.told = now
            left = (now - self.began) / max(1, step - self.first) * (self.total - step)
            self.say(f"{self.unit} {step:,}/{self.total:,}  {note}  {left / 60:.1f} min left")

    def say(self, line: str) -> None:
        """A line that stays."""
        (self.bar.console if self.bar else self.console).print(line, markup=False)
