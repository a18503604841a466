"""SIGINT, SIGTERM and SIGHUP: what the first does wherever it comes, what the second does, and that nothing is lost."""

import math
import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest

import tunesmith as ts
from hanging import HANGS, wait_for
from tiny_runs import as_argv, comparable, last_digest, tiny_config, write_dialogues
from tunesmith import progress
from tunesmith.__main__ import main
from tunesmith.errors import Interrupted
from tunesmith.generation import engine
from tunesmith.judge import scorers
from tunesmith.options.training import DPOConfig, RewardConfig
from tunesmith.progress import STOP, Progress
from tunesmith.train import launch, reference, token_loss
from tunesmith.train.divergence import Watch

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
DROPOUT = {"model__dropout": 0.1}  # a step that drew other random numbers would show


def at_call(monkeypatch, module, name, number, signals=("SIGTERM",)):
    """Send this process signals at the beginning of a function's call of this number. Returns a list as long as it has calls."""
    function, calls = getattr(module, name), []

    def counted(*args, **more):
        calls.append(1)
        if len(calls) == number:
            for each in signals:
                os.kill(os.getpid(), getattr(signal, each))
        return function(*args, **more)

    monkeypatch.setattr(module, name, counted)
    return calls


def handlers():
    return [signal.getsignal(getattr(signal, name)) for name in NAMES]


@pytest.fixture(autouse=True)
def signals_are_given_back():
    before, wakeup = handlers(), signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    yield
    assert handlers() == before
    assert signal.set_wakeup_fd(wakeup) == wakeup
    assert not [t for t in threading.enumerate() if t.name == "tunesmith-signals"]


@pytest.fixture(scope="module")
def whole(tiny_directory, tmp_path_factory):
    return ts.sft(tiny_config(tiny_directory, tmp_path_factory.mktemp("runs") / "whole", **DROPOUT))


def stopped_then_resumed(config, monkeypatch, *moment):
    """Stop the run at a moment; its status then; and the run, gone on to its end."""
    with monkeypatch.context() as patch:
        calls = at_call(patch, *moment)
        run = ts.sft(config)
    assert len(calls) == moment[2]  # nothing more of it was begun
    status = run.status
    assert status["state"] == "stopped"
    assert status["reason"].endswith(f"; continue it with: tunesmith sft --out {run.path} --resume")
    return status, run


# ---- a training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "call", "number", "step", "estimates"),
    [
        (launch, "optimizer_step", 2, 2, [0]),
        (launch, "optimizer_step", 3, 3, [0]),  # an estimate would come next
        (token_loss, "estimate_loss", 1, 0, []),  # the loss that a divergence will be judged by
        (token_loss, "estimate_loss", 2, 0, []),
        (token_loss, "estimate_loss", 5, 3, [0]),  # in the middle of one
        (token_loss, "estimate_loss", 7, 6, [0, 3]),  # the last one of the run
        (token_loss, "estimate_loss", 8, 6, [0, 3, 6]),  # a divergence is judged by
    ],
    ids=["step", "before-estimate", "judged-before", "estimate-0", "estimate-3", "estimate-6", "judged-after"],
)
def test_a_training_stops_at_once_and_the_resumed_run_is_the_undisturbed_one(
    tiny_directory, tmp_path, monkeypatch, whole, module, call, number, step, estimates
):
    config = tiny_config(tiny_directory, tmp_path / "r", **DROPOUT)
    status, run = stopped_then_resumed(config, monkeypatch, module, call, number)
    assert (status["step"], status["reason"].split(" received")[0]) == (step, "SIGTERM")
    assert run.checkpoints()[-1][0] == step
    assert [line["step"] for line in run.metrics("eval")] == estimates
    ts.sft(tiny_config(tiny_directory, run.path, **DROPOUT, resume=True))
    assert run.status == whole.status
    assert comparable(run) == comparable(whole)
    assert last_digest(run) == last_digest(whole)
    assert {p.name: p.read_text() for p in (run.path / "losses").iterdir()} == {
        p.name: p.read_text() for p in (whole.path / "losses").iterdir()
    }


