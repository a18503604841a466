"""What is said of a training's memory and time while one waits for it, and how many batches an estimate has by default."""

import dataclasses
import itertools
import re
import shlex
from types import SimpleNamespace

import pytest
import torch
import yaml

import tunesmith as ts
from tiny_runs import comparable, tiny_config
from tunesmith.device import available_memory, resident_memory
from tunesmith.files.names import known_shape
from tunesmith.options.parse import parse
from tunesmith.options.pretraining import PretrainConfig
from tunesmith.options.training import DPOConfig, RewardConfig, SFTConfig
from tunesmith.plan import room
from tunesmith.plan.room import memory_lines
from tunesmith.train.outlook import Outlook
from tunesmith.train.resolve import MOST_ITERS, default_iters, resolve_machine

GB = 10**9
MANY = SimpleNamespace(per_epoch=99, rows_per_epoch=99)

# ---- memory ----------------------------------------------------------------------------------------------------------


def medium(*argv, kind=SFTConfig):
    """A resolved training of gpt2-medium, of which nothing is loaded."""
    config, _ = parse(kind, ["--train.device", "cpu", "--train.precision", "fp32", *argv], prog="test")
    return resolve_machine(dataclasses.replace(config), 1024, 1e-4)


def told(monkeypatch, config, there, rows=MANY):
    """The line, where there is this much in all."""
    monkeypatch.setattr(room, "available_memory", lambda: there - resident_memory())
    (line,) = memory_lines(config, known_shape("gpt2-medium"), rows)
    return line


def gigabytes(text):
    return [float(x) for x in re.findall(r"([\d.]+) GB", text)]


def test_a_training_that_fits_has_one_line(monkeypatch):
    line = told(monkeypatch, medium(), 100 * GB)
    predicted, there = gigabytes(line)
    assert line == f"memory: about {predicted} GB predicted, {there} GB available"
    assert there == pytest.approx(100, abs=0.2)
    assert 5 < predicted < 8  # 355 million parameters, their gradients and AdamW's state are 5.7


@pytest.mark.parametrize("kind", [SFTConfig, DPOConfig, RewardConfig, PretrainConfig])
def test_one_that_does_not_fit_is_warned_of_with_settings_that_do(monkeypatch, kind):
    argv = ["--train.batch_size", "16"]
    line = told(monkeypatch, medium(*argv, kind=kind), 20 * GB)
    assert line.startswith("warning: memory: about ")
    predicted, there, with_these = gigabytes(line)
    assert predicted > there > with_these
    changes = shlex.split(re.search(r"It does with (.*) \(", line)[1])
    asked = [*argv, *changes] if "--train.batch_size" not in changes else changes
    again = told(monkeypatch, medium(*asked, kind=kind), 20 * GB)
    assert again.startswith(f"memory: about {with_these} GB predicted")


def test_a_step_takes_no_more_rows_than_there_are(monkeypatch):
    """However many are asked for; windows are drawn as many as asked for."""
    few = SimpleNamespace(per_epoch=1, rows_per_epoch=3)
    three = told(monkeypatch, medium("--train.batch_size", "3"), 100 * GB)
    assert told(monkeypatch, medium("--train.batch_size", str(10**23)), 100 * GB, few) == three
    windows = SimpleNamespace(per_epoch=None, rows_per_epoch=3)
    assert "may not fit" in told(monkeypatch, medium("--train.batch_size", str(10**23)), 100 * GB, windows)


def test_where_nothing_fits_that_is_said(monkeypatch):
    line = told(monkeypatch, medium(), 2 * GB)
    assert "neither does the leanest setting" in line
    assert "--lora.rank" in line
    assert "--model.block_size" in told(monkeypatch, medium(kind=PretrainConfig), 2 * GB)


def test_what_cannot_be_predicted_is_not(monkeypatch):
    line = told(monkeypatch, medium("--lora.rank", "2", "--lora.targets", "h.0.*"), 100 * GB)
    assert line.startswith("memory: no prediction, because it is not counted for --lora.targets h.0.*")
    monkeypatch.setattr(room, "available_memory", lambda: None)
    assert memory_lines(medium(), known_shape("gpt2-medium"), MANY) == []


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def machine(tmp_path):
    """A /proc with 8 GB available, and a place for cgroups."""

    def made(groups):
        write(tmp_path / "proc", meminfo="MemTotal: 9765625 kB\nMemFree: 1 kB\nMemAvailable: 7812500 kB\n")
        write(tmp_path / "proc/self", cgroup=groups)
        return tmp_path / "proc", tmp_path / "cgroup"

    return made


def test_without_a_limit_the_systems_memory_is_there(machine):
    assert available_memory(*machine("0::/\n")) == 8 * GB


def test_the_closest_limit_of_nested_groups_counts_and_cached_files_do_not(machine):
    proc, groups = machine("0::/a/b\n")
    write(groups / "a/b", memory__max="max\n", memory__current="1000\n", memory__stat="inactive_file 0\n")
    write(
        groups / "a", memory__max=f"{4 * GB}", memory__current=f"{3 * GB}", memory__stat=f"anon 1\ninactive_file {GB}\n"
    )
    assert available_memory(proc, groups) == 2 * GB


