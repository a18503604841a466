"""Where a run cannot be written, begun or continued: one line with cause and remedy, and nothing half-written left."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

import tunesmith
from hanging import HANGS
from tunesmith.__main__ import main
from tunesmith.files.run import Run

FULL = Path("/dev/full")  # every write to it fails as on a full disk


@pytest.fixture
def sft(tiny_directory, tmp_path):
    return [
        "sft", "--model.name", tiny_directory, "--data.name", "sample", "--data.block_size", "128", "--train.steps", "2",
        "--eval.iters", "1", "--train.device", "cpu", "--train.precision", "fp32", "--out", tmp_path / "run",
    ]  # fmt: skip


@pytest.fixture
def fails(capfd):
    """Run the command line in this process; it must end with 1 and one line that holds every part of `told`."""

    def run(argv, *told):
        found = main([str(word) for word in argv])
        err = capfd.readouterr().err
        assert found == 1, err
        assert len(err.splitlines()) == 1, err
        missing = [part for part in ("tunesmith: ", *told) if part not in err]
        assert not missing, f"{err} does not name {missing}"

    return run


@pytest.fixture
def disk(tmp_path):
    """Make a small disk: `disk(kilobytes)`, or read-only. Skips where mounting is not allowed."""
    mounted = []

    def mount(kilobytes, options=""):
        path = tmp_path / f"disk-{len(mounted)}"
        path.mkdir()
        argv = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k{options}", "tmpfs", str(path)]
        try:
            subprocess.run(argv, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a small disk needs root")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


# ---- a full disk ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kilobytes", [12, 64, 1500, 1700, 2000, 3600, 5200])
def test_full_disk_is_told_and_leaves_only_whole_checkpoints(fails, sft, disk, kilobytes):
    """The disk is full at the first weights, at the tokenizer, at the optimizer's state, or at a later checkpoint."""
    path = disk(kilobytes)
    fails([*sft, "--out", path / "run"], "No space left on device", "free some space", "--out")
    run = Run(path / "run")
    if kilobytes > 12:  # else there is not even room for another status
        assert run.status["state"] == "failed"
        assert "No space left" in run.status["reason"]
    assert list((path / "run" / "checkpoints").glob(".*")) == []
    for _, checkpoint in run.checkpoints():
        model, _ = tunesmith.load(str(checkpoint), device="cpu")
        assert model.parameter_count() > 0
    assert bool(run.checkpoints()) == (kilobytes >= 2000)


def test_full_disk_from_the_start_prints_one_line_also_at_exit(sft, disk):
    """As a process of its own: what runs at its exit must not add a traceback."""
    path = disk(4)
    argv = [sys.executable, "-m", "tunesmith", *map(str, sft), "--out", str(path / "run")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "No space left on device; free some space" in done.stderr


def test_full_disk_at_the_weights_is_told_also_where_mounting_is_not_allowed(fails, sft, monkeypatch, tmp_path):
    """The writer fails as safetensors' does, half-way."""

    def full(state, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    fails(sft, "model.safetensors", "No space left on device", "free some space", "--out")
    assert Run(tmp_path / "run").status["state"] == "failed"
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_full_disk_at_a_result_is_told(fails, tiny_directory, command):
    rest = {"evaluate": ["sample", "--data.max_rows", "2"], "compare": [tiny_directory, "--limit", "1"]}[command]
    fails([command, tiny_directory, *rest, "--out", FULL], "No space left on device", "free some space", "--out")


# ---- a place where nothing can be written --------------------------------------------------------------------------


def test_read_only_disk_is_told(fails, sft, disk):
    fails([*sft, "--out", disk(64, ",ro") / "run"], "Read-only file system", "writable directory with --out")


def test_a_file_where_the_run_should_be_is_told(fails, sft, tmp_path):
    """Also what a test that runs as root can see of a directory without permission."""
    (tmp_path / "file").write_text("mine")
    fails([*sft, "--out", tmp_path / "file"], "file", "File exists", "--out")
    fails([*sft, "--out", tmp_path / "file" / "run"], "file/run", "Not a directory", "--out")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_told(fails, sft, tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o555)
    fails([*sft, "--out", tmp_path / "theirs" / "run"], "Permission denied", "writable directory with --out")


def test_a_result_in_a_directory_that_is_not_there_is_told(fails, tiny_directory, tmp_path):
    argv = ["evaluate", tiny_directory, "sample", "--data.max_rows", "2", "--out"]
    fails([*argv, tmp_path / "no" / "x.json"], "no/x.json", "No such file or directory", "check the path")
    fails([*argv, tmp_path], "Is a directory", "name a file")


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(sft, capfd):
    """A finished run of two steps."""
    assert main([str(word) for word in sft]) == 0
    capfd.readouterr()
    return sft[-1]


def test_a_directory_that_holds_a_run_is_not_overwritten(fails, sft, run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    fails(sft, "already holds a run (finished at step 2)", "--resume", "--out")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_resume_without_a_run_is_told_and_makes_nothing(fails, sft, tmp_path):
    fails([*sft, "--resume"], "--resume", "holds no run to continue", "--out")
    assert not (tmp_path / "run").exists()


def test_a_step_without_checkpoint_lists_those_there_are(fails, run, tiny_directory):
    fails(["evaluate", f"{run}@77", "sample"], "no checkpoint of step 77", "it has: 0, 1, 2")
    fails(["evaluate", f"{run}@last", "sample"], "RUN@STEP with a number", f"{run}@2")
    fails(["evaluate", f"{tiny_directory}@1", "sample"], "no checkpoint of step 1", "none")


def test_a_run_without_checkpoint_or_with_a_damaged_status_is_told(fails, run):
    status = run / "status.json"
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.rename(run / checkpoint.name)
    fails(["evaluate", run, "sample"], "has no checkpoint yet", "finished")
    status.write_text('{"state": "fini')
    fails(["evaluate", run, "sample"], "status.json is damaged", "checkpoint")


@pytest.mark.parametrize("what", ["missing", "empty", "model"])
def test_a_report_of_what_is_no_run_is_told(fails, tmp_path, tiny_directory, what):
    (tmp_path / "empty").mkdir()
    path = tiny_directory if what == "model" else tmp_path / what
    fails(["report", path], str(path), "not a run directory", "status.json")
