"""Studies of tiny runs as files and processes, for the tests."""

import json
import subprocess
import sys
from pathlib import Path

import yaml

from tiny_runs import SMALL

LONG = {"train.steps": 120, "eval.every": 60, "checkpoint.every": 20, "eval.iters": 1}


def write_study(folder, model, experiments, **more):
    file = folder / "mine.yaml"
    base = {"sft": {"model.name": str(model), **SMALL}, "dpo": {**SMALL, "optimizer.lr": 1e-4}}
    file.write_text(yaml.safe_dump({"base": base, "experiments": experiments, **more}, sort_keys=False))
    return file


def study_process(file, out, *more):
    argv = [sys.executable, "-m", "tunesmith", "study", str(file), "--out", str(out), *more]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def states(out):
    return {name: run["state"] for name, run in json.loads((out / "progress.json").read_text())["runs"].items()}


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
