"""The command line: dispatch only. Each command imports its recipe when it is chosen, so that help is instant."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import Interrupted, Note, UsageError, UserError, did_you_mean
from tunesmith.progress import STOP
from tunesmith.train.methods.table import ABOUT, METHODS

if TYPE_CHECKING:
    from tunesmith.files.run import Run

Argv = Sequence[str]
# A step of a GPT-2 on a CPU uses about 15: forward, backward and both gradients of four layers and the head.
KERNELS_KEPT = "24"


def _train(command: str, argv: Argv) -> None:
    method = METHODS[command]
    config = _training_options(method.config, argv, command)
    from tunesmith.commands.training import train

    _finish(train(method, config), command)


def _finish(run: Run, command: str) -> None:
    """Say how to go on from the end of a training. Raises: UserError if it has diverged; BrokenPipeError if nobody reads it."""
    from tunesmith.commands.next_steps import next_steps

    if STOP.unread:
        raise BrokenPipeError
    if run.status["state"] == "diverged":
        raise UserError(run.status["reason"])
    for line in next_steps(run, command):
        print(line)


def _training_options(options: type[Any], argv: Argv, command: str) -> Any:
    """The options of a training command. With `--resume` the run's own come first, so that only changes need to be given."""
    from tunesmith.data.mixture import parse_sets
    from tunesmith.files.lock import default_directory
    from tunesmith.files.run import check_command
    from tunesmith.options.parse import parse

    prog, printed = f"tunesmith {command}", [word for word in argv if word == "--print_config"]
    config, _ = parse(options, [word for word in argv if word not in printed], prog=prog)
    sets = [name for name, _ in parse_sets(config.data.name)]
    out = Path(config.out or default_directory(command, config.model.name, sets))
    if config.resume and (stored := out / "config.yaml").exists():
        check_command(out, command)  # before its options are read, which may be none of this command's
        config, _ = parse(options, ["--config", str(stored), *argv], prog=prog)
    elif printed:
        parse(options, argv, prog=prog)  # prints them and exits
    return config


def _data(argv: Argv) -> None:
    from tunesmith.options.commands import DataCommand
    from tunesmith.options.parse import parse
    from tunesmith.options.shortforms import Positional

    options, named = parse(
        DataCommand, argv, prog="tunesmith data", positionals=[Positional("dataset", "a data set", option="data")]
    )
    from tunesmith.commands.data import show_data

    show_data(named["dataset"], options)


def _evaluate(argv: Argv) -> None:
    from tunesmith.options.commands import EvaluateCommand
    from tunesmith.options.parse import parse
    from tunesmith.options.shortforms import Positional

    wanted = [Positional("model", "a MODEL", option="model"), Positional("dataset", "a data set", option="data")]
    options, named = parse(EvaluateCommand, argv, prog="tunesmith evaluate", positionals=wanted)
    from tunesmith.commands.evaluate import evaluate

    evaluate(named["model"], named["dataset"], options)


def _score(argv: Argv) -> None:
    from tunesmith.options.commands import ScoreCommand
    from tunesmith.options.parse import parse
    from tunesmith.options.shortforms import Positional

    wanted = [Positional("models", "MODELs (RUN@all is every checkpoint of a run)", many=True, option="model")]
    options, named = parse(ScoreCommand, argv, prog="tunesmith score", positionals=wanted)
    from tunesmith.commands.score import score

    score(named["models"], options)


def _compare(argv: Argv) -> None:
    from tunesmith.options.commands import CompareCommand
    from tunesmith.options.parse import parse
    from tunesmith.options.shortforms import Positional

    wanted = [Positional("a", "one MODEL"), Positional("b", "the other MODEL")]
    options, named = parse(CompareCommand, argv, prog="tunesmith compare", positionals=wanted)
    from tunesmith.commands.compare import compare

    compare(named["a"], named["b"], options)


