"""The command line: dispatch only. Each command imports its recipe when it is chosen, so that help is instant."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tunesmith.errors import Note, UsageError, UserError

if TYPE_CHECKING:
    from tunesmith.files.run import Run

Argv = Sequence[str]


def _pretrain(argv: Argv) -> None:
    from tunesmith.options.pretraining import PretrainConfig

    config = _training_options(PretrainConfig, argv, "pretrain")
    from tunesmith.commands.pretrain import pretrain

    _told_if_diverged(pretrain(config))


def _sft(argv: Argv) -> None:
    from tunesmith.options.training import SFTConfig

    config = _training_options(SFTConfig, argv, "sft")
    from tunesmith.commands.sft import sft

    _told_if_diverged(sft(config))


def _dpo(argv: Argv) -> None:
    from tunesmith.options.training import DPOConfig

    config = _training_options(DPOConfig, argv, "dpo")
    from tunesmith.commands.dpo import dpo

    _told_if_diverged(dpo(config))


def _reward(argv: Argv) -> None:
    from tunesmith.options.training import RewardConfig

    config = _training_options(RewardConfig, argv, "reward")
    from tunesmith.commands.reward import train_reward_model

    _told_if_diverged(train_reward_model(config))


def _told_if_diverged(run: Run) -> None:
    if run.status["state"] == "diverged":
        raise UserError(run.status["reason"])


def _training_options(options: type[Any], argv: Argv, command: str) -> Any:
    """The options of a training command. With `--resume` the run's own come first, so that only changes need to be given."""
    from tunesmith.files.run import default_directory
    from tunesmith.options.parse import parse

    prog, printed = f"tunesmith {command}", [word for word in argv if word == "--print_config"]
    config, _ = parse(options, [word for word in argv if word not in printed], prog=prog)
    out = config.out or default_directory(command, config.model.name, config.data.name)
    if config.resume and os.path.exists(stored := os.path.join(out, "config.yaml")):
        decided = ["--train.steps", "null"] if config.train.epochs is not None and config.train.steps is None else []
        config, _ = parse(options, ["--config", stored, *decided, *argv], prog=prog)
    elif printed:
        parse(options, argv, prog=prog)  # prints them and exits
    return config


def _data(argv: Argv) -> None:
    from tunesmith.options.commands import DataCommand
    from tunesmith.options.parse import Positional, parse

    options, named = parse(DataCommand, argv, prog="tunesmith data", positionals=[Positional("dataset", "data set")])
    from tunesmith.commands.data import show_data

    show_data(named["dataset"], options)


def _evaluate(argv: Argv) -> None:
    from tunesmith.options.commands import EvaluateCommand
    from tunesmith.options.parse import Positional, parse

    wanted = [Positional("model", "MODEL"), Positional("dataset", "data set")]
    options, named = parse(EvaluateCommand, argv, prog="tunesmith evaluate", positionals=wanted)
    from tunesmith.commands.evaluate import evaluate

    evaluate(named["model"], named["dataset"], options)


def _score(argv: Argv) -> None:
    from tunesmith.options.commands import ScoreCommand
    from tunesmith.options.parse import Positional, parse

    wanted = [Positional("models", "MODELs; RUN@all is every checkpoint of a run", many=True)]
    options, named = parse(ScoreCommand, argv, prog="tunesmith score", positionals=wanted)
    from tunesmith.commands.score import score

    score(named["models"], options)


def _compare(argv: Argv) -> None:
    from tunesmith.options.commands import CompareCommand
    from tunesmith.options.parse import Positional, parse

    wanted = [Positional("a", "one MODEL"), Positional("b", "the other MODEL")]
    options, named = parse(CompareCommand, argv, prog="tunesmith compare", positionals=wanted)
    from tunesmith.commands.compare import compare

    compare(named["a"], named["b"], options)


def _chat(argv: Argv) -> None:
    from tunesmith.options.commands import ChatCommand
    from tunesmith.options.parse import Positional, parse

    example = "`tunesmith chat sample` (the embedded model) or `tunesmith chat runs/NAME` (a run's best checkpoint)"
    wanted = [Positional("model", "MODEL", example=example)]
    options, named = parse(ChatCommand, argv, prog="tunesmith chat", positionals=wanted)
    from tunesmith.commands.chat import chat

    chat(named["model"], options)


