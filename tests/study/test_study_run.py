"""Running studies with processes that only pretend: what is skipped, resumed, moved aside, held back and told."""

import json
import os
import signal
from pathlib import Path

import pytest

from real_studies import write_study
from tunesmith.commands.study import check_runs, study, tell
from tunesmith.errors import UserError
from tunesmith.files.lock import one_writer
from tunesmith.files.run import Run
from tunesmith.options.commands import StudyCommand
from tunesmith.progress import span
from tunesmith.study.definition import read_study_file
from tunesmith.study.executors import Ended, Job, Local, launch, slot_environment
from tunesmith.study.forecast import RunWork, forecasts_of, probe, times, work_of
from tunesmith.study.ledger import Ledger
from tunesmith.study.matrix import make_plan
from tunesmith.study.runner import conduct
from tunesmith.study.view import View

# ---- the loop, with processes that only pretend ----------------------------------------------------------------------


class Pretender:
    """An executor whose jobs are over at once. ends: run -> status.json's state, or an exit code; default finished."""

    slots = 1

    def __init__(self, **ends):
        self.ends, self.started, self.jobs, self.stopped = ends, [], [], 0

    def free(self):
        return not self.jobs

    def start(self, job):
        self.started.append((job.name, "--resume" in job.argv))
        self.jobs.append(job)
        return ""

    def ended(self):
        done, self.jobs = self.jobs, []
        return [self._end(job) for job in done]

    def _end(self, job):
        end = self.ends.get(job.name.removesuffix("-s1"), "finished")
        if end == "lost":
            self.ends[job.name.removesuffix("-s1")] = "finished"
            return Ended(job.name, 1, "node x was lost", again=True)
        if isinstance(end, str):
            record = {"state": end, "step": 3, "reason": "as told", "best_validation_loss": self.ends.get("loss", 1.0)}
            Path(job.argv[4], "status.json").write_text(json.dumps(record))
        else:
            Path(job.log).parent.mkdir(exist_ok=True)
            with Path(job.log).open("a") as log:
                log.write("step 1: loss 3\ntunesmith: data x: no such file; check the path\n")
        return Ended(job.name, end if isinstance(end, int) else 0 if end != "diverged" else 1)

    def stop(self):
        self.stopped += 1

    def close(self):
        pass


