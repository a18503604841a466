"""What a report says of experiments of one's own: units, differences between the labels, intervals, the result in a sentence."""

import csv
import io
import json
import re

import numpy as np
import pytest

from frozen_study import Writer, learning, preferring, scored
from made_studies import own_study, preference_study
from tunesmith.stats import t_interval, t_quantile
from tunesmith.study.figures import draw_all, own_figures
from tunesmith.study.own import conclusion, difference_over_batches, differences_of, overview, own_tables
from tunesmith.study.records import Point, read_study
from tunesmith.study.report import render_study_report
from tunesmith.study.tables import as_csv, of_seeds


def trial(root):
    return read_study(root).experiment("trial")


def drawn(study):
    return draw_all(study, own_figures(study.experiment("trial")))["trial"]


def said(tmp_path, last, **more):
    return conclusion(trial(own_study(tmp_path / "study", last, **more)))


# ---- differences -----------------------------------------------------------------------------------------------------


def test_labels_are_held_against_each_other_seed_by_seed(tmp_path):
    e = trial(own_study(tmp_path / "study", {"a": [2.0, 2.2, 2.1], "b": [2.1, 2.32, 2.2]}, batches=False))
    (found,) = differences_of(e, [("b", "a")])
    gaps = [0.1, 0.12, 0.1]
    half = t_quantile(2) * np.std(gaps, ddof=1) / np.sqrt(3)
    assert found.by_seed.mean == pytest.approx(np.mean(gaps), abs=2e-4)
    assert (found.by_seed.low, found.by_seed.high) == pytest.approx(
        (np.mean(gaps) - half, np.mean(gaps) + half), abs=1e-3
    )
    assert (found.by_batch, found.apart) == (None, True)
    assert [p.run for p in found.points] == ["b-s1", "b-s2", "b-s3", "a-s1", "a-s2", "a-s3"]


def test_over_batches_what_is_hard_for_both_falls_out():
    """Batches of very different losses: unpaired, their spread of 3 would hide the difference of 0.1."""
    hard = [1.0, 4.0, 2.0, 7.0, 3.0]
    a, b = (
        [[(50 * (x + 0.1 + e), 50) for x, e in zip(hard, (0, 0.01, -0.01, 0, 0), strict=True)]],
        [[(50 * x, 50) for x in hard]],
    )
    found = difference_over_batches(a, b)
    assert found.mean == pytest.approx(0.1)
    assert 0.08 < found.low < 0.1 < found.high < 0.12


@pytest.mark.parametrize("other", [[], [(1.0, 10)], [(1.0, 10), (1.0, 11)]], ids=["none", "one", "other counts"])
def test_batches_that_are_not_the_same_are_not_paired(other):
    assert difference_over_batches([[(1.0, 10), (2.0, 10)]], [other]) is None


def test_batches_that_all_seeds_share_count_once():
    """Two seeds on the same two batches are two batches measured twice, not four."""
    a, b = [(3.0, 10), (5.0, 10)], [(2.0, 10), (2.0, 10)]
    assert difference_over_batches([a, a], [b, b]) == difference_over_batches([a], [b])
    assert difference_over_batches([a, a], [b, b]).n == 2
    other = [(3.0, 9), (5.0, 11)]
    assert difference_over_batches([a, other], [b, [(2.0, 9), (2.0, 11)]]).n == 4


def test_runs_on_different_rows_are_not_paired_over_batches(tmp_path):
    root = own_study(tmp_path / "study", {"a": [2.0, 2.2], "b": [2.1, 2.3]})
    assert differences_of(trial(root), [("a", "b")])[0].by_batch is not None
    config = root / "runs/b-s1/config.yaml"
    config.write_text(config.read_text().replace("split_seed: 1", "split_seed: 9"))
    assert differences_of(trial(root), [("a", "b")])[0].by_batch is None


