"""Pages as they are looked at: answers in equal columns with any text, on a phone, at a desk and on paper, and the result on top."""

import json
import re
import shutil
import subprocess

import pytest

from browser import browser, measured, print_pdf
from frozen_study import PROMPTS, Writer, learning, scored
from made_runs import LONG, write_run
from made_studies import preference_study
from tunesmith.files.answers import ScoredAnswer
from tunesmith.files.run import Run
from tunesmith.judge.language_model import Judgement
from tunesmith.judge.two_models import Comparison, PromptResult
from tunesmith.judge.two_models_page import render_comparison
from tunesmith.page import STYLE
from tunesmith.study.outcome import result_of_run, result_of_runs
from tunesmith.study.records import read_study
from tunesmith.study.report import render_report, render_study_report, tables_of

TEXTS = [
    LONG * 20 + " LASTWORD", "short", "", "tab\tand\n    indented line\n" * 5, "https://example.org/" + "a/" * 200, "日本語の文章" * 80,
    "<b>markup</b> &amp;",
    "\u00a0".join(["hard", "spaces"] * 60), "👩‍👩‍👧‍👦" * 60, "no_break_" * 40, "word " * 400,
]  # fmt: skip


def run_page(tmp_path):
    """A run whose answers at three steps are short where the others are long."""
    run = write_run(tmp_path / f"run-{LONG}", answers={0: TEXTS, 2: TEXTS[::-1], 4: ["fine."] * len(TEXTS)})
    return render_report([run, write_run(tmp_path / "other", losses=(4.0, 3.2, 3.4))])


def study_page(tmp_path):
    """A study whose answers side by side hold the same texts."""
    w = Writer(tmp_path / "study", seeds=1, steps=10)
    lines, answers = scored(learning(10), lambda share: share, seed=1)
    for records in answers.values():
        for record, text in zip(records, TEXTS, strict=False):
            record["answer"] = text
    for key, label in (("e2", "fine-tuning"), ("e5", "rank 1"), ("mine", LONG)):
        w.run(f"{key}-s1", {"lora.rank": 1}, lines, answers=answers)
        w.show(key, f"Experiment {LONG}", f"{key}-s1", label, 1)
    return render_study_report(read_study(w.finish()))[0]


def comparison_page(_tmp_path):
    """A comparison of the same texts, each against the one that follows it."""
    rows = [
        PromptResult(
            ScoredAnswer(f"Prompt {LONG if i == 1 else i}", "g", a, "stop", 9, 0.1 * i),
            ScoredAnswer(f"Prompt {LONG if i == 1 else i}", "g", b, "length", 9, 0.2 * i),
            Judgement(("a", "b"), (a, b)),
            ([(f" {a}", -1.0, -2.0)], [(f" {b}", -1.0, -0.4)]),
        )
        for i, (a, b) in enumerate(zip(TEXTS, [*TEXTS[1:], TEXTS[0]], strict=True))
    ]
    return render_comparison(
        Comparison((f"runs/{LONG}", "runs/other"), rows, f"judge {LONG}", f"model-{LONG}", "greedy")
    )


PAGES = {"run": run_page, "study": study_page, "comparison": comparison_page}


@pytest.mark.long
@pytest.mark.parametrize("kind", PAGES)
@pytest.mark.parametrize(("width", "most"), [(390, 1), (1280, 4)])
def test_answers_stand_in_equal_columns_and_nothing_leaves_the_page(kind, width, most, tmp_path):
    found = measured(PAGES[kind](tmp_path), width, tmp_path)
    assert (found["width"], found["page"]) == (width, 0)
    assert (found["outside"], found["spilling"]) == ([], [])
    assert len(found["columns"]) >= 6
    for row in found["columns"]:
        widths = {w for _, w in row}
        assert max(widths) - min(widths) <= 1, f"columns of {sorted(widths)} pixels"
        assert min(widths) >= 190
        assert len({left for left, _ in row}) == (1 if most == 1 else min(len(row), most))


@pytest.mark.long
@pytest.mark.parametrize("kind", PAGES)
def test_on_paper_nothing_scrolls_and_nothing_is_cut_off(kind, tmp_path):
    found = measured(PAGES[kind](tmp_path), 700, tmp_path, paper=True)  # A4 between its margins
    assert found["page"] == 0
    assert (found["outside"], found["spilling"], found["scrolling"]) == ([], [], [])
    for row in found["columns"]:
        widths = {w for _, w in row}
        assert max(widths) - min(widths) <= 1


