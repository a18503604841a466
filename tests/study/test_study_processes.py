"""Real studies from end to end, killed, interrupted and gone on with."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import tunesmith as ts
from hanging import HANGS, wait_for
from real_studies import LONG, children, states, study_process, write_study
from tiny_runs import comparable, digest, tiny_config
from tunesmith.__main__ import main
from tunesmith.files.run import Run
from tunesmith.progress import ECHO

pytestmark = pytest.mark.long


def test_a_small_study_from_end_to_end(tiny_directory, tmp_path, capfd):
    file = write_study(
        tmp_path, tiny_directory,
        {
            "e1": {"runs": {
                "half": {"label": "first half"},
                "whole": {"label": "continued", "continues": "half", "set": {"train.steps": 12}},
            }},
            "e1b": {"runs": {"wild": {"set": {"optimizer.lr": 100, "train.diverge_after": 3}}}},
            "bad": {"runs": {"gone": {"set": {"data.name": str(tmp_path / "gone.jsonl")}}}},
            "e8": {"command": "dpo", "set": {"model.name": "@half", "train.steps": 3}},
        },
    )  # fmt: skip
    out = tmp_path / "study"
    assert main(["study", str(file), "--out", str(out), "--dry_run"]) == 0
    printed = capfd.readouterr().out
    assert not out.exists()
    assert [line.split()[0] for line in printed.splitlines()[1:6]] == [
        "half-s1",
        "whole-s1",
        "wild-s1",
        "gone-s1",
        "e8-s1",
    ]
    assert "from a probe of this machine" in printed
    assert main(["study", str(file), "--out", str(out)]) == 1
    told = capfd.readouterr()
    assert states(out) == {
        "half-s1": "finished", "whole-s1": "finished", "wild-s1": "diverged", "gone-s1": "failed", "e8-s1": "finished",
    }  # fmt: skip
    assert len(told.err.splitlines()) == 1
    assert "1 of 5 runs failed. gone-s1: " in told.err
    assert "gone.jsonl" in told.err
    assert "wild-s1: diverged after" in told.out
    half, whole = Run(out / "runs/half-s1"), Run(out / "runs/whole-s1")
    assert (half.status["step"], whole.status["step"]) == (6, 12)
    direct = ts.sft(tiny_config(tiny_directory, tmp_path / "direct", train__steps=12))
    assert [line for line in comparable(whole) if line["event"] == "train"] == [
        line for line in comparable(direct) if line["event"] == "train"
    ]
    assert digest(whole.checkpoint(12)) == digest(direct.checkpoint(12))
    assert Run(out / "runs/e8-s1").config["model"]["name"] == str(out / "runs/half-s1")
    record = json.loads((out / "plan.json").read_text())
    assert record["runs"]["half-s1"]["memory"]["parameters"] == 4 * sum(
        p.numel() for p in ts.load(str(tiny_directory))[0].parameters()
    )
    assert yaml.safe_load((out / "study.yaml").read_text())["experiments"]["e8"]["command"] == "dpo"
    progress = json.loads((out / "progress.json").read_text())["runs"]
    assert all(run["seconds"] > 0 for run in progress.values())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc for the study's processes")
def test_killed_in_the_middle_and_started_again_only_the_missing_work_is_done(tiny_directory, tmp_path):
    file = write_study(
        tmp_path, tiny_directory, {"x": {"runs": {"short": {"set": {"train.steps": 2}}, "long": {"set": LONG}}}}
    )
    out = tmp_path / "study"
    long = Run(out / "runs/long-s1")

    def far(step):
        return lambda: (long.path / "metrics.jsonl").exists() and len(long.metrics("train")) > step

    first = study_process(file, out)
    wait_for(far(21), first)
    (child,) = children(first)
    first.kill()  # the study alone: its run is told, saves and stops
    first.communicate()
    wait_for(lambda: not Path(f"/proc/{child}").exists() or Path(f"/proc/{child}/stat").read_text().split()[2] == "Z")
    reached = long.status["step"]
    assert (long.status["state"], states(out)["long-s1"]) == ("stopped", "running")
    short = {p: p.stat().st_mtime_ns for p in (out / "runs/short-s1").rglob("*")}

    second = study_process(file, out)
    wait_for(far(reached + 21), second)
    for pid in (second.pid, *children(second)):  # the study and its run
        os.kill(pid, signal.SIGKILL)
    second.communicate()

    third = study_process(file, out)
    printed, complaints = third.communicate(timeout=HANGS)
    assert (third.returncode, complaints) == (0, "")
    assert "short-s1" not in printed
    assert "long-s1: continues" in printed
    assert states(out) == {"short-s1": "finished", "long-s1": "finished"}
    assert {p: p.stat().st_mtime_ns for p in (out / "runs/short-s1").rglob("*")} == short
    named = {k.replace(".", "__"): v for k, v in LONG.items()}
    torch.set_num_threads(1)
    direct = ts.sft(tiny_config(tiny_directory, tmp_path / "direct", **named))
    assert comparable(long) == comparable(direct)
    assert digest(long.checkpoint(120)) == digest(direct.checkpoint(120))


def test_interrupted_the_runs_stop_and_the_study_says_so(tiny_directory, tmp_path):
    file = write_study(
        tmp_path, tiny_directory, {"x": {"runs": {"a": {"set": {**LONG, "train.steps": 100_000}}, "b": {"set": LONG}}}}
    )
    out = tmp_path / "study"
    process = study_process(file, out)
    run = Run(out / "runs/a-s1")
    wait_for(lambda: (run.path / "metrics.jsonl").exists() and len(run.metrics("train")) > 3, process)
    process.send_signal(signal.SIGINT)
    printed, complaints = process.communicate(timeout=HANGS)
    assert (process.returncode, complaints) == (130, "tunesmith: interrupted\n")
    assert "stopping: the runs save and end" in printed
    assert states(out) == {"a-s1": "stopped", "b-s1": "waiting"}
    assert run.checkpoints()[-1][0] == run.status["step"]


def test_interrupted_twice_the_runs_end_at_once_and_the_study_still_keeps_its_books(tiny_directory, tmp_path):
    """The run is stopped in the middle of its step (SIGSTOP), so that it cannot do what the first signal asks."""
    file = write_study(tmp_path, tiny_directory, {"x": {"runs": {"a": {"set": {**LONG, "train.steps": 100_000}}}}})
    out = tmp_path / "study"
    process = study_process(file, out)
    run = Run(out / "runs/a-s1")
    wait_for(lambda: (run.path / "metrics.jsonl").exists() and len(run.metrics("train")) > 3, process)
    (child,) = children(process)
    os.kill(child, signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    assert any("stopping: the runs save and end; a second signal ends them at once" in line for line in process.stdout)
    time.sleep(2 * ECHO)
    process.send_signal(signal.SIGTERM)
    printed, complaints = process.communicate(timeout=60)
    assert (process.returncode, complaints) == (128 + signal.SIGTERM, "tunesmith: interrupted (SIGTERM)\n")
    assert "ending them" in printed
    assert states(out) == {"a-s1": "stopped"}