def _chat(argv: Argv) -> None:
    from tunesmith.options.commands import ChatCommand
    from tunesmith.options.parse import parse
    from tunesmith.options.shortforms import Positional

    wanted = [Positional("model", "a MODEL", option="model")]
    options, named = parse(ChatCommand, argv, prog="tunesmith chat", positionals=wanted)
    from tunesmith.commands.chat import chat

    chat(named["model"], options)


def _plan(argv: Argv) -> None:
    from tunesmith.options.parse import parse
    from tunesmith.options.plans import plan_options

    command = argv[0] if argv and argv[0] in METHODS else "sft"
    rest = argv[1:] if argv and argv[0] == command else argv
    if rest and not rest[0].startswith("-"):
        near = did_you_mean(rest[0], METHODS)
        raise UsageError(
            f"plan {rest[0]}: expected one of {', '.join(METHODS)} (sft if none is given), then options{near}"
        )
    options, _ = parse(plan_options(METHODS[command].config), rest, prog=f"tunesmith plan {command}")
    from tunesmith.commands.plan import plan

    plan(options)


def _report(argv: Argv) -> None:
    from tunesmith.options.commands import ReportCommand
    from tunesmith.options.parse import parse
    from tunesmith.options.shortforms import Positional

    wanted = [Positional("runs", "run directories, or a study's", many=True)]
    options, named = parse(ReportCommand, argv, prog="tunesmith report", positionals=wanted)
    from tunesmith.study.report import write_report

    print(write_report(named["runs"], options.out))


def _study(argv: Argv) -> None:
    from tunesmith.options.commands import StudyCommand
    from tunesmith.options.parse import parse
    from tunesmith.options.shortforms import Positional

    wanted = [Positional("name", "a built-in study (paper) or a YAML file")]
    options, named = parse(StudyCommand, argv, prog="tunesmith study", positionals=wanted)
    from tunesmith.commands.study import study

    study(named["name"], options)


def _demo(argv: Argv) -> None:
    from tunesmith.options.commands import DemoCommand
    from tunesmith.options.parse import parse

    options, _ = parse(DemoCommand, argv, prog="tunesmith demo")
    from tunesmith.commands.demo import demo

    demo(options)


COMMANDS: dict[str, tuple[str, Callable[[Argv], None]]] = {
    "demo": ("the whole chain on SmolLM2 or an embedded model, in minutes on a CPU", _demo),
    "data": ("build or check a data set; show which tokens carry loss", _data),
    "plan": ("memory and time of a training run in advance; --fit finds what fits", _plan),
    **{command: (about, partial(_train, command)) for command, about in ABOUT.items()},
    "chat": ("talk to a model in the terminal", _chat),
    "compare": ("the same prompts to two models, side by side", _compare),
    "evaluate": ("loss and perplexity of a model on a data set; on pairs, accuracy", _evaluate),
    "score": ("answers to a set of prompts, scored by a reward model", _score),
    "study": ("a matrix of runs from one file (paper is built in)", _study),
    "report": ("one HTML page for finished runs, or for a study with its verdicts", _report),
}

GROUPS = {
    "look before you train": ("demo", "data", "plan"),
    "train": tuple(METHODS),
    "use and judge a model": ("chat", "compare", "evaluate", "score"),
    "many runs": ("study", "report"),
}

USAGE = """usage: tunesmith COMMAND [ARGUMENTS] [--option value ...]

Turns a small base model (SmolLM2, Llama, Qwen, GPT-2, ...) into a dialogue
model and measures the result.

first steps (offline, a few minutes on two CPU cores):
  tunesmith data sample --show 2
  tunesmith sft --model sample --data sample --train.steps 60 --out runs/first
  tunesmith compare sample runs/first --limit 5
  tunesmith chat runs/first

{commands}
MODEL is a hub name (gpt2-medium), a directory (whole model or LoRA adapter), a
run directory (its best checkpoint), RUN@STEP, a .gguf file, `smollm2` (its
weights dequantised from 4 bits), or `sample` (embedded).
`tunesmith COMMAND --help` shows an example and the common options,
`--help all` every option; --debug shows the traceback of an error."""


