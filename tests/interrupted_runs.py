"""Runs that stop half way: how they are made, and that one which went on ends as the undisturbed one."""

import json
import shutil

import tunesmith as ts
from tiny_runs import comparable, last_digest


def stored_state(run):
    """Optimizer, random state, loss scale and position in the data, as the last checkpoint holds them."""
    directory = run.checkpoints()[-1][1] / "training_state"
    state = json.loads((directory / "state.json").read_text())
    return state, (directory / "optimizer.safetensors").read_bytes()


def assert_same_end(run, reference):
    assert comparable(run) == comparable(reference)
    assert last_digest(run) == last_digest(reference)
    assert stored_state(run) == stored_state(reference)
    assert run.status == reference.status


def interrupted(reference, out, step):
    """A copy of a run as it was after the checkpoint of `step`, its later lines already in the log."""
    shutil.copytree(reference.path, out)
    run = ts.Run(out)
    for later, path in run.checkpoints():
        if later > step:
            shutil.rmtree(path)
    (out / "status.json").write_text(json.dumps({"state": "running", "step": step + 1, "reason": ""}))
    return run