@pytest.mark.parametrize(("lr", "ends"), [(0.0, "finished"), (1.0, "diverged")])
def test_a_look_at_a_suspicion_is_broken_off_and_the_resumed_run_looks_before_its_next_step(
    tiny_directory, tmp_path, monkeypatch, lr, ends
):
    """Every step is made to look suspect; only the higher rate ruins the model, here before its first estimate."""
    monkeypatch.setattr(Watch, "mean", property(lambda watch: math.inf))
    options = {"train__diverge_after": 1, "eval__at_start": False, "eval__every": 6, "optimizer__lr": lr}
    whole = ts.sft(tiny_config(tiny_directory, tmp_path / "whole", **options))
    assert whole.status["state"] == ends
    config = tiny_config(tiny_directory, tmp_path / "r", **options)
    status, run = stopped_then_resumed(config, monkeypatch, token_loss, "estimate_loss", 2)
    assert status["step"] == 2
    ts.sft(tiny_config(tiny_directory, run.path, **options, resume=True))
    assert run.status == whole.status
    assert comparable(run) == comparable(whole)


def test_a_stop_before_the_first_step_leaves_a_run_that_can_be_resumed(tiny_directory, tmp_path, monkeypatch, whole):
    """Where no estimate comes first either."""
    options = {**DROPOUT, "eval__at_start": False}
    status, run = stopped_then_resumed(
        tiny_config(tiny_directory, tmp_path / "r", **options), monkeypatch, token_loss, "estimate_loss", 1
    )
    assert (status["step"], run.metrics("train"), [step for step, _ in run.checkpoints()]) == (0, [], [0])
    ts.sft(tiny_config(tiny_directory, run.path, **options, resume=True))
    assert last_digest(run) == last_digest(whole)


@pytest.mark.parametrize(("module", "call"), [(engine, "sample_tokens"), (scorers, "score_texts")])
def test_answers_and_their_scores_are_broken_off_and_made_again(tiny_directory, tmp_path, monkeypatch, module, call):
    judge = ts.train_reward_model(tiny_config(tiny_directory, tmp_path / "judge", RewardConfig, train__steps=1))
    options = {"eval__reward": str(judge.path), "eval__max_new_tokens": 3, "train__steps": 3, "eval__at_start": False}
    whole = ts.sft(tiny_config(tiny_directory, tmp_path / "whole", **options))
    _, run = stopped_then_resumed(
        tiny_config(tiny_directory, tmp_path / "r", **options), monkeypatch, module, call, 1, ("SIGHUP",)
    )
    assert (run.status["step"], run.metrics("eval"), run.metrics("reward")) == (3, [], [])
    ts.sft(tiny_config(tiny_directory, run.path, **options, resume=True))
    assert comparable(run) == comparable(whole)
    assert run.status == whole.status


def test_the_first_signal_is_answered_while_the_step_still_computes(tiny_directory, tmp_path, monkeypatch):
    """A thread says so: the step does nothing for the answer, and waits for it. (Printed in the tests with real processes.)"""
    step, said = launch.optimizer_step, []
    monkeypatch.setattr(progress, "_say", lambda line, stream: said.append(line))

    def stepping(*args, **more):
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: said)
        return step(*args, **more)

    monkeypatch.setattr(launch, "optimizer_step", stepping)
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r"))
    (line,) = said
    assert line.startswith("SIGINT received: stopping after this step")
    assert "a second signal ends at once" in line
    assert (run.status["state"], run.status["step"]) == ("stopped", 1)


def test_signals_that_come_together_are_one_wish(tiny_directory, tmp_path, monkeypatch):
    """`timeout` sends two, a closing terminal too."""
    config = tiny_config(tiny_directory, tmp_path / "r", eval__at_start=False)
    status, _ = stopped_then_resumed(config, monkeypatch, launch, "optimizer_step", 2, ("SIGTERM", "SIGHUP", "SIGTERM"))
    assert status["step"] == 2


def test_in_a_callers_process_a_second_signal_raises_and_the_run_says_stopped(tiny_directory, tmp_path, monkeypatch):
    step = launch.optimizer_step

    def stepping(*args, **more):
        os.kill(os.getpid(), signal.SIGINT)
        while not STOP.count:
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
        while True:  # a step that never ends
            time.sleep(0.01)
        return step(*args, **more)

    monkeypatch.setattr(progress, "ECHO", 0.05)
    monkeypatch.setattr(launch, "optimizer_step", stepping)
    with pytest.raises(Interrupted, match="SIGINT"):
        ts.sft(tiny_config(tiny_directory, tmp_path / "r"))
    status = ts.Run(tmp_path / "r").status
    assert (status["state"], status["step"]) == ("stopped", 0)
    assert "ended at once by SIGINT; go on from its last checkpoint with: tunesmith sft" in status["reason"]


