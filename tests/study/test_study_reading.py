"""A study's directory as records: halves joined, damage told, memory and minutes with the lines they come from."""

import json
import random

import pytest

from frozen_study import Writer, learning, write_adapter, write_study
from tunesmith.errors import UserError
from tunesmith.files.run import Run
from tunesmith.study.paper.claims import judge_all
from tunesmith.study.paper.experiments import judged, lines_of, predicted_gb
from tunesmith.study.records import KEPT, Point, is_study, read_log, read_study
from tunesmith.study.select import finals
from tunesmith.study.units import comparable


def continued(root, second):
    """A study of one training in two halves of 20 steps; `second`: the lines of the second half."""
    w = Writer(root, seeds=1, steps=20)
    for name, label, lines in (("e1", "first half", learning(20)), ("e1-on", "continued", second)):
        w.run(name, {}, lines)
        w.show("e1", "E1", name, label, 1)
    return read_study(w.finish())


def counted_on():
    return learning(20, first=20)


def with_the_first_half():
    return learning(20) + learning(20, first=20)


def counted_anew():
    return learning(20, start=2.0)


@pytest.mark.parametrize("second", [counted_on, with_the_first_half, counted_anew])
def test_two_halves_are_one_line_whatever_the_second_counts_from(tmp_path, second):
    study = continued(tmp_path, second())
    (line,) = lines_of(study.experiments["e1"], "eval", "validation_loss")
    assert [p.step for p in line.seeds[1]] == list(range(41))
    assert {p.run for p in line.seeds[1] if p.step > 20} == {"e1-on"}
    assert line.label == "first half, then continued"


