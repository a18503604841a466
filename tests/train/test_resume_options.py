"""Every option of a resumed run in turn: it changes nothing in the steps that follow, or it is refused by name."""

import dataclasses
import json
import shutil
import typing
from typing import Literal

import pytest

import tunesmith as ts
from tiny_runs import comparable, last_digest, tiny_config, train_losses, write_dialogues
from tunesmith.__main__ import main
from tunesmith.errors import UserError
from tunesmith.options.marks import marked_options
from tunesmith.options.parse import option_types
from tunesmith.options.pretraining import PretrainConfig
from tunesmith.options.training import DPOConfig, RewardConfig, SFTConfig
from tunesmith.train.resolve import as_dict
from tunesmith.train.resuming import as_begun, option_changes

SHORT = {
    "train__steps": 2, "checkpoint__every": 1, "eval__every": 2, "eval__iters": 1, "train__grad_clip": 0.0, "data__max_rows": 30,
    "data__block_size": 64,
}  # fmt: skip
LONGER = {**SHORT, "train__steps": 4}
NOT_HERE = {
    "train.compile": "takes a compiler half a minute",
    "train.device": "this machine has one",
}  # held below, without a run
WORDS = {  # options that are any text
    "lora.targets": "mlp.c_fc", "data.root": "elsewhere", "data.rm_static": "elsewhere", "eval.prompts": "prompts.txt",
    "eval.reward": "judge", "dpo.reference_device": "cpu", "dpo.sft_data": "sample", "tokenizer.name": "gpt2",
    "data.truncation": "keep_start", "chat.template": "hh",
}  # fmt: skip
CHANGES_NOTHING = {
    "sft": {
        "model.base", "data.root", "data.rm_static", "data.allow_missing", "train.steps", "train.activation_checkpointing",
        "train.optimizer_in_backward", "train.allocator", "checkpoint.every", "checkpoint.keep",
    },
    "dpo": {"dpo.reference", "dpo.reference_device"},
}  # fmt: skip
NEVER = {  # with --resume_changes accept neither: what does not fit, and what needs another option beside it
    "sft": {
        "model.name", "data.strict", "optimizer.name", "lora.rank", "lora.alpha", "lora.targets", "train.epochs", "train.cuda_graphs",
        "eval.reward", "eval.prompts", "eval.samples", "eval.max_new_tokens", "data.columns", "data.config",
    },
    "dpo": set(),
}  # fmt: skip
WITH_IT = {"data.name": ["train rows", "test rows"], "dpo.sft_data": ["sft_data rows"]}


def another(kind, name, value):
    """Some other value of an option."""
    if name in WORDS:
        return WORDS[name]
    if name == "model.init":
        return "random"
    parts = [part for part in (typing.get_args(kind) or (kind,)) if part is not type(None)]
    choices = [c for part in parts if typing.get_origin(part) is Literal for c in typing.get_args(part)]
    choices = choices or (list(parts) if typing.get_origin(kind) is Literal else [])
    choices += [True, False] if bool in parts or kind is bool else []
    if others := [c for c in reversed(choices) if c not in (value, "auto", "windows")]:
        return others[0]
    if parts == [str]:
        return f"{value}-2"
    if float in parts:
        return (value or 0.2) / 2
    return 32 if value == "auto" else (value or 1) + 1


def cut_back(run, out, step):
    """A copy of a run as it was when it was killed after a step, with the checkpoint of that step only."""
    shutil.copytree(run.path, out)
    for later, path in (cut := ts.Run(out)).checkpoints():
        if later != step:
            shutil.rmtree(path)
    (out / "status.json").write_text(json.dumps({"state": "running", "step": step, "reason": ""}))
    return cut


def refusal(train, config):
    """What a training says instead of beginning; None where it ran."""
    try:
        train(config)
    except UserError as error:
        return str(error)
    return None