def test_the_table_of_differences_stands_on_the_page_and_beside_it(tmp_path):
    root = own_study(tmp_path / "study", {"a": [2.0, 2.01, 2.0], "b": [2.1, 2.12, 2.1], "c": [2.0, 2.02, 1.99]})
    page, _, tables = render_study_report(read_study(root))
    (table,) = [t for t in tables if t.name == "table-trial-differences"]
    rows = list(csv.reader(io.StringIO(as_csv(table))))
    assert [(row[0], row[-1]) for row in rows[1:]] == [
        ("a minus b", "lower"), ("a minus c", "cannot be told apart"), ("b minus c", "higher"),
    ]  # fmt: skip
    assert rows[0][1] == "difference, nats per target token"
    assert 'id="table-trial-differences"' in page
    assert "a minus b" in page


def test_of_many_labels_each_is_held_against_the_lowest(tmp_path):
    last = {f"r{n}": [2 + n / 10, 2.01 + n / 10] for n in (3, 1, 0, 2, 4, 5, 6, 7)}
    table = own_tables(trial(own_study(tmp_path / "study", last, batches=False)))[1]
    assert [row[0].text for row in table.rows] == [f"r{n} minus r0" for n in (3, 1, 2, 4, 5, 6, 7)]
    assert "Of 8 labels, each is compared with the one with the lowest loss" in table.caption


# ---- the result in a sentence ----------------------------------------------------------------------------------------


def test_the_best_label_is_named_with_its_interval(tmp_path):
    told = said(tmp_path, {"a": [2.0, 2.01, 2.0], "b": [2.1, 2.12, 2.1]})
    assert re.match(
        r"a has the lowest validation loss, 2\.003 \[1\.989, 2\.018\] nats per target token: 0\.10\d \[0\.0", told
    )
    assert "less than b" in told
    assert told.endswith("Intervals: 95 %, paired over 3 seeds.")


def test_what_cannot_be_told_apart_is_said_so(tmp_path):
    told = said(tmp_path, {"a": [2.0, 2.1, 2.2], "b": [2.1, 2.0, 2.25]})
    assert told.startswith("No difference between the labels is distinguishable from chance: a is lowest with 2.100")
    assert "not clearly below b (0.017 [-" in told


def test_some_labels_are_apart_and_some_are_not(tmp_path):
    told = said(tmp_path, {"a": [2.0, 2.01, 2.0], "b": [2.5, 2.52, 2.5], "c": [2.0, 2.02, 1.99]})
    assert "less than b. Not distinguishable from it:" in told
    assert "jointly" in told


def test_intervals_of_many_comparisons_are_wider_than_those_of_one(tmp_path):
    """The lowest of several was picked by looking: the same two labels may be apart alone, and not among eight."""
    two = {"a": [2.0, 2.01, 2.0], "b": [2.03, 2.025, 2.03]}
    assert said(tmp_path / "two", two, batches=False).startswith("a has the lowest")
    many = two | {f"x{n}": [3.0, 3.001, 3.0] for n in range(6)}
    assert "Not distinguishable from it: b" in said(tmp_path / "many", many, batches=False)


def test_one_seed_speaks_of_its_batches_and_says_so(tmp_path):
    told = said(tmp_path, {"a": [2.0], "b": [2.1]})
    assert told.startswith("a has the lowest validation loss, 2.000 nats per target token: 0.1")
    assert told.endswith("over the validation batches of one seed; other seeds may reverse the order.")


def test_one_seed_without_batches_decides_nothing(tmp_path):
    told = said(tmp_path, {"a": [2.0], "b": [2.1]}, batches=False)
    assert told.startswith("No difference between the labels is distinguishable from chance")
    assert told.endswith("the effect of another seed is unknown.")


def test_labels_measured_on_different_data_are_not_ranked(tmp_path):
    told = said(tmp_path, {"a": [2.0, 2.0], "b": [2.1, 2.1]}, b={"data.block_size": 64})
    assert told.startswith("The labels' losses cannot be compared")