def test_a_training_in_another_thread_leaves_signals_alone(tiny_directory, tmp_path):
    before, found = handlers(), []

    def train():
        found.append(ts.sft(tiny_config(tiny_directory, tmp_path / "r", train__steps=1)))
        found.append(handlers())

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert found[0].status["state"] == "finished"
    assert found[1] == before


def test_under_nohup_a_hang_up_is_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with STOP.catching("stopping"):
            os.kill(os.getpid(), signal.SIGHUP)
            assert not STOP.requested
            os.kill(os.getpid(), signal.SIGTERM)
            assert STOP.requested
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- everything else -------------------------------------------------------------------------------------------------


def test_a_reference_pass_is_broken_off_and_keeps_what_it_has(tiny_directory, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    config = tiny_config(tiny_directory, tmp_path / "r", DPOConfig, train__batch_size=8)
    with monkeypatch.context() as patch:
        at_call(patch, reference, "answer_logps", 3)
        with pytest.raises(Interrupted, match="SIGTERM"):
            ts.dpo(config)
    assert not (tmp_path / "r").exists()
    (told,) = ts.dpo(config).metrics("reference")
    assert 0 < told["computed"] < told["pairs"]


@pytest.mark.parametrize("name", NAMES)
def test_a_command_that_saves_nothing_ends_at_the_first_signal_with_its_exit_code(
    name, tiny_directory, monkeypatch, capfd
):
    at_call(monkeypatch, engine, "sample_tokens", 2, (name,))
    argv = ["compare", str(tiny_directory), str(tiny_directory), "--limit", "2", "--device", "cpu"]
    assert main(argv) == 128 + getattr(signal, name)
    assert capfd.readouterr().err == f"tunesmith: interrupted{'' if name == 'SIGINT' else f' ({name})'}\n"


def test_building_a_tokenizer_ends_at_the_first_signal(tmp_path, monkeypatch, capfd):
    write_dialogues(tmp_path / "text.jsonl", [(f"How far is {i}?", f"It is {i} miles.") for i in range(200)])
    from tunesmith.train import scratch

    at_call(monkeypatch, scratch, "open_dataset", 1)
    argv = [
        "pretrain",
        "--data",
        str(tmp_path / "text.jsonl"),
        "--out",
        str(tmp_path / "r"),
        "--tokenizer.vocab_size",
        "300",
    ]
    assert main([*argv, "--train.steps", "1"]) == 128 + signal.SIGTERM
    assert "interrupted (SIGTERM)" in capfd.readouterr().err
    assert not (tmp_path / "r").exists()


# ---- real processes --------------------------------------------------------------------------------------------------

ENDLESS = {"train__steps": 1_000_000, "eval__every": 1_000_000, "checkpoint__every": 1_000_000, "eval__at_start": False}


def started(argv, **streams):
    return subprocess.Popen([sys.executable, "-m", "tunesmith", *argv], **streams)


def test_a_second_signal_ends_the_process_in_its_estimate_and_the_run_goes_on_as_if_nothing_was(
    tiny_directory, tmp_path, whole
):
    run, say = ts.Run(tmp_path / "r"), tmp_path / "estimates"
    code = (
        "import sys, time, tunesmith.train.token_loss as loss; from pathlib import Path; from tunesmith.__main__ import main\n"
        "calls, plain = [], loss.estimate_loss\n"
        "def endless(*args):\n"
        "    calls.append(1)\n"
        f"    if len(calls) == 4: Path({str(say)!r}).touch(); time.sleep(600)\n"
        "    return plain(*args)\n"
        "loss.estimate_loss = endless; sys.exit(main(sys.argv[1:]))"
    )
    argv = as_argv(tiny_config(tiny_directory, run.path, **DROPOUT, checkpoint__every=2))
    process = subprocess.Popen(
        [sys.executable, "-c", code, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(say.exists, process)
    process.send_signal(signal.SIGTERM)
    for line in process.stdout:
        if line.startswith("SIGTERM received: stopping after this step"):
            break
    time.sleep(2 * progress.ECHO)
    process.send_signal(signal.SIGINT)
    _, complaints = process.communicate(timeout=HANGS)
    assert process.returncode == 128 + signal.SIGINT
    way_on = f"go on from its last checkpoint with: tunesmith sft --out {run.path} --resume"
    assert complaints == f"tunesmith: ended at once by another SIGINT; {way_on}\n"
    assert (run.status["state"], run.status["step"]) == ("stopped", 2)
    assert [step for step, _ in run.checkpoints()] == [0, 2]
    ts.sft(tiny_config(tiny_directory, run.path, **DROPOUT, checkpoint__every=2, resume=True))
    assert comparable(run) == comparable(whole)
    assert last_digest(run) == last_digest(whole)


@pytest.mark.parametrize(
    ("place", "name"),
    [("tunesmith.train.reference.answer_logps", "SIGINT"), ("tunesmith.judge.answering.scored", "SIGTERM")],
)
def test_a_real_process_is_broken_off_in_a_reference_pass_and_in_scoring(tiny_directory, tmp_path, place, name):
    module, _, call = place.rpartition(".")
    code = (
        f"import os, sys, {module} as module; from tunesmith.__main__ import main\n"
        f"plain = module.{call}\n"
        f"def kills(*args): os.kill(os.getpid(), {int(getattr(signal, name))}); return plain(*args)\n"
        f"module.{call} = kills; sys.exit(main(sys.argv[1:]))"
    )
    argv = as_argv(tiny_config(tiny_directory, tmp_path / "r", DPOConfig, data__max_rows=20))
    if call == "scored":
        judge = ts.train_reward_model(tiny_config(tiny_directory, tmp_path / "judge", RewardConfig, train__steps=1))
        argv = ["score", str(tiny_directory), "--reward", str(judge.path), "--limit", "2", "--device", "cpu"]
    cache = {**os.environ, "TUNESMITH_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False, env=cache)
    assert done.returncode == 128 + getattr(signal, name)
    assert done.stderr == f"tunesmith: interrupted{'' if name == 'SIGINT' else f' ({name})'}\n"
    assert not (tmp_path / "r").exists()


def test_a_terminal_that_closes_stops_the_training_with_a_checkpoint(tiny_directory, tmp_path):
    run = ts.Run(tmp_path / "r")
    ours, theirs = pty.openpty()
    code = "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    code += "from tunesmith.__main__ import main; sys.exit(main(sys.argv[1:]))"
    argv = [sys.executable, "-c", code, *as_argv(tiny_config(tiny_directory, run.path, **ENDLESS))]
    process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    drain = threading.Thread(
        target=lambda: [os.read(ours, 1000) for _ in iter(lambda: stop.is_set(), True)], daemon=True
    )
    stop = threading.Event()
    drain.start()
    wait_for(lambda: len(run.metrics("train")) >= 3, process)
    stop.set()
    drain.join(60)
    os.close(ours)
    assert process.wait(60) == 0
    assert run.status["state"] == "stopped"
    assert run.status["reason"].startswith("SIGHUP received; continue it with: ")
    assert run.checkpoints()[-1][0] == run.status["step"]


def test_a_training_whose_output_nobody_reads_stops_with_a_checkpoint(tiny_directory, tmp_path):
    run = ts.Run(tmp_path / "r")
    argv = as_argv(tiny_config(tiny_directory, run.path, **{**ENDLESS, "eval__at_start": True}))
    process = started(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not process.stdout.readline().startswith(b"step 0:"):
        pass
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141
    assert run.status["state"] == "stopped"
    assert run.status["reason"].startswith("nobody reads its output any more; continue it with: ")
    assert run.checkpoints()[-1][0] == run.status["step"] > 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("argv", [["--help"], ["--version"]])
def test_output_that_cannot_be_written_is_one_line(argv, monkeypatch, capfd):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(argv) == 1
    told = capfd.readouterr().err
    assert told == "tunesmith: the output cannot be written: No space left on device\n"


def test_a_line_is_said_to_nobody_without_an_error_and_asks_to_stop(capfd, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        bar = Progress(3)
        with pytest.raises(BrokenPipeError):
            bar.say("where no wish is looked at")
        with STOP.catching("stopping"):
            bar.say("where it is")
            assert STOP.requested
            assert STOP.unread