def test_every_option_of_a_run_in_turn_changes_nothing_or_is_refused(tiny_directory, tmp_path):
    (tmp_path / "prompts.txt").write_text("Hello\n")
    other = tmp_path / "other.jsonl"
    write_dialogues(other, [(f"Is {n} odd?", "Perhaps. " * (n % 7 + 1)) for n in range(60)])
    names = {
        "data.name": str(other), "model.name": "sample", "train.steps": 5, "dpo.loss": "ipo", "dpo.reference": "model",
    }  # fmt: skip
    for kind, command, train in ((SFTConfig, "sft", ts.sft), (DPOConfig, "dpo", ts.dpo)):
        whole = train(tiny_config(tiny_directory, tmp_path / f"{command}-whole", kind, **LONGER))
        losses = train_losses(whole)
        begun = cut_back(whole, tmp_path / f"{command}-begun", 2)
        types, changes_nothing, never = option_types(kind), set(), set()
        stored = {
            option.name: begun.config[(p := option.name.split("."))[0]][p[1]] for option in marked_options(kind())
        }
        for number, (name, before) in enumerate(stored.items()):
            if name in NOT_HERE or (kind is DPOConfig and not name.startswith("dpo.")):
                continue  # the same classes as for sft
            value = names[name] if name in names else another(types[name], name, before)
            assert value != before, name
            run = shutil.copytree(begun.path, tmp_path / f"{command}-{number}")
            config = tiny_config(tiny_directory, run, kind, resume=True, **{**LONGER, name.replace(".", "__"): value})
            untouched = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
            refused = refusal(train, config)
            if refused is None:
                assert train_losses(ts.Run(run))[:4] == pytest.approx(losses, rel=1e-5), (name, value)
                changes_nothing.add(name)
            else:
                assert name in refused
                assert untouched == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
                accepted = refusal(train, dataclasses.replace(config, resume_changes="accept"))
                if accepted is None:
                    assert [e["option"] for e in ts.Run(run).metrics("changed")] == [name, *WITH_IT.get(name, ())]
                    assert len(train_losses(ts.Run(run))) == 4
                else:
                    never.add(name)
            shutil.rmtree(run)
        assert (changes_nothing, never) == (CHANGES_NOTHING[command], NEVER[command])


@pytest.mark.parametrize("kind", [SFTConfig, DPOConfig, RewardConfig, PretrainConfig])
def test_an_option_without_a_mark_is_closed(tmp_path, kind):
    """So is any option that somebody adds without a thought for resumed runs."""
    config = kind()
    stored, types = as_dict(config), option_types(kind)
    closed = {option.name for option in marked_options(config) if option.mark in ("closed", "as begun", "fixed")}
    assert closed
    for name in closed:
        group, option = name.split(".")
        value = another(types[name], name, stored[group][option])
        changed = dataclasses.replace(getattr(config, group), **{option: value})
        found, _ = option_changes(dataclasses.replace(config, **{group: changed}), stored, same_content=True, base=True)
        assert [change.option for change in found] == [name]
        assert f"{name} was {stored[group][option]!r}, now {value!r}" in found[0].words


@dataclasses.dataclass(frozen=True)
class OneMore(type(SFTConfig().train)):
    """The training loop"""

    tomorrow: int = 3
    """An option of a later version."""


def test_what_a_run_does_not_know_counts_as_its_default():
    """A run of an earlier version, whose config.yaml has no line for the option."""
    config = dataclasses.replace(SFTConfig(), train=OneMore())
    stored = as_dict(SFTConfig())
    assert option_changes(config, stored, same_content=True, base=True) == ([], [])
    config = dataclasses.replace(SFTConfig(), train=OneMore(tomorrow=4))
    (change,), _ = option_changes(config, stored, same_content=True, base=True)
    assert change.words == "train.tomorrow was 3, now 4"


@pytest.mark.parametrize(
    "draws", [{}, {"model__dropout": 0.1}, {"lora__dropout": 0.1, "lora__rank": 2}, {"train__weights": "bf16"}]
)
def test_device_and_compiler_may_change_as_long_as_no_random_numbers_are_drawn(tmp_path, draws):
    config = tiny_config("m", tmp_path, train__compile=False, **draws)
    stored = as_dict(config)
    now = tiny_config("m", tmp_path, train__compile=True, train__device="cuda:1", **draws)
    changes, notes = option_changes(now, stored, same_content=True, base=True)
    told = (
        [change.words for change in changes]
        if draws
        else [note.removesuffix(", which gives the same result up to rounding") for note in notes]
    )
    assert told == ["train.compile was False, now True", "train.device was 'cpu', now 'cuda:1'"]
    assert bool(changes) == bool(draws)