def test_before_the_end_and_alone(tmp_path):
    w = Writer(tmp_path / "study", seeds=1, steps=10)
    w.run("a", {}, [], state="waiting")
    w.show("trial", "A trial", "a", "a", 1)
    assert conclusion(trial(w.finish())) == "No run has finished, so there is nothing to compare yet."
    assert "no other label to compare it with" in said(tmp_path / "one", {"a": [2.0, 2.1]})


def test_a_label_without_a_finished_run_is_named(tmp_path):
    root = own_study(tmp_path / "study", {"a": [2.0, 2.1], "b": [2.1, 2.2], "c": [1.0, 1.0]})
    progress = json.loads((root / "progress.json").read_text())
    for n in (1, 2):
        progress["runs"][f"c-s{n}"] |= {"state": "diverged", "reason": "made so"}
    (root / "progress.json").write_text(json.dumps(progress))
    assert conclusion(trial(root)).endswith("Without a finished run: c.")


def test_rewards_decide_beside_the_loss(tmp_path):
    w = Writer(tmp_path / "study", seeds=1, steps=10)
    for label, level in (("shy", 0.0), ("bold", 1.0)):
        lines, answers = scored(learning(10), lambda share, level=level: level, seed=3, scorer="a judge")
        w.run(label, {}, lines, answers=answers, choice={"best_step": 10, "by": "reward"})
        w.show("trial", "A trial", label, label, 1)
    told = conclusion(trial(w.finish()))
    assert "bold has the highest mean reward, 1." in told
    assert "scored by a judge: 1.000 (1.000 to 1.000) above shy." in told


def test_rewards_of_different_scorers_are_not_compared(tmp_path):
    w = Writer(tmp_path / "study", seeds=1, steps=10)
    for label in ("one", "two"):
        lines, answers = scored(learning(10), lambda share: share, seed=3, scorer=f"judge {label}")
        w.run(label, {}, lines, answers=answers)
        w.show("trial", "A trial", label, label, 1)
    assert "reward" not in conclusion(trial(w.finish()))


def test_the_page_begins_with_the_result(tmp_path):
    root = own_study(tmp_path / "study", {"a": [2.0, 2.01, 2.0], "b": [2.1, 2.12, 2.1]})
    page = render_study_report(read_study(root))[0]
    lead = re.search(r'<section id="summary"><h2>Summary</h2><p class="lead">(.*?)</p>', page)[1]
    assert lead.startswith("a has the lowest validation loss")
    assert page[page.index('<section id="trial">') :].index(lead) < 200  # and its own section too


# ---- units -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["dpo", "reward"])
def test_the_loss_of_pairs_is_in_nats_a_pair(tmp_path, command):
    root = preference_study(tmp_path / "study", command)
    page, plates, tables = render_study_report(read_study(root))
    by_name = {plate.name: plate for plate in plates}
    for name in ("figure-trial-train", "figure-trial-validation"):
        assert "loss, nats per pair" in by_name[name].svg
        assert "per target token" not in by_name[name].svg
    assert "pairs with" not in by_name["figure-trial-preferences"].svg
    assert "share with the chosen ahead" in by_name["figure-trial-preferences"].svg
    heads = [h for t in tables if t.name.startswith("table-trial") for h in t.head]
    assert "validation loss, nats per pair" in heads
    assert "accuracy, % of the pairs" in heads
    assert "nats per pair" in re.search(r'class="lead">(.*?)</p>', page)[1]


def test_losses_of_tokens_and_of_pairs_stand_in_figures_of_their_own(tmp_path):
    w = Writer(tmp_path / "study", seeds=1, steps=10)
    w.run("tuned", {}, learning(10))
    w.run("aligned", {"dpo.beta": 0.1}, preferring(10, seed=1), command="dpo")
    for label in ("tuned", "aligned"):
        w.show("trial", "A trial", label, label, 1)
    study = read_study(w.finish())
    shown = {plate.name: plate.svg for plate in drawn(study)}
    assert "nats per target token" in shown["figure-trial-validation"]
    assert "aligned" not in shown["figure-trial-validation"]
    assert "nats per pair" in shown["figure-trial-validation-pairs"]
    assert "tuned" not in shown["figure-trial-validation-pairs"]
    told = conclusion(study.experiment("trial"))
    assert "Losses in nats per target token: the last validation loss of tuned" in told
    assert "Losses in nats per pair: the last validation loss of aligned" in told
    assert [row[-1].text for row in overview(study).rows] == ["nats per target token", "nats per pair"]


