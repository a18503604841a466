"""Command line and YAML files to frozen dataclasses. jsonargparse reads both; here its errors become one line each."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar

import yaml

from tunesmith.errors import UsageError, did_you_mean, path_meant
from tunesmith.options.beside import placed
from tunesmith.options.help import PAGES, asked_for_help, help_text
from tunesmith.options.marks import HISTORY, checked_history
from tunesmith.options.shortforms import Positional, expand_groups, expand_positionals
from tunesmith.options.yamlfile import read_yaml

ARGUMENT = "argument-"  # before an argument's name for the parser: `model` is a group of options too
PRESETS = Path(__file__).parents[1] / "presets"
T = TypeVar("T")
ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "gradient_accumulation_steps": "train.accumulate",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "per_device_train_batch_size": "train.batch_size",
    "max_length": "data.block_size",
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "loss_type": "dpo.loss",
}
"""What options are called in transformers and TRL."""


def parse(
    options: type[T], argv: Sequence[str], *, prog: str, positionals: Sequence[Positional] = ()
) -> tuple[T, dict[str, Any]]:
    """The options and positional arguments on a command line.

    `--config FILE` (repeatable, later wins; a preset's name works too) and `--group.name value` set the same names;
    `--group value` is short for `--group.name value`, as `--model X`.
    `--print_config` prints the resulting file and exits with 0, so does `--help` with the help.
    Raises: UsageError in one line, with the nearest right name for a wrong one.
    """
    if help_asked := asked_for_help(argv):
        print(help_text(options, prog, positionals, every=help_asked == "all"))
        raise SystemExit(0)
    import jsonargparse

    argv, files, replaced = _read_files(options, argv)
    argv = _bare_switches(options, _repeated(options, _underscored(options, expand_groups(options, argv, positionals))))
    argv = [*expand_positionals(argv, positionals), *(f"--{name}=null" for name in replaced)]
    parser = _parser(options, prog, positionals)
    show = "--print_config" in argv
    try:
        parsed = parser.parse_args([word for word in argv if word != "--print_config"])
        built = parser.instantiate(parsed)
    except jsonargparse.ArgumentError as error:
        raise UsageError(_told(str(error), options, files, prog, positionals)) from None
    config = options(**{f.name: built[f.name] for f in dataclasses.fields(options)})  # type: ignore[arg-type]
    if not (show or getattr(config, "resume", False)):  # a resumed run's own length is in no file that its user wrote
        for name in replaced:
            print(
                f"note: {name} of a configuration file does not count, as {LENGTHS[1 - LENGTHS.index(name)]} was given after it"
            )
    if HISTORY in built and not (show or config.resume):  # type: ignore[attr-defined]
        _tell_history(built[HISTORY], files)
    if show:
        print(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False), end="")  # type: ignore[call-overload]
        raise SystemExit(0)
    return config, {p.name: built[ARGUMENT + p.name] for p in positionals}


def _parser(options: type[Any], prog: str, positionals: Sequence[Positional]) -> Any:
    """jsonargparse's, without its help."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        prog=prog, exit_on_error=False, default_env=False, add_help=False, allow_abbrev=False
    )
    for positional in positionals:
        more: dict[str, Any] = {"nargs": "+"} if positional.many else {}
        parser.add_argument(ARGUMENT + positional.name, type=str, **more)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(options)
    if "resume" in option_types(options):  # config.yaml of a run that was changed on its way says so; that is no option
        parser.add_argument(f"--{HISTORY}", type=Any, default=None, help=argparse.SUPPRESS)
    return parser


LENGTHS = ("train.steps", "train.epochs")
"""Two ways to set the length: the one given later, or on the command line, counts."""


