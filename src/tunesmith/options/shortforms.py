"""Short forms on a command line: `--model X` for `--model.name X`, and for the argument MODEL of the commands that have one."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from tunesmith.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Positional:
    """An argument without a dash. many: one or more of them. option: its other name, `model` where --model gives it too."""

    name: str
    help: str
    many: bool = False
    option: str = ""


def option_groups(options: type[Any]) -> dict[str, set[str]]:
    """Group of options -> the options in it."""
    kinds = typing.get_type_hints(options).items()
    return {name: {f.name for f in dataclasses.fields(kind)} for name, kind in kinds if dataclasses.is_dataclass(kind)}


def expand_groups(options: type[Any], argv: Sequence[str], positionals: Sequence[Positional] = ()) -> list[str]:
    """`--model X` as `--model.name X`, for every group that has a name; what names an argument is left to `expand_positionals`.

    Raises: UsageError if both forms differ, if X is a YAML file, or if a group without a name is given a value.
    """
    arguments = {p.option for p in positionals}
    groups = {
        name: inside for name, inside in option_groups(options).items() if name not in arguments or "name" in inside
    }
    expanded = list(argv)
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        group = flag.removeprefix("--")
        if not flag.startswith("--") or group not in groups:
            continue
        if not equals:
            value = argv[i + 1] if i + 1 < len(argv) else ""
        if Path(value).suffix in (".yaml", ".yml"):
            raise UsageError(
                f"{flag} {value}: a file of options is given with --config {value} (its groups are {', '.join(groups)}); "
                f"{flag} takes {'a name' if 'name' in groups[group] else 'no value'}"
            )
        if "name" not in groups[group]:
            some = ", ".join(f"{flag}.{name}" for name in sorted(groups[group])[:3])
            raise UsageError(f"{flag} is a group of options ({some}, ...); give one of them")
        refuse_two(flag, value, f"{flag}.name", values_of(argv, f"{flag}.name"))
        expanded[i] = f"{flag}.name{equals}{value if equals else ''}"
    return expanded


def expand_positionals(argv: Sequence[str], positionals: Sequence[Positional]) -> list[str]:
    """`chat --model X` as `chat X`: arguments that are given by their option in their place, after all options.

    argv: options as `--name value` or `--name=value`, switches as `--name=true`.
    Raises: UsageError if an argument is given in both ways and they differ.
    """
    flags = {flag: p for p in positionals if p.option for flag in (f"--{p.option}", f"--{p.option}.name")}
    options, words, given = [], [], dict[str, list[str]]()
    rest = iter(argv)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag in flags:
            given.setdefault(flags[flag].name, []).append(value if equals else next(rest, ""))
        elif not word.startswith("--"):
            words.append(word)
        else:
            options += [word] if equals or word == "--print_config" else [word, *islice(rest, 1)]
    return [*options, *_in_place(words, given, positionals)] if given else list(argv)


def _in_place(words: list[str], given: Mapping[str, list[str]], positionals: Sequence[Positional]) -> list[str]:
    """The arguments in their order; `given`: those that came as options."""
    both = len(words) >= len(positionals) and not any(p.many for p in positionals)
    found: list[str] = []
    for p in positionals:
        own = words[:] if p.many else words[:1] if both or p.name not in given else []
        del words[: len(own)]
        if own and not p.many:
            refuse_two(p.name.upper(), own[0], f"--{p.option}", given.get(p.name, []))
        found += [*own, *given.get(p.name, [])] if p.many else own or given.get(p.name, [])[-1:]
    if words:
        options = " and ".join(f"--{p.option} {given[p.name][-1]}" for p in positionals if p.name in given)
        raise UsageError(f"unexpected argument {words[0]!r} beside {options}; give each only once")
    return found


def values_of(argv: Sequence[str], flag: str) -> list[str]:
    """What an option is set to, in order."""
    apart = [value for word, value in pairwise(argv) if word == flag]
    return apart + [word.partition("=")[2] for word in argv if word.startswith(f"{flag}=")]


def refuse_two(first: str, value: str, second: str, others: Sequence[str]) -> None:
    """Raises: UsageError naming both if something is given in two ways that differ."""
    for other in others:
        if other != value:
            raise UsageError(f"{first} {value} and {second} {other} name two different things; give one of them")