def usage() -> str:
    """The top-level help."""
    width = max(map(len, COMMANDS))
    lines = []
    for group, names in GROUPS.items():
        lines += [f"{group}:", *(f"  {name:<{width}}  {COMMANDS[name][0]}" for name in names), ""]
    return USAGE.format(commands="\n".join(lines))


def main(argv: Argv | None = None) -> int:
    """Run one command; returns the exit code.

    0 success, 1 failure, 2 wrong usage, 128 + its number for a signal (130 for Ctrl-C), 141 if nobody reads the output.
    """
    if argv is None:  # a process of ours, in which nothing has loaded torch yet
        _keep_few_kernels()
    for stream in (sys.stdout, sys.stderr):  # a character that the terminal's encoding lacks is no reason to stop
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            code = _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()  # here, where what is wrong can be caught, not at the interpreter's end
        return code
    except (OSError, SystemExit) as error:
        # rich turns a broken pipe into SystemExit
        cause = error.__context__ if isinstance(error, SystemExit) else error
        if not isinstance(cause, OSError):
            raise
        _discard_output()
        if isinstance(cause, BrokenPipeError):
            return 128 + 13  # as a shell says of a program that SIGPIPE ended
        with contextlib.suppress(OSError):
            print(f"tunesmith: the output cannot be written: {cause.strerror}", file=sys.stderr, flush=True)
        return 1


def _keep_few_kernels() -> None:
    """Bound what the CPU's kernels take, where the user has not: each shape has its own, about a megabyte of code and notes.

    oneDNN and torch's layer over it keep those of the last 1,024 shapes each, and dialogues bring new shapes with every step
    and every prompt. They read these variables once and have no other setting.
    """
    for names in (("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"), ("LRU_CACHE_CAPACITY",)):
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = KERNELS_KEPT


def _discard_output() -> None:
    """Send what is still to be written nowhere: whoever read it has gone, or the disk is full."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _main(words: list[str]) -> int:
    """As `main`; whatever cannot be printed is raised."""
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if words[:1] == ["help"] and words[1:]:  # as git has it
        words = [*words[1:], "--help"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from tunesmith import __version__

        print(__version__)
        return 0
    try:
        if words[0] not in COMMANDS:
            near = did_you_mean(words[0], COMMANDS)
            raise UsageError(f"unknown command {words[0]!r}{near or '.'} Commands: {', '.join(COMMANDS)}")
        # a conversation has signals of its own: there Ctrl-C stops an answer
        with _notes_in_one_line(), contextlib.nullcontext() if words[0] == "chat" else STOP.catching(exits=True):
            COMMANDS[words[0]][1](words[1:])
        return 0
    except BrokenPipeError:
        raise
    except (UserError, OSError) as error:
        if debug:
            raise
        print(f"tunesmith: {_told(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt as error:
        by = f" ({error})" if isinstance(error, Interrupted) and error.number != signal.SIGINT else ""
        print(f"tunesmith: interrupted{by}", file=sys.stderr)
        return error.code if isinstance(error, Interrupted) else 128 + signal.SIGINT


@contextlib.contextmanager
def _notes_in_one_line() -> Iterator[None]:
    """Inside, a `Note` is printed without the place in our code that gave it."""
    plain = warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
        return f"note: {message}\n" if issubclass(category, Note) else plain(message, category, *place, **more)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = plain


def _told(error: Exception) -> str:
    """The error in one line; what the system says of a file or disk gets the file's name and a way out."""
    if isinstance(error, OSError) and not isinstance(error, UserError):
        where = f"{error.filename}: " if error.filename else ""
        elsewhere = "name a writable directory with --out"
        remedy = {
            errno.ENOSPC: "free some space or name another directory with --out",
            errno.EROFS: elsewhere,
            errno.EACCES: elsewhere,
            errno.EEXIST: elsewhere,
            errno.ENOTDIR: elsewhere,
            errno.ENOENT: "check the path",
            errno.EISDIR: "name a file",
        }.get(error.errno or 0, "")
        return f"{where}{error.strerror or error}{'; ' + remedy if remedy else ''}"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
