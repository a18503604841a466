"""Command line and YAML files to frozen dataclasses. jsonargparse reads both; here its errors become one line each."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar

import yaml

from tunesmith.errors import UsageError

PRESETS = Path(__file__).parent / "presets"
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Positional:
    """An argument without a dash. many: one or more of them."""

    name: str
    help: str
    many: bool = False


def parse(
    options: type[T], argv: Sequence[str], *, prog: str, positionals: Sequence[Positional] = ()
) -> tuple[T, dict[str, Any]]:
    """The options and positional arguments on a command line.

    `--config FILE` (repeatable, later wins; a preset's name works too) and `--group.name value` set the same names.
    `--print_config` prints the resulting file and exits with 0, `--help` prints the help.
    Raises: UsageError in one line, with the nearest right name for a wrong one.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    doc = (options.__doc__ or "").strip()
    parser = jsonargparse.ArgumentParser(
        prog=prog, description=doc, exit_on_error=False, default_env=False, add_help=True
    )
    parser.usage = f"{prog} {' '.join(p.name.upper() + (' ...' if p.many else '') for p in positionals)} [--option value ...]".replace(
        "  ", " "
    )
    for positional in positionals:
        more: dict[str, Any] = {"nargs": "+"} if positional.many else {}
        parser.add_argument(positional.name, type=str, help=positional.help, **more)
    parser.add_argument("--config", action="config", help="YAML file or preset (paper/e1, ...); repeatable, later wins")
    parser.add_class_arguments(options)
    argv = [
        preset_path(word) if before == "--config" else word for before, word in zip(["", *argv], argv, strict=False)
    ]
    argv = [f"--config={preset_path(word[9:])}" if word.startswith("--config=") else word for word in argv]
    argv = _bare_switches(options, argv)
    show = "--print_config" in argv
    try:
        parsed = parser.parse_args([word for word in argv if word != "--print_config"])
        built = parser.instantiate_classes(parsed)
    except jsonargparse.ArgumentError as error:
        files = [
            word.removeprefix("--config=")
            for before, word in zip(["", *argv], argv, strict=False)
            if "--config" in (before, word.split("=")[0])
        ]
        raise UsageError(_one_line(str(error), options, ", ".join(f for f in files if f != "--config"))) from None
    config = options(**{f.name: built[f.name] for f in dataclasses.fields(options)})  # type: ignore[arg-type]
    if show:
        print(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False), end="")  # type: ignore[call-overload]
        raise SystemExit(0)
    return config, {p.name: built[p.name] for p in positionals}


def preset_path(name: str) -> str:
    """A file's own name, or the path of the preset of that name. Raises: UsageError listing the presets."""
    if Path(name).exists():
        return name
    preset = PRESETS / f"{name}.yaml"
    if preset.is_file():
        return str(preset)
    known = sorted(str(p.relative_to(PRESETS).with_suffix("")) for p in PRESETS.rglob("*.yaml"))
    raise UsageError(
        f"--config {name}: no such file, and no such preset{_nearest(name, known)}; presets: {', '.join(known)}"
    )


def _bare_switches(options: type[Any], argv: Sequence[str]) -> list[str]:
    """`--resume` means `--resume true`."""
    switches = {f"--{name}" for name, kind in option_types(options).items() if kind is bool}
    following = [*argv[1:], "--"]
    return [
        f"{word}=true" if word in switches and after.startswith("--") else word
        for word, after in zip(argv, following, strict=True)
    ]


def option_types(options: type[Any], prefix: str = "") -> dict[str, Any]:
    """Dotted option name -> its type."""
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(options).items():
        if dataclasses.is_dataclass(kind):
            found |= option_types(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            found[prefix + name] = kind
    return found


def _one_line(message: str, options: type[Any], files: str) -> str:
    """jsonargparse's message as cause and remedy in one line. files: the configuration files that were given."""
    types = option_types(options)
    if unknown := re.match(r"unrecognized arguments: (.*)", message):
        words = [w.split("=")[0] for w in unknown[1].split() if w.startswith("--")]
        if not words:
            return f"unexpected argument {unknown[1]!r}"
        return f"unknown option {words[0]}{_nearest(words[0].lstrip('-'), list(types), '--')}"
    if unknown := re.search(r"(?:Group '([\w.]+)' does not accept option|[Oo]ption|[Kk]ey) '([\w.]+)'", message):
        group = unknown[1] or ""
        name = f"{group}.{unknown[2].removeprefix(group + '.')}".lstrip(".")
        return f'{files or "configuration"}: unknown key "{name}"{_nearest(name, list(types))}'
    if message.startswith("Problems parsing config"):
        return f"{files}: not valid YAML ({' '.join(message.partition(':')[2].split())})"
    if wrong := re.search(r'Parser key "([\w.]+)"', message):
        given = re.search(r"Given value: (.*)", message) or re.search(r"Got value: (.*)", message)
        value = given[1] if given else "as given"
        expected = (
            f"expected {describe_type(types[wrong[1]])}" if wrong[1] in types else message.split("\n")[-1].strip()
        )
        return f"--{wrong[1]} {value}: {expected}"
    return " ".join(message.split())


def describe_type(kind: Any) -> str:
    """A type in words: `a number`, `auto, true or false`."""
    words: list[str] = []
    for part in typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, UnionType) else [kind]:
        if typing.get_origin(part) is Literal:
            words += map(str, typing.get_args(part))
        else:
            plain = {
                int: ["a whole number"],
                float: ["a number"],
                bool: ["true", "false"],
                str: ["text"],
                type(None): ["null"],
            }
            words += plain.get(part, [str(part)])
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    tails = {k.rsplit(".", 1)[-1]: k for k in known}
    tail = name.rsplit(".", 1)[-1]
    close = (
        [tails[tail]] if tail in tails else difflib.get_close_matches(name, known, 1, 0.5)
    )  # first: right name, wrong group
    return f". Did you mean {prefix}{close[0]}?" if close else ""