def test_what_was_left_to_the_program_stays_as_it_decided_then(tmp_path):
    begun = as_dict(tiny_config("m", tmp_path, train__precision="bf16", eval__every=7, data__loss_on="all"))
    config = as_begun(SFTConfig(), begun)
    assert (config.train.precision, config.eval.every, config.data.loss_on) == ("bf16", 7, "all")
    config = as_begun(tiny_config("m", tmp_path, eval__every=3), begun)
    assert (config.train.precision, config.eval.every) == ("fp32", 3)


# Length


def test_only_a_constant_rate_can_be_lengthened_and_any_other_says_how_it_goes_on(tiny_directory, tmp_path, capfd):
    options = {**SHORT, "optimizer__schedule": "cosine"}
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **options))
    longer = tiny_config(tiny_directory, run.path, **{**options, "train__steps": 4}, resume=True)
    jump = r"train\.steps was 2, now 4 \(the cosine rate is then that of a run of 4 steps from its start: 0\.5 of the peak at step 2, 0\.5 at step 3\)"  # fmt: skip  # noqa: E501
    with pytest.raises(UserError, match=jump + ".*--resume_changes accept"):
        ts.sft(longer)
    assert run.status["state"] == "finished"
    ts.sft(dataclasses.replace(longer, resume_changes="accept"))
    whole = ts.sft(tiny_config(tiny_directory, tmp_path / "whole", **{**options, "train__steps": 4}))
    assert [line["lr"] for line in run.metrics("train")][2:] == [line["lr"] for line in whole.metrics("train")][2:]
    assert f"changed from step 3 on: {jump}".replace("\\", "") in capfd.readouterr().out


def test_fewer_steps_than_were_taken_are_refused_and_fewer_than_were_asked_for_too(tiny_directory, tmp_path, capfd):
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **LONGER))
    lines = run.metrics()
    again = ["sft", "--resume", "--out", str(run.path)]
    assert main([*again, "--train.steps", "3", "--resume_changes", "accept"]) == 2
    assert "--train.steps 3" in (told := capfd.readouterr().err)
    assert "is already at step 4" in told
    shutil.rmtree(run.checkpoints()[-1][1])
    shutil.rmtree(run.checkpoints()[-1][1])
    assert main([*again, "--train.steps", "3"]) == 1
    assert "train.steps was 4, now 3" in capfd.readouterr().err
    assert run.metrics() == lines


def test_a_run_lengthened_by_epochs_is_one_that_was_as_long_from_the_start(tiny_directory, tmp_path, capfd):
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **SHORT))
    options = {**SHORT, "train__steps": None, "data__max_rows": 9, "train__batch_size": 4, "eval__at_start": False}
    epoch = ts.sft(tiny_config(tiny_directory, tmp_path / "e", **options))
    steps = epoch.config["train"]["steps"]
    assert steps > 1
    assert main(["sft", "--resume", "--out", str(epoch.path), "--train.epochs", "2"]) == 0
    assert epoch.config["train"]["steps"] == epoch.status["step"] == 2 * steps
    assert "the constant rate does not depend on it" in capfd.readouterr().out
    two = ts.sft(tiny_config(tiny_directory, tmp_path / "two", **options, train__epochs=2.0))
    assert train_losses(epoch) == train_losses(two)
    assert last_digest(epoch) == last_digest(two)
    assert main(["sft", "--resume", "--out", str(run.path), "--train.epochs", "0.01"]) == 2  # a step: it is at 2


def test_a_run_that_patience_ended_takes_no_step_when_resumed(tiny_directory, tmp_path):
    options = {
        **SHORT,
        "train__steps": 9,
        "eval__every": 1,
        "eval__patience": 1,
        "optimizer__lr": 0.5,
        "train__diverge_after": 0,
    }
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **options))
    before = comparable(run), last_digest(run), run.status
    assert "has not fallen for 1 estimates" in run.status["reason"]
    assert run.status["step"] < 9
    ts.sft(tiny_config(tiny_directory, run.path, **options, resume=True))
    assert (comparable(run), last_digest(run), run.status) == before
