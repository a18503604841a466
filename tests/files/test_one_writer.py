"""One run has one writer: a lock that names its process, and default directories that no two processes share."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tunesmith as ts
from hanging import HANGS, wait_for
from tiny_runs import as_argv, tiny_config, train_losses
from tunesmith.__main__ import main
from tunesmith.errors import UserError
from tunesmith.files import lock
from tunesmith.files.lock import NAME, new_run_directory, one_writer
from tunesmith.files.run import Run

WITH_AND_WITHOUT_FLOCK = pytest.mark.parametrize("flock", [True, False])
ENDLESS = {"train__steps": 1_000_000, "eval__every": 1_000_000, "checkpoint__every": 1_000_000, "eval__iters": 1}


@pytest.fixture
def locks(monkeypatch):
    """Use the platform's locks, or act as where it has none."""

    def use(flock):
        if not flock:
            monkeypatch.setattr(lock, "fcntl", None)
        elif lock.fcntl is None:
            pytest.skip("this platform has no flock")

    return use


@WITH_AND_WITHOUT_FLOCK
def test_a_directory_has_one_writer_and_says_who(tmp_path, locks, flock):
    locks(flock)
    with one_writer(tmp_path):
        held = json.loads((tmp_path / NAME).read_text())
        assert (held["host"], held["process"]) == (socket.gethostname(), os.getpid())
        with pytest.raises(UserError) as refused, one_writer(tmp_path):
            pytest.fail("two writers")
        told = str(refused.value)
        assert all(str(part) in told for part in (tmp_path, held["host"], held["process"], held["since"], "--out"))
        assert (tmp_path / NAME).exists()
    assert not (tmp_path / NAME).exists()
    with one_writer(tmp_path):
        pass


@WITH_AND_WITHOUT_FLOCK
def test_the_lock_goes_with_an_error_too(tmp_path, locks, flock):
    locks(flock)
    with pytest.raises(ZeroDivisionError), one_writer(tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def a_dead_process():
    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    process.join()
    return process.pid


@pytest.mark.parametrize(
    ("flock", "host", "process", "taken_over"),
    [
        (True, None, a_dead_process, True),
        (True, "elsewhere", os.getpid, True),  # the kernel says that nobody holds it, whoever wrote it
        (False, None, a_dead_process, True),
        (False, None, os.getpid, False),
        (False, "elsewhere", a_dead_process, False),  # its processes cannot be seen from here
    ],
)
def test_what_a_dead_process_left_is_taken_over(tmp_path, locks, flock, host, process, taken_over):
    locks(flock)
    left = {"host": host or socket.gethostname(), "process": process(), "since": "2026-01-01 12:00:00+00:00"}
    (tmp_path / NAME).write_text(json.dumps(left) + "\n")
    if taken_over:
        with one_writer(tmp_path):
            assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()
        assert not (tmp_path / NAME).exists()
        return
    with (
        pytest.raises(UserError, match=rf"{left['host']} \(since 2026-01-01 .*If it is gone, remove "),
        one_writer(tmp_path),
    ):
        pytest.fail("two writers")
    assert json.loads((tmp_path / NAME).read_text()) == left


@pytest.mark.parametrize("content", [b"", b"{", b"[]"])
def test_a_file_that_names_nobody_is_no_traceback(tmp_path, locks, monkeypatch, content):
    locks(False)
    monkeypatch.setattr(lock, "UNREADABLE_FOR", 0.05)
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(UserError, match="being written by another process"), one_writer(tmp_path):
        pytest.fail("two writers")


def test_a_file_system_without_locks_falls_back_on_the_file(tmp_path, monkeypatch):
    if lock.fcntl is None:
        pytest.skip("this platform has no flock")

    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with one_writer(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()
        with pytest.raises(UserError, match=f"process {os.getpid()}"), one_writer(tmp_path):
            pytest.fail("two writers")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_removed_only_where_it_lies(tmp_path):
    """A run directory that was moved while it is written, and a new run in its old place."""
    here, there = tmp_path / "run", tmp_path / "moved"
    here.mkdir()
    with one_writer(here):
        here.rename(there)
        here.mkdir()
        with one_writer(here):
            pass
        (here / NAME).write_text("another's")
    assert (here / NAME).read_text() == "another's"


# Default directories


def test_default_directories_are_taken_atomically(tmp_path):
    default = str(tmp_path / "runs" / "sft-sample")
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: new_run_directory(None, default), range(64)))
    assert len({path for path, _ in made}) == 64
    assert all(new for _, new in made)
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"sft-sample", *(f"sft-sample-{n}" for n in range(2, 65))}


