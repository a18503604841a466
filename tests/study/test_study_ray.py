"""`--executor ray` on a real Ray cluster of two nodes on this machine."""

import json
import os
import signal

import pytest

from hanging import HANGS, wait_for
from real_studies import LONG, study_process, write_study
from tunesmith.__main__ import main
from tunesmith.files.run import Run
from tunesmith.study.executors import Job
from tunesmith.study.on_ray import OnRay

ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'tunesmith[ray]')")

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    two = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    two.add_node(num_cpus=1)
    yield two
    two.shutdown()


def test_a_study_runs_on_both_nodes_and_equals_the_local_one(cluster, tiny_directory, tmp_path, capfd):
    experiments = {
        "a": {"runs": {"x{optimizer.lr}": {"matrix": {"optimizer.lr": [1e-3, 2e-3]}}}},
        "b": {"command": "dpo", "set": {"model.name": "@x0.001", "train.steps": 2}},
        "c": {"runs": {"bad": {"set": {"data.name": str(tmp_path / "gone.jsonl")}}}},
    }
    file, out = write_study(tmp_path, tiny_directory, experiments), tmp_path / "study"
    argv = ["study", str(file), "--out", str(out)]
    (out / "logs").mkdir(parents=True)
    (out / "logs" / "b-s1.log.stop").write_text(".")  # left by a study that was cut off: nobody's wish any more
    assert main([*argv, "--executor", "ray", "--ray_address", cluster.address]) == 1
    told = capfd.readouterr()
    assert "1 of 4 runs failed. bad-s1: " in told.err
    assert "gone.jsonl" in told.err
    states = {name: run["state"] for name, run in json.loads((out / "progress.json").read_text())["runs"].items()}
    assert states == {"x0.001-s1": "finished", "x0.002-s1": "finished", "bad-s1": "failed", "b-s1": "finished"}
    machines = {line.split("(")[1][:6] for line in told.out.splitlines() if " on " in line}
    assert len(machines) == 2
    assert not ray.is_initialized()
    assert main(argv) == 1  # the same file on this machine: only the failed one is tried again
    assert [line.split(":")[0] for line in capfd.readouterr().out.splitlines() if line.endswith("starts")] == ["bad-s1"]


def test_interrupted_on_the_cluster_the_runs_save_and_stop(cluster, tiny_directory, tmp_path):
    endless = {**LONG, "train.steps": 100_000}
    experiments = {"x": {"runs": {"a": {"set": endless}, "b": {"set": {**endless, "optimizer.lr": 2e-3}}, "c": {}}}}
    file, out = write_study(tmp_path, tiny_directory, experiments), tmp_path / "study"
    process = study_process(file, out, "--executor", "ray", "--ray_address", cluster.address)
    both = [Run(out / f"runs/{name}-s1") for name in "ab"]
    wait_for(lambda: all((r.path / "metrics.jsonl").exists() and len(r.metrics("train")) > 3 for r in both), process)
    process.send_signal(signal.SIGINT)
    printed, complaints = process.communicate(timeout=HANGS)
    assert (process.returncode, complaints) == (130, "tunesmith: interrupted\n"), printed
    states = {name: run["state"] for name, run in json.loads((out / "progress.json").read_text())["runs"].items()}
    assert states == {"a-s1": "stopped", "b-s1": "stopped", "c-s1": "waiting"}
    assert all(r.checkpoints()[-1][0] == r.status["step"] for r in both)


def test_a_lost_machine_hands_its_run_back(cluster, tmp_path):
    """A third node is taken away while it works: the job is reported as one to be started again."""
    third = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    executor = OnRay(None, cluster.address)
    try:
        assert executor.slots == 3
        everywhere = executor.machines
        executor.machines = {third.node_id: everywhere[third.node_id]}
        argv = [
            "sft",
            "--model.name",
            "sample",
            "--data.name",
            "sample",
            "--train.steps",
            "100000",
            "--out",
            str(tmp_path / "r"),
        ]
        executor.start(Job("r", argv, str(tmp_path / "r.log"), directory=str(tmp_path)))
        executor.machines = everywhere
        wait_for(lambda: (tmp_path / "r/status.json").exists())
        cluster.remove_node(third)
        lost = []
        wait_for(lambda: lost.extend(executor.ended()) or lost)
        assert [(e.name, e.again, "was lost" in e.trouble) for e in lost] == [("r", True, True)]
        assert executor.free()
        assert executor.slots == 2
        wait_for(lambda: Run(tmp_path / "r").status["state"] == "stopped")  # orphaned, it saves and ends
    finally:
        executor.close()


def test_without_a_cluster_it_says_how_to_start_one(tiny_directory, tmp_path, capfd):
    file = write_study(tmp_path, tiny_directory, {"x": {}})
    argv = ["study", str(file), "--out", str(tmp_path / "s"), "--executor", "ray", "--ray_address", "127.0.0.1:1"]
    assert main(argv) == 1
    error = capfd.readouterr().err.splitlines()
    assert len(error) == 1
    assert error[0].startswith("tunesmith: --executor ray: nothing answers at 127.0.0.1:1")
    assert "ray start --head" in error[0]