def test_a_containers_limit_is_found_where_its_path_is_the_hosts(machine):
    proc, groups = machine("4:memory:/docker/0123\n1:cpu:/docker/0123\n")
    write(
        groups / "memory",
        memory__limit_in_bytes=f"{3 * GB}",
        memory__usage_in_bytes=f"{2 * GB}",
        memory__stat="inactive_file 7\ntotal_inactive_file 0\n",
    )
    assert available_memory(proc, groups) == GB


def test_a_system_without_proc_tells_nothing(tmp_path):
    assert available_memory(tmp_path / "proc", tmp_path) is None


# ---- time ------------------------------------------------------------------------------------------------------------


def test_time_is_told_once_from_the_second_and_third_step_and_the_estimates_made():
    outlook = Outlook(0, steps=1000, eval_every=100, eval_at_start=True, forwards=9.0)
    outlook.estimate_seconds.append(60.0)
    said = [outlook.after_step(seconds) for seconds in (30.0, 2.0, 4.0, 3.0, 3.0)]
    assert said == [
        "",
        "",
        "about 61.5 min in all, 11.0 min of it for estimates",
        "",
        "",
    ]  # 30 + 999 x 3 + 11 x 60 s


def test_a_resumed_run_counts_what_is_left_and_knows_an_estimate_by_its_work():
    outlook = Outlook(450, steps=1000, eval_every=100, eval_at_start=True, forwards=10.0)
    said = [outlook.after_step(2.0) for _ in range(3)]
    assert said[-1] == "about 20.3 min left, 2.0 min of it for estimates"  # 550 x 2 + 6 x 20 s
    assert outlook.estimates() == 6  # 500, 600, ..., 1000


def test_a_training_of_three_steps_is_over_then():
    outlook = Outlook(0, 3, 1, True, 1.0)
    assert [outlook.after_step(1.0) for _ in range(3)] == [""] * 3


# ---- batches of an estimate ------------------------------------------------------------------------------------------


def test_estimates_take_at_most_a_fifth_of_the_steps_and_no_fewer_batches_than_that_allows():
    laws = itertools.product([6, 60, 2000, 40_000], [1, 4], [0, 8], [(5, 3), (400, 20), (9000, 900)], [1, 25, 1000])
    found, configs = set(), {}
    for steps, accumulate, rank, splits, every in laws:
        if (accumulate, rank) not in configs:
            argv = ["--train.accumulate", str(accumulate), "--lora.rank", str(rank)]
            configs[accumulate, rank] = medium(*argv)
        iters = default_iters(configs[accumulate, rank], steps, every, splits)
        step = accumulate * (2 if rank else 3)
        estimates = 1 + -(-steps // every)
        share = [sum(min(n, batches) for batches in splits) * estimates / (steps * step) for n in (iters, iters + 1)]
        assert 1 <= iters <= min(MOST_ITERS, max(splits))
        assert share[0] <= 1 / 5 or iters == 1
        assert share[1] > 1 / 5 or iters == min(MOST_ITERS, max(splits))
        found.add(iters)
    assert {1, 200} < found


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def options():
    return {"eval__iters": None, "eval__every": 6, "train__steps": 12, "checkpoint__every": 6, "data__max_rows": 24}


def test_a_run_says_and_keeps_what_was_chosen_and_a_resumed_one_goes_on_with_it(
    tiny_directory, tmp_path, capfd, options
):
    whole = ts.sft(tiny_config(tiny_directory, tmp_path / "whole", **options))
    out = capfd.readouterr().out.splitlines()
    chosen = whole.config["eval"]["iters"]
    assert chosen == 1  # 3 x 12 passes, a fifth of them for 3 estimates of two splits
    assert out[next(i for i, line in enumerate(out) if "parameters" in line)].endswith(
        "12 steps, estimates every 6 on 1 batch of a split"
    )
    (memory,) = [i for i, line in enumerate(out) if line.startswith("memory: about ")]
    (time,) = [i for i, line in enumerate(out) if re.match(r"about .* in all, .* of it for estimates$", line)]
    assert memory < out.index(next(line for line in out if line.startswith("step 0:"))) < time

    ts.sft(tiny_config(tiny_directory, tmp_path / "parts", **{**options, "train__steps": 6}))
    file = tmp_path / "parts/config.yaml"
    assert yaml.safe_load(file.read_text())["eval"]["iters"] == chosen
    capfd.readouterr()
    parts = ts.sft(tiny_config(tiny_directory, tmp_path / "parts", **options, resume=True))
    assert re.search(r"^about .* left", capfd.readouterr().out, re.M)
    assert comparable(parts) == comparable(whole)


def test_a_run_from_before_keeps_its_two_hundred(tiny_directory, tmp_path, options):
    ts.sft(tiny_config(tiny_directory, tmp_path / "r", **{**options, "eval__iters": 200, "train__steps": 6}))
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **options, resume=True))
    assert run.config["eval"]["iters"] == 200


def test_a_card_tells_its_own_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GB, 16 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GB)
    place = room._place(torch.device("cuda"))
    assert (place.cpu, place.memory - place.base) == (False, 12 * GB)