def later_length(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted name, those of later layers counting; one that says how long takes away what an earlier one said of it."""
    merged: dict[str, Any] = {}
    for layer in layers:
        if any(layer.get(name) is not None for name in LENGTHS):
            merged |= {name: None for name in LENGTHS if name in merged}
        merged |= layer
    return merged


def _lengths_of(content: Any) -> dict[str, Any]:
    """What the content of a file says of LENGTHS."""
    given = content | {f"train.{key}": value for key, value in (content.get("train") or {}).items()}
    return {name: given[name] for name in LENGTHS if name in given}


def _read_files(options: type[Any], argv: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """The command line with presets as their paths, and files with lists as text; the files' names for messages; and which of
    LENGTHS a file sets although a later one, or the command line, sets the other.

    Raises: UsageError if a file cannot be read or holds no options.
    """
    if any(word.split("=")[0] == f"--{HISTORY}" for word in argv):
        raise UsageError(f"unknown option --{HISTORY}")
    found, files, layers = [], [], list[Mapping[str, Any]]()
    for before, word in zip(["", *argv], argv, strict=False):
        in_one = word.startswith("--config=")
        if before == "--config" or in_one:
            file = preset_path(word.removeprefix("--config=") if in_one else word)
            files.append(file)
            content, text = _check_file(file, options)
            layers.append(_lengths_of(content))
            word = ("--config=" if in_one else "") + (text or file)
        found.append(word)
    here = [name for name in LENGTHS if any(word.split("=")[0] == f"--{name}" for word in argv)]
    together = later_length(*layers, dict.fromkeys(here, 0))
    replaced = [
        name for name in LENGTHS if name not in here and together.get(name) is None and any(x.get(name) for x in layers)
    ]
    return found, ", ".join(files), replaced


def _tell_history(history: Any, files: str) -> None:
    """What repeating a run that was changed on its way does not repeat. Raises: UsageError if it is none."""
    for entry in checked_history(history, files):
        print(
            f"note: {files}: {entry['option']} was {entry['from']!r} up to step {entry['step']:,} and {entry['to']!r} after it; "
            "a run from this file uses the last value from its first step on and does not repeat the change"
        )


def from_settings(options: type[T], settings: Mapping[str, Any], where: str) -> T:
    """Options from dotted names and values that a file holds; what is not named keeps its default.

    Raises: UsageError in one line that begins with `where`, for a value of the wrong type; the names are taken as known.
    """
    import jsonargparse

    nested: dict[str, Any] = {}
    for name, value in settings.items():
        group, _, key = name.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[key] = joined(value)
    parser = jsonargparse.ArgumentParser(exit_on_error=False, default_env=False)
    parser.add_class_arguments(options)
    try:
        built = parser.instantiate(parser.parse_object(nested))
    except jsonargparse.ArgumentError as error:
        raise UsageError(f"{where}: {_one_line(str(error), options, where).removeprefix('--')}") from None
    return options(**{f.name: built[f.name] for f in dataclasses.fields(options)})  # type: ignore[arg-type]


def preset_path(name: str) -> str:
    """A file's own name, or the path of the preset of that name. Raises: UsageError listing the presets."""
    if Path(name).exists():
        return name
    preset = PRESETS / f"{name}.yaml"
    if preset.is_file():
        return str(preset)
    known = sorted(str(p.relative_to(PRESETS).with_suffix("")) for p in PRESETS.rglob("*.yaml"))
    raise UsageError(
        f"--config {name}: no such file, and no such preset"
        f"{path_meant(Path(name)) or did_you_mean(name, known) or '.'} Presets: {', '.join(known)}"
    )


def _underscored(options: type[Any], argv: Sequence[str]) -> list[str]:
    """`--judge-model` means `--judge_model`, as people from other command lines write it."""
    known = {f"--{name}" for name in option_types(options)}
    found = []
    for word in argv:
        name, equals, value = word.partition("=")
        plain = f"--{name[2:].replace('-', '_')}"
        found.append(f"{plain}{equals}{value}" if word.startswith("--") and plain in known else word)
    return found


def _bare_switches(options: type[Any], argv: Sequence[str]) -> list[str]:
    """`--resume` means `--resume true`, also before another argument: `compare --logprobs A B`."""
    switches = {f"--{name}" for name, kind in option_types(options).items() if kind is bool}
    return [
        f"{word}=true" if word in switches and after.lower() not in ("true", "false") else word
        for word, after in pairwise([*argv, "--"])
    ]


def _repeated(options: type[Any], argv: Sequence[str]) -> list[str]:
    """`--against A --against B` means both: jsonargparse's `--against+=A`."""
    lists = {f"--{name}" for name, kind in option_types(options).items() if typing.get_origin(kind) is list}
    words = [word.replace("=", "+=", 1) if word.split("=")[0] in lists and "=" in word else word for word in argv]
    return [f"{word}+" if word in lists else word for word in words]


def joined(value: Any) -> Any:
    """A YAML list as the text that it is on the command line, `a,b`; a mapping as `a=b`; anything else as it is."""
    if isinstance(value, list) and value and all(isinstance(v, str | int | float) for v in value):
        return ",".join(map(str, value))
    if isinstance(value, dict):
        return ",".join(f"{key}={'' if v is None else v}" for key, v in value.items())
    return value


def _check_file(file: str, options: type[Any]) -> tuple[dict[str, Any], str]:
    """What a file holds, and what to read in its place where that differs: a list or a mapping for an option that is a text, or
    a path that leads somewhere from the file's directory (`placed`); else "".

    Raises: UsageError if it is no YAML of groups of options; what they hold is checked later.
    """
    try:
        with Path(file).open(encoding="utf-8") as text:
            content = read_yaml(text, file, exponents=False)  # from the file, so that errors name it
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 text ({error.reason}); save it as UTF-8"
        raise UsageError(f"--config {file}: {reason}. Give a YAML file as --print_config prints it") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from None
    groups = {name.split(".")[0] for name in option_types(options) if "." in name}
    if not isinstance(content, dict):
        raise UsageError(f"{file}: expected groups of options, as --print_config prints them")
    for group in groups & content.keys():
        if not isinstance(content[group], dict):
            raise UsageError(
                f'{file}: "{group}" is a group of options, as --print_config prints them, not {content[group]!r}'
            )
    changed = False
    for name, kind in option_types(options).items():
        group, _, key = name.rpartition(".")
        holder, key = (content, name) if name in content else (content.get(group, {}) if group else content, key)
        value = joined(holder.get(key)) if kind in (str, str | None) else holder.get(key)
        value = placed({name: value}, Path(file).parent)[name]
        if key in holder and value != holder[key]:
            holder[key], changed = value, True
    return content, yaml.safe_dump(content, sort_keys=False) if changed else ""


def option_types(options: type[Any], prefix: str = "") -> dict[str, Any]:
    """Dotted option name -> its type."""
    types: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(options).items():
        if dataclasses.is_dataclass(kind):
            types |= option_types(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            types[prefix + name] = kind
    return types


def _told(message: str, options: type[Any], files: str, prog: str, positionals: Sequence[Positional]) -> str:
    """An error of the command line in one line; where an argument is missing, with a command that has it."""
    command = prog.removeprefix("tunesmith ")
    for p in positionals:
        if re.search(rf"arguments are required: .*\b{p.name}\b", message) and command in PAGES:
            wanted = " and ".join(q.help for q in positionals if re.search(rf"\b{q.name}\b", message))
            return f"{command} needs {wanted}: `{'` or `'.join(PAGES[command].examples)}`"
    if not positionals and (extra := re.match(r"unrecognized arguments: ([^-\s]\S*)", message)):
        return f"unexpected argument {extra[1]!r}: options need names, as in `{prog} --model {extra[1]}`"
    return _one_line(message, options, files)


def _one_line(message: str, options: type[Any], files: str) -> str:
    """jsonargparse's message as cause and remedy in one line. files: the configuration files that were given."""
    types = option_types(options)
    if unknown := re.match(r"unrecognized arguments: (.*)", message):
        words = [w.split("=")[0] for w in unknown[1].split() if w.startswith("--")]
        if not words:
            return f"unexpected argument {unknown[1]!r}"
        return f"unknown option {words[0]}{nearest(words[0].lstrip('-'), list(types), '--')}"
    if unknown := re.search(r"(?:Group '([\w.]+)' does not accept option|[Oo]ption|[Kk]ey) '([\w.]+)'", message):
        group = unknown[1] or ""
        name = f"{group}.{unknown[2].removeprefix(group + '.')}".lstrip(".")
        return f'{files or "configuration"}: unknown key "{name}"{nearest(name, list(types))}'
    if wrong := re.search(r'Parser key "([\w.]+)"', message):
        given = re.search(r"Given value: (.*)", message) or re.search(r"Got value: (.*)", message)
        value = given[1] if given else "as given"
        expected = (
            f"expected {describe_type(types[wrong[1]])}" if wrong[1] in types else message.split("\n")[-1].strip()
        )
        return f"--{wrong[1]} {value}: {expected}{nearest_choice(types.get(wrong[1]), value.strip())}"
    return " ".join(message.split())


def parts_of(kind: Any) -> list[Any]:
    """The types of which a value may be one: itself, or those of a union."""
    return list(typing.get_args(kind)) if typing.get_origin(kind) in (typing.Union, UnionType) else [kind]


def _choices(kind: Any) -> list[str]:
    """The words that an option of this type can be set to; none where it takes any text."""
    return [
        str(word) for part in parts_of(kind) if typing.get_origin(part) is Literal for word in typing.get_args(part)
    ]


def nearest_choice(kind: Any, value: Any) -> str:
    """`. Did you mean packed?` for a word like one of the choices; else ""."""
    return did_you_mean(str(value), _choices(kind))


def describe_type(kind: Any) -> str:
    """A type in words: `a number`, `auto, true or false`."""
    words: list[str] = []
    for part in parts_of(kind):
        if typing.get_origin(part) is Literal:
            words += map(str, typing.get_args(part))
        else:
            plain = {
                int: ["a whole number"],
                float: ["a number"],
                bool: ["true", "false"],
                str: ["text"],
                type(None): ["null"],
                list[str]: ["a list of strings"],
            }
            words += plain.get(part, [str(part)])
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    """The right name that was probably meant: a slip, the right name in the wrong group, or another tool's name."""
    tails = {k.rsplit(".", 1)[-1]: k for k in known} | {a: k for a, k in ELSEWHERE.items() if k in known}
    tail = difflib.get_close_matches(name.rsplit(".", 1)[-1], tails, 1, 0.8)
    close = [
        *difflib.get_close_matches(name, known, 1, 0.85),
        *(tails[t] for t in tail),
        *difflib.get_close_matches(name, known, 1, 0.5),
    ]
    return f". Did you mean {prefix}{close[0]}?" if close else ""
