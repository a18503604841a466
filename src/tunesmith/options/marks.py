"""What a resumed run may change. The mark stands at the option: `field(default=..., metadata=OPEN)`; an option without one is closed.

A closed option that differs from the run's config.yaml is refused by name, or with `--resume_changes accept` recorded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from tunesmith.errors import UsageError

HISTORY = "history"  # the key under which config.yaml keeps what was changed on the way

Mark = Literal["closed", "open", "rounding", "content", "length", "as begun", "fixed"]

OPEN: Mapping[str, Mark] = {"resume": "open"}
"""Changes no number of the training: every later step is bit-identical, or (kinds of DPO reference) equal up to rounding."""
ROUNDING: Mapping[str, Mark] = {"resume": "rounding"}
"""Equal up to rounding as long as a step draws no random numbers; closed with dropout or bf16 weights."""
CONTENT: Mapping[str, Mark] = {"resume": "content"}
"""Names something whose content is compared: a file that has moved is not a change, a different file under the old name is."""
LENGTH: Mapping[str, Mark] = {"resume": "length"}
"""May be raised where the learning rate does not depend on it (a constant schedule): the steps already taken stay valid."""
AS_BEGUN: Mapping[str, Mark] = {"resume": "as begun"}
"""Closed; if left out, it keeps the run's first value, even where the default would now differ (different train.steps)."""

FIXED: Mapping[str, Mark] = {"resume": "fixed"}
"""Closed even with accept: the checkpoint's contents would not fit."""


@dataclasses.dataclass(frozen=True)
class Marked:
    """An option of a configuration with its mark. name: dotted, as on the command line."""

    name: str
    mark: Mark
    default: Any
    value: Any


def marked_options(config: Any) -> Iterator[Marked]:
    """Every option of a configuration that its config.yaml holds: those in groups. What stands outside (out, resume) is not stored."""
    for group in dataclasses.fields(config):
        options = getattr(config, group.name)
        if dataclasses.is_dataclass(options):
            for option in dataclasses.fields(options):
                mark = option.metadata.get("resume", "closed")
                factory = option.default_factory
                default = option.default if factory is dataclasses.MISSING else factory()
                yield Marked(f"{group.name}.{option.name}", mark, default, getattr(options, option.name))


def checked_history(value: Any, where: str) -> list[dict[str, Any]]:
    """What config.yaml keeps of accepted changes, {"step", "option", "from", "to"} each; none where nothing was changed.

    Raises: UsageError naming the file if somebody has edited it into something else.
    """
    keys = {"step", "option", "from", "to"}
    entries = [] if value is None else value
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, dict) or entry.keys() != keys or type(entry["step"]) is not int:
            raise UsageError(f"{where}: {HISTORY} is a list of {{step, option, from, to}}, not {entry!r}; take it out")
    return list(entries)
