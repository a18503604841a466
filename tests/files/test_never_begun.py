"""A process that ends between its first line of output and the first status of its run."""

import signal
import subprocess
import sys

import pytest

import tunesmith as ts
from tiny_runs import as_argv, tiny_config
from tunesmith.errors import UserError
from tunesmith.files import lock
from tunesmith.files.run import Run

CODE = (
    "import os, sys, tunesmith.train.session as session; from tunesmith.__main__ import main\n"
    "plain = session.write_origin\n"
    "def kills(*args): plain(*args); os.kill(os.getpid(), {number})\n"
    "session.write_origin = kills; sys.exit(main(sys.argv[1:]))"
)


def ended_by(number: int, directory, out) -> int:
    """The exit code of a training that ends itself after its config.yaml and before its status.json, in a LoRA run on random weights."""
    argv = as_argv(tiny_config(directory, out, lora__rank=2, model__init="random"))
    code = CODE.format(number=int(number))
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, check=False).returncode


def test_a_signal_before_the_first_status_leaves_no_directory(tiny_directory, tmp_path):
    out = tmp_path / "r"
    assert ended_by(signal.SIGTERM, tiny_directory, out) == 128 + signal.SIGTERM
    assert not out.exists()
    out.mkdir()  # one that was there stays, and the same command begins in it
    (out / "notes.txt").write_text("mine")
    assert ended_by(signal.SIGTERM, tiny_directory, out) == 128 + signal.SIGTERM
    assert (out / "notes.txt").exists()
    with pytest.raises(UserError, match=r"was ended before it began.*start it again without --resume"):
        ts.sft(tiny_config(tiny_directory, out, resume=True))
    run = ts.sft(tiny_config(tiny_directory, out, train__steps=1))
    assert run.status["state"] == "finished"
    assert [line["event"] for line in run.metrics()] == ["eval", "train", "eval"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal")
def test_one_that_was_killed_is_begun_by_the_same_command(tiny_directory, tmp_path):
    out = tmp_path / "r"
    assert ended_by(signal.SIGKILL, tiny_directory, out) == -signal.SIGKILL
    assert not (out / "status.json").exists()
    with pytest.raises(UserError, match=r"was ended before it began"):
        ts.sft(tiny_config(tiny_directory, out, resume=True))
    ts.sft(tiny_config(tiny_directory, out, lora__rank=2, model__init="random", train__steps=1))
    assert Run(out).status["state"] == "finished"


def test_who_finds_another_in_the_directory_that_it_made_leaves_it_alone(tmp_path, monkeypatch):
    """Two processes with one --out: the first makes it, the second locks it and has not yet begun its run."""
    out = tmp_path / "r"

    def the_other_was_faster(lock_file, what):
        (out / "config.yaml").write_text("another's")
        raise UserError(f"{lock_file}: the {what} is taken")

    monkeypatch.setattr(lock, "fcntl", True)
    monkeypatch.setattr(lock, "_locked", the_other_was_faster)
    with pytest.raises(UserError, match="the run is taken"), lock.run_directory(str(out), "", resume=False):
        pytest.fail("two writers")
    assert (out / "config.yaml").read_text() == "another's"