@pytest.mark.long
@pytest.mark.parametrize("kind", PAGES)
def test_the_last_words_of_every_answer_are_in_the_pdf(kind, tmp_path):
    browser()
    if shutil.which("pdftotext") is None:
        pytest.skip("no pdftotext on this machine (Debian: apt-get install poppler-utils)")
    page = tmp_path / "page.html"
    page.write_text(PAGES[kind](tmp_path), encoding="utf-8")
    pdf = print_pdf(page, tmp_path)
    text = subprocess.run(["pdftotext", "-raw", str(pdf), "-"], capture_output=True, text=True, check=True).stdout
    solid = re.sub(r"\s", "", text)
    assert solid.count("wordwithoutend") >= 100  # the long word, whole, over its lines
    assert "LASTWORD" in solid
    assert "<b>markup</b>&amp;" in solid


def test_the_style_keeps_columns_equal_and_paper_without_scroll_areas():
    """What holds where no browser is at hand to measure it."""
    assert re.search(
        r"\.answers \{[^}]*grid-template-columns: repeat\(auto-fit, minmax\(min\(13rem, 100%\), 1fr\)\)", STYLE
    )
    assert re.search(r"\.answers div \{[^}]*min-width: 0;[^}]*overflow-wrap: anywhere", STYLE)
    on_paper = STYLE[STYLE.index("@media print") :]
    assert ".plot, .wide { overflow: visible; }" in on_paper
    assert re.search(r"pre \{ overflow: visible; white-space: pre-wrap;", on_paper)
    comparison = comparison_page(None)
    assert "grid-template-columns: repeat(2, minmax(0, 1fr))" in comparison


def test_answers_of_a_run_are_blocks_of_a_prompt_and_its_columns(tmp_path):
    page = render_report([write_run(tmp_path / "run", answers={0: ["a <b>"], 2: [""]})])
    block = re.search(r'<p class="prompt">(.*?)</p><div class="answers">(.*?)</div></div>', page, re.S)
    assert "Prompt 0" in block[1]
    assert block[2] == (
        "<div><b>step 0, the base</b>a &lt;b&gt;<small>ended by itself</small></div>"
        "<div><b>step 2</b><i>nothing</i><small>ended by itself</small>"
    )


def test_a_lost_answer_does_not_move_the_others_under_another_prompt(tmp_path):
    run = write_run(tmp_path / "run", answers={0: ["a0", "a1", "a2"], 2: ["b0", "b1", "b2"]})
    file = run.path / "answers/step-00000002.jsonl"
    file.write_text("{damaged\n" + "".join(file.read_text().splitlines(keepends=True)[1:]))
    page = render_report([run])
    blocks = re.findall(r'<div class="answers">(.*?)</div></div>', page, re.S)
    assert ["no answer" in b for b in blocks] == [True, False, False]
    assert ["a1" in b and "b1" in b for b in blocks] == [False, True, False]


# ---- the result on top of a report of runs ---------------------------------------------------------------------------


def lead(page):
    return re.search(r'</h1>\n<p class="lead">(.*?)</p>', page)[1]


def test_the_best_checkpoint_by_loss_with_its_interval(tmp_path):
    told = result_of_run(write_run(tmp_path / "run"))
    assert re.fullmatch(
        r"Best checkpoint by validation loss: step 2 of 4, 3\.\d{3} \(2\.\d{3} to 3\.\d{3}\) nats per target token; "
        r"0\.(89|90)\d \(0\.8\d\d to 0\.9\d\d\) below step 0\. Not distinguishable from it: .*|.* below step 0\.",
        told,
    ), told


def test_without_the_losses_of_batches_there_is_no_interval_and_that_is_said(tmp_path):
    told = result_of_run(write_run(tmp_path / "run", batches=False))
    assert told == (
        "Best checkpoint by validation loss: step 2 of 4, 3.100 nats per target token; 0.900 below step 0 "
        "(no interval: losses per batch were not kept)."
    )