def test_a_default_that_cannot_be_made_is_an_error_and_not_a_loop(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(OSError, match="runs"):
        new_run_directory(None, str(tmp_path / "runs" / "sft-sample"))
    with pytest.raises(OSError, match="runs"):
        new_run_directory(str(tmp_path / "runs"), "")


def test_a_run_that_never_begins_leaves_no_directory(tiny_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["sft", "--model.name", str(tiny_directory), "--data.name", "gone.jsonl"]
    assert [main(argv), main([*argv, "--out", "named"])] == [1, 1]
    assert [p for p in tmp_path.rglob("*") if p.name != "runs"] == []
    (tmp_path / "mine").mkdir()
    assert main([*argv, "--out", "mine"]) == 1
    assert (tmp_path / "mine").is_dir()


# Real processes


def started(argv, folder):
    argv = [sys.executable, "-m", "tunesmith", *argv]
    return subprocess.Popen(argv, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_default_runs_at_once_get_two_directories(tiny_directory, tmp_path):
    argv = as_argv(tiny_config(tiny_directory, Path("x"), train__steps=2))
    del argv[1:3]  # --out
    processes = [started([*argv, "--optimizer.lr", rate], tmp_path) for rate in ("0.001", "0.002")]
    ended = [(p.communicate(timeout=HANGS)[1], p.returncode) for p in processes]
    assert ended == [("", 0), ("", 0)]
    runs = [Run(path) for path in (tmp_path / "runs").iterdir()]
    assert sorted(run.config["optimizer"]["lr"] for run in runs) == [0.001, 0.002]
    assert [(run.status["state"], len(train_losses(run))) for run in runs] == [("finished", 2)] * 2
    assert not list(tmp_path.rglob(NAME))


def test_a_second_training_on_a_directory_is_told_who_writes_there(tiny_directory, tmp_path, capfd):
    run = ts.Run(tmp_path / "r")
    argv = as_argv(tiny_config(tiny_directory, run.path, **ENDLESS))
    first = started(argv, tmp_path)
    wait_for(lambda: len(run.metrics("train")) >= 3, first)
    for again in (argv, [*argv, "--resume"], ["sft", "--resume", "--out", str(run.path)]):
        assert main(again) == 1
        told = capfd.readouterr().err
        assert len(told.splitlines()) == 1
        assert f"process {first.pid} on {socket.gethostname()} (since 20" in told
    first.kill()
    first.communicate()
    killed = time.time()
    assert (run.path / NAME).exists()  # nobody was there to remove it
    config = tiny_config(tiny_directory, run.path, **{**ENDLESS, "train__steps": 1}, resume=True)
    with pytest.raises(UserError, match=r"train\.steps"):  # no longer the lock
        ts.sft(config)
    second = started([*argv, "--resume"], tmp_path)
    wait_for(lambda: len(lines := run.metrics("train")) >= 3 and lines[0]["time"] > killed, second)
    assert json.loads((run.path / NAME).read_text())["process"] == second.pid
    second.send_signal(signal.SIGTERM)
    assert second.communicate(timeout=HANGS)[1] == ""
    assert run.status["state"] == "stopped"
    assert not (run.path / NAME).exists()