def test_dpo_losses_of_different_strength_are_not_ranked_but_their_accuracies_are_told(tmp_path):
    root = preference_study(tmp_path / "study", settings={"strong": {"dpo.beta": 0.5}})
    told = conclusion(trial(root))
    assert told.startswith("The labels' losses cannot be compared, as they differ in dpo.beta.")
    assert "Pairs with the chosen answer ahead: weak 86.0 % [82.3, 89.1]; strong 86.0 % [82.3, 89.1]." in told
    assert any("not comparable: dpo.beta is 0.1: weak-s1, weak-s2; 0.5: strong-s1, strong-s2" in n
               for plate in drawn(read_study(root)) for n in plate.notes)  # fmt: skip


def test_losses_that_are_not_in_nats_are_not_called_so(tmp_path):
    root = preference_study(tmp_path / "study", settings={"strong": {"dpo.loss": "ipo"}})
    shown = {plate.name: plate.svg for plate in drawn(read_study(root))}
    assert "loss, a pair (ipo)" in shown["figure-trial-validation-ipo"]
    assert "nats" not in shown["figure-trial-validation-ipo"]
    assert "loss, nats per pair" in shown["figure-trial-validation-pairs"]


def test_the_robust_loss_may_be_negative(tmp_path):
    e = trial(preference_study(tmp_path / "study", settings={"strong": {"dpo.loss": "robust"}}))
    assert [e.line(label, "eval", "validation_loss").signed for label in ("weak", "strong")] == [False, True]


def test_the_caption_says_whose_validation_rows_they_are(tmp_path):
    root = own_study(tmp_path / "study", {"a": [2.0, 2.1], "b": [2.1, 2.2]})
    assert "with the same validation rows in all runs." in drawn(read_study(root))[1].caption
    for config in root.glob("runs/*/config.yaml"):  # as studies were before
        config.write_text(config.read_text().replace("split_seed: 1", "split_seed: null"))
    caption = drawn(read_study(root))[1].caption
    assert "different validation rows for each seed." in caption
    root = own_study(tmp_path / "two", {"a": [2.0], "b": [2.1]}, b={"data.name": "other"})
    assert drawn(read_study(root))[1].caption == "Estimates on the same rows at every step. One seed."


# ---- intervals -------------------------------------------------------------------------------------------------------


def test_no_interval_of_what_cannot_be_negative_goes_below_0():
    points = [Point(1, value, "run", 1) for value in (0.1, 0.4)]
    cell = of_seeds(points, 2)
    assert cell.value.low == 0.0
    assert cell.value.high == t_interval([0.1, 0.4]).high
    assert of_seeds(points, signed=True).value.low < 0


def test_an_interval_that_ends_at_0_covers_as_often():
    rng = np.random.default_rng(0)
    draws = rng.gamma(4.0, 0.25, (4000, 3))  # mean 1, skewed, never negative
    plain = np.mean([1.0 in t_interval(x) for x in draws])
    ended = np.mean([1.0 in t_interval(x, at_least=0.0) for x in draws])
    assert ended == plain
    assert min(t_interval(x, at_least=0.0).low for x in draws) == 0.0


def test_tables_and_bands_of_a_study_stay_above_0(tmp_path):
    root = own_study(tmp_path / "study", {"a": [0.02, 0.5, 0.03], "b": [0.4, 0.02, 0.6]}, batches=False)
    e = trial(root)
    for row in own_tables(e)[0].rows:
        assert all(cell.value.low >= 0 for cell in row[1:] if cell.value)
    line = e.line("a", "eval", "validation_loss")
    assert not line.signed
    assert e.line("a", "eval", "validation_margin").signed
