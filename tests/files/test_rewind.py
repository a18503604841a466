"""A run that goes on cuts its log back to its checkpoint, whatever has become of the lines, and TensorBoard follows."""

import json
import struct
from collections import Counter

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

import tunesmith as ts
from interrupted_runs import interrupted
from tiny_runs import comparable, tiny_config, train_losses

STEPS = {"train__steps": 6, "eval__every": 2, "checkpoint__every": 2, "checkpoint__keep": 9, "eval__iters": 1}


@pytest.fixture(scope="module")
def whole(tiny_directory, tmp_path_factory):
    return ts.sft(tiny_config(tiny_directory, tmp_path_factory.mktemp("rewind") / "whole", **STEPS))


def go_on(run, tiny_directory, **more):
    return ts.sft(tiny_config(tiny_directory, run.path, **{**STEPS, **more}, resume=True))


def number_of(lines, event, step):
    return next(i for i, line in enumerate(lines) if (r := json.loads(line))["event"] == event and r["step"] == step)


@pytest.mark.parametrize("step", [4, 6])
@pytest.mark.parametrize("change", ["missing", "garbage", "zeros", "half", "no object", "no loss"])
def test_a_log_that_lost_a_line_before_the_checkpoint_is_cut_at_the_checkpoint_all_the_same(
    whole, tiny_directory, tmp_path, capfd, change, step
):
    run = interrupted(whole, tmp_path / "cut", step)
    log = run.path / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    at = number_of(lines, "train", 3)
    new = {"missing": [], "garbage": ["\x1f{}][\n"], "zeros": ["\0" * 40 + lines[at]], "half": [lines[at][:30] + "\n"], "no object": ["7\n"], "no loss": ['{"event": "train", "step": 1}\n']}  # fmt: skip  # noqa: E501
    log.write_text("".join([*lines[:at], *new[change], *lines[at + 1 :]]))
    capfd.readouterr()
    go_on(run, tiny_directory)
    told = capfd.readouterr().out
    assert f"note: {log}: there is no line of training step 3\n" in told
    assert (f"{log}: damaged, taken out: line {at + 1}\n" in told) == (change != "missing")
    kept = [line for line in comparable(whole) if (line["event"], line["step"]) != ("train", 3)]
    assert comparable(run) == kept
    go_on(run, tiny_directory)  # and again
    assert comparable(run) == kept
    assert b"\0" not in log.read_bytes()


def test_lines_of_the_checkpoints_own_step_stay_but_for_those_logged_after_it(whole, tiny_directory, tmp_path, capfd):
    run = interrupted(whole, tmp_path / "cut", 4)
    more = [{"event": "changed", "step": 4}, {"event": "diverged", "step": 4}, {"event": "train", "step": 5}]
    with (run.path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in more)
        file.write('{"event": "train", "st')  # killed while writing
    go_on(run, tiny_directory)
    assert comparable(run) == comparable(whole)
    assert ": there is no line" not in capfd.readouterr().out


def board(run):
    """(tag, step) -> how often TensorBoard shows it: a start forgets what is there from its step on."""
    shown = Counter()
    for path in sorted((run.path / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            if event.session_log.status == SessionLog.START:
                shown = Counter({key: n for key, n in shown.items() if key[1] < event.step})
            shown.update((value.tag, event.step) for value in event.summary.value)
    return shown


@pytest.mark.parametrize("step", [4, 0, -1])
def test_tensorboard_shows_every_step_once_after_a_kill(whole, tiny_directory, tmp_path, step):
    run = interrupted(whole, tmp_path / "cut", step)
    go_on(run, tiny_directory)
    shown = board(run)
    assert shown == board(whole)
    assert set(shown.values()) == {1}
    assert ("train/loss", 5) in shown
    assert train_losses(run) == train_losses(whole)