EXPERIMENTS = {
    "x": {"runs": {"a": {}, "b": {"set": {"optimizer.lr": 0.1}}}},
    "y": {"runs": {"c": {"continues": "a", "set": {"train.steps": 9}}, "d": {"set": {"model.name": "@c"}}}},
    "z": {"runs": {"e": {"set": {"model.name": "@b"}}, "f": {"set": {"optimizer.lr": 0.3}}}},
}


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Run the experiments (or others) with a Pretender; what was started, and the states."""
    monkeypatch.setattr("tunesmith.study.runner.TICK", 0.0)

    def run(experiments=EXPERIMENTS, wanted=None, **ends):
        plan = make_plan(read_study_file(write_study(tmp_path, "sample", experiments)))
        out = tmp_path / "study"
        out.mkdir(exist_ok=True)
        ledger, executor = Ledger(plan, out), Pretender(**ends)
        names = wanted or list(plan.runs)
        conduct(plan, ledger, executor, View(ledger, names, lambda: None), names, lambda: None)
        return executor.started, {n.removesuffix("-s1"): r["state"] for n, r in ledger.runs.items()}, ledger

    return run


ALL = [("a-s1", False), ("b-s1", False), ("c-s1", True), ("d-s1", False), ("e-s1", False), ("f-s1", False)]


def test_all_run_after_what_they_need_and_never_twice(go, tmp_path):
    started, states, _ = go()
    assert started == ALL  # c goes on with a copy of a
    assert set(states.values()) == {"finished"}
    assert go()[0] == []
    assert (tmp_path / "study/progress.json").exists()


def test_a_changed_option_runs_that_run_again_and_its_dependants_and_the_old_result_comes_back(go, tmp_path):
    go()
    other = json.loads(json.dumps(EXPERIMENTS))
    other["x"]["runs"]["b"]["set"]["optimizer.lr"] = 0.2
    assert go(other)[0] == [("b-s1", False), ("e-s1", False)]
    assert len(list((tmp_path / "study/superseded").iterdir())) == 2
    assert go()[0] == []  # back to the first: what was moved aside returns
    assert go(other)[0] == []


def test_a_failed_run_stops_only_those_that_need_it_and_is_tried_again(go):
    started, states, ledger = go(a=1)
    assert [name for name, _ in started] == ["a-s1", "b-s1", "e-s1", "f-s1"]
    assert states == {"a": "failed", "b": "finished", "c": "waiting", "d": "waiting", "e": "finished", "f": "finished"}
    assert ledger.runs["a-s1"]["reason"].startswith("data x: no such file; check the path (its output is in ")
    assert ledger.runs["c-s1"]["reason"] == "needs a-s1, which failed"
    assert ledger.runs["d-s1"]["reason"] == "needs c-s1, which did not run"
    assert go()[0] == [("a-s1", False), ("c-s1", True), ("d-s1", False)]


def test_a_diverged_run_is_a_result_and_no_start_for_others(go):
    _, states, ledger = go(b="diverged")
    assert (states["b"], states["e"]) == ("diverged", "waiting")
    assert ledger.runs["b-s1"]["reason"] == "as told"
    assert ledger.runs["e-s1"]["reason"] == "needs b-s1, which diverged"
    assert go()[0] == []


def test_a_cut_run_goes_on_and_a_lost_machine_costs_nothing(go, tmp_path):
    go(b="running")  # as a killed process leaves it
    assert go()[0] == [("b-s1", True), ("e-s1", False)]
    started, states, _ = go({"w": {"runs": {"g": {}}}}, g="lost")
    assert started == [("g-s1", False), ("g-s1", False)]
    assert states == {"g": "finished"}


def test_a_run_stopped_from_outside_is_told_and_goes_on(go):
    _, states, ledger = go(f="stopped")
    assert states["f"] == "stopped"
    with pytest.raises(UserError, match=r"f-s1: stopped from outside; the same command continues"):
        tell(ledger.plan, ledger, list(ledger.runs), interrupted=False)
    tell(ledger.plan, ledger, list(ledger.runs), interrupted=True)
    assert go()[0] == [("f-s1", True)]


def test_a_killed_process_is_told_by_the_name_of_the_signal(go):
    assert go(f=-signal.SIGKILL)[2].runs["f-s1"]["reason"].startswith("ended by SIGKILL (out of memory?)")


def test_the_choice_of_a_search_is_the_lowest_validation_loss_and_never_a_diverged_run(go, tmp_path):
    search = {"s": {"matrix": {"optimizer.name": ["adamw", "sgd"]}, "set": {"optimizer.lr": 1}, "lr_search": [1, 2, 3]}}
    _, _, ledger = go(search, **{"s-adamw-lr2": "diverged"})
    out = ledger.out
    for name, loss in {"s-adamw": 2.0, "s-adamw-lr2": 0.1, "s-adamw-lr3": 1.5, "s-sgd": 1.0}.items():
        file = out / f"runs/{name}-s1/status.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "best_validation_loss": loss}))
    ledger.save()
    choices = json.loads((out / "progress.json").read_text())["choices"]
    assert choices == {"s-lr": {"adamw": "s-adamw-lr3-s1", "sgd": "s-sgd-s1"}}


def test_a_damaged_progress_file_loses_the_times_only(go, tmp_path):
    go()
    (tmp_path / "study/progress.json").write_text('{"runs": {"a-s1"')
    assert go()[0] == []


def test_two_studies_at_once_in_one_directory_are_refused(tmp_path):
    file, out = write_study(tmp_path, "sample", EXPERIMENTS), tmp_path / "study"
    out.mkdir()
    told = f"by process {os.getpid()} on .*a study has only one writer.*--out"
    with one_writer(out, "study"), pytest.raises(UserError, match=told):
        study(str(file), StudyCommand(out=str(out)))
    assert not list(out.iterdir()), "the refused one has written nothing"


# ---- time, devices, view ---------------------------------------------------------------------------------------------


def test_time_comes_from_finished_runs_alike_then_from_others_then_from_the_probe(go):
    _, _, ledger = go(wanted=["a-s1", "b-s1"])
    works = {
        "a-s1": RunWork(100.0, ("k",)),
        "b-s1": RunWork(50.0, ("other",)),
        "f-s1": RunWork(200.0, ("k",)),
        "d-s1": RunWork(10.0, ("new",)),
    }
    ledger.runs["a-s1"]["seconds"], ledger.runs["b-s1"]["seconds"] = 13.0, 53.0
    found = times(works, ledger)
    assert (found["a-s1"].value, found["a-s1"].source) == (13.0, "measured")
    assert (found["f-s1"].value, found["f-s1"].source) == (23.0, "from finished runs of the same kind")
    assert found["d-s1"].value == pytest.approx(3 + 10 * 60 / 150)
    for name in ("a-s1", "b-s1"):
        ledger.runs[name] |= {"state": "waiting", "seconds": 0.0}
    assert times(works, ledger)["f-s1"] is None
    assert times(works, ledger, {"f-s1": 40.0})["f-s1"].value == 8.0
    plan = ledger.plan
    rates = probe(forecasts_of(plan, check_runs(plan)))
    assert set(rates) == set(plan.runs)
    assert min(rates.values()) > 1e7


def test_work_counts_steps_and_estimates_and_only_what_is_left_of_a_continuation(go):
    plan = go(wanted=["f-s1"])[2].plan
    forecasts = forecasts_of(plan, check_runs(plan))
    a, c = (work_of(plan, plan.runs[n], forecasts[n]).operations for n in ("a-s1", "c-s1"))
    assert a / 2 < c < a  # 6 steps, and 3 more without the estimate at step 0
    assert forecasts["d-s1"].setting.shape == forecasts["a-s1"].setting.shape


def test_one_run_a_device_and_shared_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert slot_environment(2, ["0", "5"], 1) == {"CUDA_VISIBLE_DEVICES": "5"}
    assert slot_environment(4, ["0", "5"], 3) == {"CUDA_VISIBLE_DEVICES": "5"}
    assert slot_environment(1, [], 0) == {}
    assert slot_environment(2, [], 1) == {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // 2))}
    assert (Local(None, ["0", "1"]).slots, Local(None, []).slots, Local(3, []).slots) == (2, 1, 3)


def test_two_processes_never_do_one_run(tmp_path, monkeypatch):
    monkeypatch.setattr("tunesmith.study.executors.PATIENCE", 0.3)
    job = Job("r", ["chat", "--help"], str(tmp_path / "r.log"))
    first = launch(job)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        with pytest.raises(UserError, match=r"an earlier process of this run is still writing .*r\.log"):
            launch(job)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert first.wait() == 0
    assert launch(job).wait() == 0


def test_the_live_view_shows_what_runs_and_what_is_left(go, tmp_path, capsys):
    from rich.console import Console

    _, _, ledger = go(wanted=["a-s1"])
    folder = tmp_path / "study/runs/b-s1"
    folder.mkdir(parents=True)
    (folder / "status.json").write_text('{"state": "running", "step": 0, "reason": "", "steps": 40}')
    (folder / "metrics.jsonl").write_text(
        '{"event": "train", "step": 10, "loss": 2.5}\n{"event": "eval", "step": 10}\n{"event": "tr'
    )
    assert Run(folder).position() == (10, 40, 2.5)
    ledger.started("b-s1")
    console = Console(force_terminal=True, width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    view = View(ledger, list(ledger.runs), lambda: 125.0, console)
    console.print(view.draw())
    shown = console.export_text()
    assert "1 of 6 done, 1 running, 4 waiting; about 2.1 min left" in shown
    assert "b-s1" in shown
    assert "step 10/40  loss 2.500" in shown
    assert [span(s) for s in (5, 600, 7200, 400_000)] == ["5 s", "10.0 min", "2.0 h", "4.6 days"]