def _plan(argv: Argv) -> None:
    from tunesmith.options.parse import parse
    from tunesmith.options.planning import PLANS

    command = argv[0] if argv and argv[0] in PLANS else "sft"
    rest = argv[1:] if argv and argv[0] == command else argv
    if rest and not rest[0].startswith("-"):
        raise UsageError(f"plan {rest[0]}: expected one of {', '.join(PLANS)} (sft where none is given), then options")
    kind: type[Any] = PLANS[command]
    options, _ = parse(kind, rest, prog=f"tunesmith plan {command}")
    from tunesmith.commands.plan import plan

    plan(options)


def _report(argv: Argv) -> None:
    from tunesmith.options.commands import ReportCommand
    from tunesmith.options.parse import Positional, parse

    wanted = [Positional("runs", "run directories, or a study's", many=True)]
    options, named = parse(ReportCommand, argv, prog="tunesmith report", positionals=wanted)
    from tunesmith.study.report import write_report

    print(write_report(named["runs"], options.out))


def _study(argv: Argv) -> None:
    from tunesmith.options.commands import StudyCommand
    from tunesmith.options.parse import Positional, parse

    wanted = [Positional("name", "built-in study (paper) or YAML file")]
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
    "demo": ("the whole chain on the embedded sample, in minutes on two CPU cores", _demo),
    "data": ("build or check a data set; show which tokens carry loss", _data),
    "pretrain": ("a new GPT-2, and its tokenizer, from plain text", _pretrain),
    "sft": ("supervised fine-tuning on dialogues: full or LoRA", _sft),
    "reward": ("train a reward model on preference pairs (Bradley-Terry)", _reward),
    "dpo": ("direct preference optimisation: full or LoRA", _dpo),
    "evaluate": ("loss and perplexity of a model on a data set", _evaluate),
    "score": ("answers to a set of prompts, scored by a reward model, with intervals", _score),
    "compare": ("the same prompts to two models, side by side", _compare),
    "chat": ("talk to a model in the terminal", _chat),
    "plan": ("memory and time of a training before it runs; --fit 16GB finds the settings that fit", _plan),
    "study": ("a matrix of runs from one file (paper is built in); skips what is done, resumes what was cut", _study),
    "report": ("one HTML page of finished runs, or of a study with its verdicts", _report),
}

USAGE = """usage: tunesmith COMMAND [ARGUMENTS] [--option value ...]

Turns a GPT-2-class base model into a dialogue model and measures how good it became.

{commands}

Options are --group.name value; --config FILE.yaml sets the same names (presets: paper/e1, ...); --print_config prints them.
MODEL is a hub name (gpt2-medium), a directory (whole model or LoRA adapter), a run directory, RUN@STEP, or `sample` (embedded).
`tunesmith COMMAND --help` lists a command's options; --debug shows the traceback of an error."""


def usage() -> str:
    """The top-level help."""
    width = max(map(len, COMMANDS))
    return USAGE.format(commands="\n".join(f"  {name:<{width}}  {text}" for name, (text, _) in COMMANDS.items()))


def main(argv: Argv | None = None) -> int:
    """Run one command; returns the exit code: 0 success, 1 failure, 2 wrong usage."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from tunesmith import __version__

        print(__version__)
        return 0
    try:
        if words[0] not in COMMANDS:
            import difflib

            near = difflib.get_close_matches(words[0], COMMANDS, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UsageError(f"unknown command {words[0]!r}.{hint} Commands: {', '.join(COMMANDS)}")
        with _notes_in_one_line():
            COMMANDS[words[0]][1](words[1:])
        return 0
    except (UserError, OSError) as error:
        if debug:
            raise
        print(f"tunesmith: {_told(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("tunesmith: interrupted", file=sys.stderr)
        return 130


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
            errno.ENOSPC: "free some space or name another directory with --out", errno.EROFS: elsewhere, errno.EACCES: elsewhere,
            errno.EEXIST: elsewhere, errno.ENOTDIR: elsewhere, errno.ENOENT: "check the path", errno.EISDIR: "name a file",
        }.get(error.errno or 0, "")  # fmt: skip
        return f"{where}{error.strerror or error}{'; ' + remedy if remedy else ''}"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