def test_points_know_their_log_line(tmp_path):
    study = read_study(write_study(tmp_path / "s", seeds=1, only=("e4",)))
    (point,) = [p for p in study.runs["e4-sgd-s1"].series("eval", "validation_loss") if p.step == 20]
    lines = (tmp_path / "s/runs/e4-sgd-s1/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[point.line - 1])["validation_loss"] == point.value
    peak = study.runs["e4-sgd-s1"].peak
    assert json.loads(lines[peak.line - 1])["peak_memory_gb"] == peak.value == max(
        json.loads(line).get("peak_memory_gb", 0) for line in lines
    )  # fmt: skip


def test_minutes_are_those_of_the_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rates = [
        (1, 100, 50.0),
        (2, 200, 100.0),
        (3, 400, 100.0),
    ]  # 2 s, 1 s, 2 s; an estimate or a night between them is none
    records = [{"event": "train", "step": s, "time": 9e5 * s, "tokens": t, "tokens_per_s": r} for s, t, r in rates]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert read_log(Run(tmp_path), "x").minutes == Point(3, pytest.approx(5 / 60), "x", 3)
    path.write_text(
        "".join(json.dumps(r) + "\n" for r in records[1:])
    )  # a continuation: its first line counts both halves
    assert read_log(Run(tmp_path), "x").minutes == Point(3, pytest.approx(2 / 60), "x", 2)


def test_long_logs_are_thinned_but_never_lose_their_end_or_peak(tmp_path):
    path = tmp_path / "metrics.jsonl"
    peak = 3 * KEPT - 2
    records = [
        {"event": "train", "step": s, "loss": 1.0, "peak_memory_gb": 2.0 if s >= peak else 1.0}
        for s in range(1, 3 * KEPT + 1)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    log = read_log(Run(tmp_path), "x")
    assert KEPT <= len(log.lines["train"]) <= KEPT + 2
    assert log.lines["train"][-1]["step"] == 3 * KEPT
    assert log.peak.line == peak
    assert peak in [r["line"] for r in log.lines["train"]]


@pytest.mark.parametrize(
    ("text", "kept", "told"),
    [
        (
            '{"event": "eval", "step": 1, "train_loss": 1.0}\n{"event": "eval", "st',
            1,
            "line 2 is damaged and was left out: the file is cut off",
        ),
        (
            '{"event": "eval", "step": 1}\nnonsense\n{"event": "eval", "step": 2}\n',
            2,
            "line 2 is damaged and was left out",
        ),
        (
            '[1]\n{"event": "eval", "step": 2}\n',
            1,
            "line 1 is damaged and was left out: it holds a list, expected an object",
        ),
        ('{"step": 2}\n', 0, "line 1 is damaged and was left out: it has no event or no step"),
        ("", 0, None),
    ],
)
def test_damaged_lines_are_left_out_and_told(tmp_path, text, kept, told):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    log = read_log(Run(tmp_path), "x")
    assert len(log.lines.get("eval", [])) == kept
    assert [d for d in log.damage if told and told in d] == list(log.damage)
    assert bool(log.damage) == bool(told)


def test_states_come_from_runner_and_run(tmp_path):
    w = Writer(tmp_path, seeds=1, steps=10)
    for name in ("done", "ill", "gone", "later", "half"):
        w.run(name, {}, learning(10), state="waiting" if name == "later" else "finished")
        w.show("mine", "Mine", name, name, 1)
    w.progress["runs"]["ill"] = {"state": "failed", "reason": "no memory left"}
    w.progress["runs"]["half"] = {"state": "running"}
    status = tmp_path / "runs/half/status.json"
    status.write_text(json.dumps({"state": "running", "step": 4}))
    root = w.finish()
    for file in sorted((root / "runs/gone").iterdir()):
        file.unlink()
    (root / "runs/gone").rmdir()
    runs = read_study(root).runs
    assert {n: r.state for n, r in runs.items()} == {
        "done": "finished", "ill": "failed", "gone": "missing", "later": "waiting", "half": "running",
    }  # fmt: skip
    assert runs["ill"].trouble == "failed at step 10: no memory left"
    assert runs["later"].trouble == "not run yet"
    assert runs["done"].trouble == ""


def test_last_values_are_compared_at_a_step_that_all_have(tmp_path):
    w = Writer(tmp_path, seeds=1, steps=20)
    for name, steps in (("short", 20), ("long", 40)):
        w.run(name, {}, learning(steps))
        w.show("e5", "E5", name, name, 1)
    found, left = finals(read_study(w.finish()).experiments["e5"], ["short", "long"], "eval", "validation_loss")
    assert {label: seeds[1].step for label, seeds in found.items()} == {"short": 20, "long": 20}
    assert left == []


def test_two_runs_with_one_label_and_seed_are_both_kept(tmp_path):
    w = Writer(tmp_path, seeds=1, steps=10)
    for name in ("a", "b"):
        w.run(name, {}, learning(10))
        w.show("mine", "Mine", name, "same", 1)
    assert read_study(w.finish()).experiments["mine"].labels == ["same", "same (b)"]


def test_trained_parameters_are_counted_in_the_checkpoint(tmp_path):
    study = read_study(write_study(tmp_path / "s", seeds=1, only=("e5",)))
    assert study.runs["e5-r8-s1"].trained_weights == 8000
    assert study.runs["e5-full-s1"].trained_weights is None
    write_adapter(study.runs["e5-full-s1"].directory, 3)  # an adapter is not what a run of all weights trains
    assert study.runs["e5-full-s1"].trained_weights is None
    (file,) = (tmp_path / "s/runs/e5-r8-s1").rglob("adapter_model.safetensors")
    file.write_bytes(b"\xff" * 40)
    assert study.runs["e5-r8-s1"].trained_weights is None


def test_different_data_in_one_figure_are_told(tmp_path):
    w = Writer(tmp_path, seeds=1, steps=10)
    w.run("a", {"data.seed": 1}, learning(10))
    w.run("b", {"data.seed": 2}, learning(10))
    w.run("c", {"data.name": "hh-static", "eval.iters": 9}, learning(10))
    for name in "abc":
        w.show("mine", "Mine", name, name, 1)
    runs = list(read_study(w.finish()).runs.values())
    assert comparable(runs[:2]) == []  # another order of the same rows is another seed, not other data
    notes = comparable(runs)
    assert len(notes) == 2
    assert "data.name is sample: a, b; hh-static: c" in notes[0]
    assert "the number of rows per estimate is 8: a, b; 9: c" in notes[1]


def test_runs_that_start_from_one_run_each_of_another_seed_are_comparable(tmp_path):
    w = Writer(tmp_path, seeds=1, steps=10)
    for seed, start in ((1, "e1"), (2, "e1"), (3, "e5-r8")):
        w.run(f"dpo-s{seed}", {"model.name": f"/x/runs/{start}-s{seed}"}, learning(10), needs=(f"{start}-s{seed}",))
    runs = list(read_study(w.finish()).runs.values())
    assert comparable(runs[:2]) == []
    assert "model.name is e1: dpo-s1, dpo-s2; e5-r8: dpo-s3" in comparable(runs)[0]


def test_batches_are_compared_on_the_same_rows(tmp_path):
    w = Writer(tmp_path, seeds=2, steps=20)
    for seed in (1, 2):
        for label, size, shift in (("batch 1", 1, 0.0), ("batch 4", 4, 1.0), ("batch 4 = 4 x 1", 1, 0.0)):
            lines = learning(
                20, start=4 + shift, seed=seed
            )  # other rows: another level, of which the batch is innocent
            w.run(f"e7-{label[-5:].replace(' ', '')}-{seed}", {"train.batch_size": size}, lines)
            w.show("e7", "E7", f"e7-{label[-5:].replace(' ', '')}-{seed}", label, seed)
    study = read_study(w.finish())
    verdict = {c.id: f.verdict for c, f in judge_all(study)}["e7-batch"]
    assert verdict.verdict == "holds", verdict
    assert "batch 1 minus batch 4 = 4 x 1" in verdict.evidence
    assert "the number of rows per estimate is 8" in comparable(list(study.runs.values()))[0]


def test_batches_of_different_sizes_are_compared_after_as_many_rows(tmp_path):
    """Batch 1 after 40 steps has read what 4 x 1 has after 10, and lies below it by then; later it would not be alike."""
    w = Writer(tmp_path, seeds=2, steps=40)
    for seed in (1, 2):
        for label, steps, accumulate in (("batch 1", 40, 1), ("batch 4 = 4 x 1", 20, 4)):
            falls = [(step, 4 - step * accumulate / 100 - seed / 1000) for step in range(0, steps + 1, 10)]
            lines = [
                {"event": "eval", "step": step, "train_loss": loss, "validation_loss": loss} for step, loss in falls
            ]
            name = f"e7-{accumulate}-{seed}"
            w.run(name, {"train.batch_size": 1, "train.accumulate": accumulate}, lines)
            w.show("e7", "E7", name, label, seed)
    finding = {c.id: f for c, f in judge_all(read_study(w.finish()))}["e7-batch"]
    assert finding.verdict.verdict == "holds", finding.verdict
    assert {(p.run, p.step) for p in finding.sources} == {(f"e7-{a}-{s}", 40 // a) for a in (1, 4) for s in (1, 2)}


def test_predicted_memory_is_read_in_gb_and_as_the_runner_counts_it():
    gb = {"parameters": 1.5, "gradients": 0.5, "optimizer_state": 3.0, "activations": 2.0, "logits": 0.25}
    counted = {("optimizer" if k == "optimizer_state" else k): int(v * 1e9) for k, v in gb.items()}
    assert predicted_gb(gb) == predicted_gb(counted) == gb
    assert predicted_gb(None) == predicted_gb([]) == {}


def test_answers_of_both_halves_are_one_training(tmp_path):
    study = read_study(write_study(tmp_path / "s", seeds=1, only=("e1",)))
    (one,) = judged(study)
    assert one.best == 40
    assert min(one.at) == 0
    assert max(one.at) == 80
    assert len(one.rewards(80)) == 8


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda p: p.pop("runs"), "is not a study's plan"),
        (lambda p: p["runs"].clear(), "names run 'e6-s1', which `runs` lacks"),
        (lambda p: p["experiments"]["e6"]["runs"][0].pop("label"), "KeyError: 'label'"),
        (lambda p: p.update(experiments=[]), "is not a study's plan"),
    ],
)
def test_a_plan_that_is_none_is_told(tmp_path, change, told):
    root = write_study(tmp_path / "s", seeds=1, steps=10, only=("e6",))
    plan = json.loads((root / "plan.json").read_text())
    change(plan)
    (root / "plan.json").write_text(json.dumps(plan))
    assert is_study(root)
    with pytest.raises(UserError, match=r"plan\.json") as caught:
        read_study(root)
    assert told in str(caught.value)


# ---- the verdicts on whole studies with known truths -----------------------------------------------------------------

TRUTHS = {
    "e1-overfits": "holds", "e1b-rates": "holds", "e2-falls": "holds", "e2-negative": "undecided", "e3-answers": "holds",
    "e4-adam": "holds", "e4-slowest": "holds", "e4-memory": "holds", "e4-time": "holds", "e5-loss": "holds", "e5-reward": "holds",
    "e5-less": "holds", "e5-rank": "holds", "e6-overfits": "holds", "e6-reward": "undecided", "e7-batch": "holds",
    "e7-exact": "holds", "e8-fits": "undecided", "e8-improves": "holds",
}  # fmt: skip
NEED_SEEDS = {"e4-adam", "e4-slowest", "e4-time", "e5-loss", "e5-reward", "e7-batch"}


def test_three_seeds_of_a_study_made_after_the_paper(tmp_path):
    findings = judge_all(read_study(write_study(tmp_path / "s")))
    assert {c.id: f.verdict.verdict for c, f in findings} == TRUTHS
    by_id = {c.id: f for c, f in findings}
    assert by_id["e4-slowest"].left_out == (
        "SGD-momentum, seed 1002 (e4-sgd-momentum-s2): failed at step 40: OSError: no space left on device",
    )
    assert all(f.sources for c, f in findings)


def test_one_seed_tells_nothing_of_methods(tmp_path):
    findings = judge_all(read_study(write_study(tmp_path / "s", seeds=1)))
    told = {c.id: f.verdict.verdict for c, f in findings}
    assert {i for i in told if told[i] != TRUTHS[i]} == NEED_SEEDS
    assert {told[i] for i in NEED_SEEDS} == {"undecided"}


def test_what_was_not_run_cannot_be_told(tmp_path):
    findings = judge_all(read_study(write_study(tmp_path / "s", seeds=1, steps=10, only=("e6",))))
    assert [f.verdict.evidence for c, f in findings if c.id == "e8-fits"] == ["experiment E8 is not in this study"]
    assert {f.verdict.verdict for c, f in findings if not c.id.startswith("e6")} == {"undecided"}


def test_an_unfinished_training_is_not_judged(tmp_path):
    root = write_study(tmp_path / "s", seeds=1, only=("e1",))
    progress = json.loads((root / "progress.json").read_text())
    progress["runs"]["e1-on-s1"]["state"] = "stopped"
    (root / "progress.json").write_text(json.dumps(progress))
    found = {c.id: f for c, f in judge_all(read_study(root))}["e1-overfits"]
    assert found.verdict.evidence == "no finished training"
    assert "stopped at step 80" in found.left_out[0]


@pytest.mark.parametrize(("lift", "verdict"), [(0.5, "holds"), (0.0, "undecided")])
def test_overfitting_is_judged_on_the_batches_that_the_runs_kept(tmp_path, lift, verdict):
    root = write_study(tmp_path / "s", seeds=2, only=("e6",))
    for run in (root / "runs").iterdir():
        (run / "losses").mkdir()
        for step in range(0, 41, 2):
            later = lift * max(0, step - 10) / 30  # on every batch alike, far below the spread of the batches
            parts = [
                [64 * (2 + (17 * b % 10) + later + random.Random(100 * b + step).gauss(0, 0.01)), 64] for b in range(12)
            ]
            (run / "losses" / f"step-{step:08d}.json").write_text(json.dumps(parts))
    found = {c.id: f.verdict for c, f in judge_all(read_study(root))}["e6-overfits"]
    assert found.verdict == verdict, found
    assert "paired over the same batches" in found.evidence


def test_the_opposite_of_the_paper_does_not_hold(tmp_path):
    """SGD learns fastest with the most memory, LoRA is better in loss, DPO ran out of memory."""
    w = Writer(tmp_path, seeds=3, steps=20, scale="full")
    for seed in (1, 2, 3):
        for label, speed, gb in (("AdamW", 0.5, 8.0), ("Adam", 0.2, 8.0), ("SGD", 1.0, 13.0)):
            w.run(f"{label}{seed}", {}, learning(20, speed=speed, memory=gb, seed=seed, seconds=gb))
            w.show("e4", "E4", f"{label}{seed}", label, seed)
        for label, fall, gb in (("rank 1", 2.5, 8.0), ("rank 16", 2.5, 10.0), ("full", 2.0, 7.0)):
            w.run(f"{label}{seed}", {}, learning(20, fall=fall, memory=gb, seed=seed))
            w.show("e5", "E5", f"{label}{seed}", label, seed)
        w.run(f"dpo{seed}", {"dpo.beta": 0.1}, learning(20), state="failed", reason="CUDA out of memory", command="dpo")
        w.show("e8", "E8", f"dpo{seed}", "DPO", seed)
        w.run(f"fast{seed}", {}, learning(20, seed=seed))
        w.show("e1b", "E1b", f"fast{seed}", "lr 1e-2", seed)
    told = {c.id: f.verdict.verdict for c, f in judge_all(read_study(w.finish()))}
    ids = ("e4-adam", "e4-slowest", "e4-memory", "e4-time", "e5-loss", "e5-less", "e5-rank", "e8-fits", "e1b-rates")
    assert {i: told[i] for i in ids} == dict.fromkeys(ids, "does not hold")