def test_of_a_single_batch_there_is_no_interval_and_that_is_said(tmp_path):
    run = write_run(tmp_path / "run")
    for file in (run.path / "losses").iterdir():
        file.write_text(json.dumps(json.loads(file.read_text())[:1]))
    assert result_of_run(Run(run.path)).endswith(" below step 0 (no interval: an estimate was one batch).")


def test_a_run_that_learned_nothing_says_so(tmp_path):
    told = result_of_run(write_run(tmp_path / "run", losses=(3.0, 3.1, 3.3)))
    assert "step 0, the untrained starting model, with 3.0" in told
    assert "none of the 2 later estimates is lower" in told


def test_a_fall_that_may_be_chance_is_called_so(tmp_path):
    told = result_of_run(write_run(tmp_path / "run", losses=(3.0, 2.999, 3.001)))
    assert "That is not clearly below step 0: the difference of 0.00" in told


def test_the_choice_of_the_run_is_what_is_told(tmp_path):
    choice = {"best_step": 4, "by": "reward", "not_distinguishable": [0, 2], "overfitting_since": None}
    lines = [
        {"event": "reward", "step": 4, "time": 0.0, "mean": 0.5, "low": 0.25, "high": 0.75, "n": 40, "scorer": "s"}
    ]
    run = write_run(tmp_path / "run", status={"choice": choice}, lines=lines)
    assert result_of_run(run) == (
        "Best checkpoint by reward: step 4, mean reward 0.500 (0.250 to 0.750) on 40 prompts. "
        "Not distinguishable from it: steps 0 and 2."
    )
    assert lead(render_report([run])) == result_of_run(run)


@pytest.mark.parametrize(("state", "words"), [("diverged", "The run ended early: diverged at step 4."), ("running", "The run has not ended.")])  # fmt: skip  # noqa: E501
def test_a_run_that_did_not_finish_says_that_too(tmp_path, state, words):
    assert result_of_run(write_run(tmp_path / "run", status={"state": state})).endswith(words)


def test_preference_runs_tell_their_accuracy_in_their_unit(tmp_path):
    root = preference_study(tmp_path / "study", seeds=1)
    told = result_of_run(Run(root / "runs/weak-s1"))
    assert "nats per pair, accuracy 86.0 % (82.3 to 89.1)" in told


def test_of_several_runs_on_the_same_rows_the_lowest_loss_is_named(tmp_path):
    runs = [write_run(tmp_path / name, losses=(4.0, loss)) for name, loss in (("one", 3.1), ("two", 2.5))]
    told = result_of_runs(runs)
    assert re.fullmatch(
        r"two at step 2 has the lowest validation loss, 2\.\d+ \(.*?\) nats per target token: 0\.\d+ \(0\.5\d+ to 0\.6\d+\) below one\.",
        told,
    ), told
    assert lead(render_report(runs)) == told


def test_runs_that_cannot_be_told_apart_are_called_so(tmp_path):
    runs = [write_run(tmp_path / name, losses=(4.0, loss)) for name, loss in (("one", 3.001), ("other", 3.0))]
    assert "Not distinguishable from it: one (0.00" in result_of_runs(runs)


def test_runs_on_different_data_are_not_ranked(tmp_path):
    runs = [write_run(tmp_path / n, config={"data": {"name": n, "seed": 1}}) for n in ("one", "two")]
    assert result_of_runs(runs).startswith("No two of these runs can be compared")


def test_rewards_of_one_scorer_are_compared_prompt_by_prompt(tmp_path):
    runs = []
    for name, level in (("low", 0.0), ("high", 1.0)):
        lines, answers = scored(learning(10), lambda share, level=level: level, seed=3, scorer="a judge")
        w = Writer(tmp_path / name, seeds=1, steps=10)
        runs.append(
            Run(w.run(name, {"data.name": name}, lines, answers=answers, choice={"best_step": 10, "by": "reward"}))
        )
    told = result_of_runs(runs)
    assert told.startswith("high has the highest mean reward, 1.")
    assert f"on {len(PROMPTS)} prompts, scored by a judge: 1.000 (1.000 to 1.000) above low." in told


def test_the_line_is_the_same_when_rendered_again(tmp_path):
    run = write_run(tmp_path / "run")
    assert render_report([run]) == render_report([Run(run.path)])
    assert tables_of([run]) == tables_of([Run(run.path)])
