"""The report: a pure function of run directories, self-contained, and drawn by a real browser."""

import json
import platform
import re
import shutil
import subprocess

import pytest
import yaml

import tunesmith as ts
from hanging import HANGS
from tiny_runs import tiny_config
from tunesmith.__main__ import main
from tunesmith.errors import UserError
from tunesmith.files.run import Run
from tunesmith.stats import wilson_interval
from tunesmith.study.report import facts_of, render_report, write_report


@pytest.fixture
def frozen_run(tmp_path):
    """A run directory written by hand: four steps, three estimates, answers before and after."""
    path = tmp_path / "frozen"
    (path / "answers").mkdir(parents=True)
    lines = []
    for step in range(5):
        if step:
            lines.append({"event": "train", "step": step, "time": 100.0 + 60 * step, "loss": 4.0 - step / 2, "lr": 1e-4,
                          "grad_norm": 1.0, "tokens": 1000 * step, "tokens_per_s": 10.0, "peak_memory_gb": 1.25})  # fmt: skip
        if step % 2 == 0:
            lines.append({"event": "eval", "step": step, "time": 0.0, "train_loss": 4.0 - step / 2,
                          "validation_loss": [4.0, 3.1, 3.3][step // 2], "validation_perplexity": 20.0})  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "train", "st')
    (path / "status.json").write_text(json.dumps({"state": "finished", "step": 4, "reason": "", "best_step": 2}))
    (path / "config.yaml").write_text(yaml.safe_dump({"model": {"name": "sample"}}))
    for step, answer in ((0, "<b>rambling & more"), (2, "A clear answer.")):
        record = {
            "prompt": "What is love?",
            "group": "g",
            "answer": answer,
            "finish_reason": "stop" if step else "length",
            "tokens": 3,
        }
        (path / "answers" / f"step-{step:08d}.jsonl").write_text(json.dumps(record) + "\n")
    return path


def test_same_run_gives_the_same_bytes(frozen_run):
    page = write_report([str(frozen_run)])
    first = page.read_bytes()
    page.unlink()
    assert write_report([str(frozen_run)]).read_bytes() == first


def test_the_time_of_a_run_is_that_of_its_steps_without_the_pause_before_it_was_resumed(frozen_run):
    log = frozen_run / "metrics.jsonl"
    log.write_text(log.read_text().replace('"step": 4, "time": 340.0', '"step": 4, "time": 90340.0'))
    assert "90340" in log.read_text()
    assert facts_of(Run(frozen_run))["time"] == "6.7 min"
    log.write_text(log.read_text().replace('"tokens_per_s": 10.0', '"tokens_per_s": 1000.0'))
    assert facts_of(Run(frozen_run))["time"] == "4 s"


def test_page_says_what_the_run_says(frozen_run):
    page = render_report([Run(frozen_run)])
    assert "finished at step 4" in page
    assert "4.000 → 3.100" in page
    assert "54.6 → 22.2" in page  # exp of the two
    assert "6.7 min" in page  # 4,000 tokens at 10 a second
    assert "1.25 GB" in page
    assert re.search(r"2 ★.*?3\.1000", page)
    assert "step 0: 0 of 1 · step 2: 1 of 1" in page


def test_answers_are_escaped_and_cut_ones_marked(frozen_run):
    page = render_report([Run(frozen_run)])
    assert "&lt;b&gt;rambling &amp; more<small>cut at the token limit</small>" in page
    assert "A clear answer.<small>ended by itself</small>" in page


def test_page_asks_the_network_for_nothing(frozen_run):
    page = render_report([Run(frozen_run)])
    links = re.findall(r'(?:src|href|url|@import)\s*[=(]\s*["\']?([^"\')\s>]+)', page)
    assert [x for x in links if not x.startswith("#")] == []
    assert "<script" not in page


@pytest.fixture
def frozen_dpo_run(tmp_path):
    """Four steps of DPO with LoRA, three estimates on 40 pairs."""
    path = tmp_path / "aligned"
    path.mkdir()
    lines = [
        {"event": "pairs", "step": 0, "train_pairs": 99, "validation_pairs": 40, "validation_longer_chosen": 0.7125}
    ]
    for step in range(5):
        seen = {"accuracy": step / 4, "margin": step / 10, "chosen_reward": step / 20, "rejected_reward": -step / 20}
        at = {"step": step, "time": 60.0 * step}
        if step:
            counts = {"tokens": 900 * step, "pairs": 4 * step, "tokens_per_s": 9.0, "peak_memory_gb": 0.5}
            lines.append({"event": "train", **at, "loss": 0.69 - step / 10, **seen, **counts})
        if step % 2 == 0:
            held = {f"validation_{name}": value for name, value in seen.items()}
            lines.append({"event": "eval", **at, "train_loss": 0.69, "validation_loss": 0.6931 - step / 20, **held})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "status.json").write_text(json.dumps({"state": "finished", "step": 4, "reason": "", "best_step": 4}))
    (path / "config.yaml").write_text(yaml.safe_dump({"dpo": {"beta": 0.1}, "lora": {"rank": 8}}))
    return path


def test_a_preference_run_shows_accuracy_with_its_interval_and_the_margin(frozen_dpo_run):
    page = render_report([Run(frozen_dpo_run)])
    assert "aligned: Direct preference optimisation, LoRA rank 8" in page
    assert "100.0 % (91.2 to 100.0)" in page
    assert page.count("<svg") == 2
    for words in ("pairs with the chosen answer ahead", "reward margin", "the longer answer", "95 % interval"):
        assert words in page
    assert "perplexity" not in page


def test_pairs_of_one_prompt_count_once_in_the_interval_of_a_logged_accuracy(frozen_dpo_run):
    log = frozen_dpo_run / "metrics.jsonl"
    log.write_text(
        log.read_text().replace('"validation_pairs": 40', '"validation_pairs": 40, "validation_prompts": 10')
    )
    low = 100 * wilson_interval(10, 10)[0]
    assert f"100.0 % ({low:.1f} to 100.0)" in render_report([Run(frozen_dpo_run)])


def test_several_runs_begin_with_a_table_of_all(frozen_run, frozen_dpo_run):
    page = render_report([Run(frozen_run), Run(frozen_dpo_run)])
    table = page[page.index("<table>") : page.index("</table>")]
    for words in ('href="#frozen"', 'href="#aligned"', "4.000 → 3.100", "0.693 → 0.493", "Supervised fine-tuning"):
        assert words in table


def test_a_loss_that_was_not_finite_is_told_and_no_reason_to_fail(frozen_dpo_run):
    with (frozen_dpo_run / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"event": "eval", "step": 6, "time": 0.0, "train_loss": None, "validation_loss": None}) + "\n"
        )
    page = render_report([Run(frozen_dpo_run)])
    assert "not finite" in page
    assert "0.693 → 0.493" in page


def test_a_real_run_shows_what_it_was_made_with(tiny_directory, tmp_path):
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "run", train__steps=1, eval__every=1))
    kept = json.loads((run.path / "environment.json").read_text())
    assert kept.keys() == {"tunesmith", "python", "torch", "numpy", "system", "device", "threads"}
    assert platform.node() not in kept.values()
    page = render_report([run])
    assert "<summary>Environment</summary>" in page
    assert f"&quot;torch&quot;: &quot;{kept['torch']}&quot;" in page


def test_a_log_cut_in_mid_line_is_told_on_the_page(frozen_run):
    assert "metrics.jsonl line 8 is damaged and was left out: the file is cut off there" in render_report(
        [Run(frozen_run)]
    )


def test_an_earlier_damaged_line_is_an_error_and_a_cut_last_one_is_left_out(frozen_run):
    log = frozen_run / "metrics.jsonl"
    whole = Run(frozen_run).metrics()
    first, *others = log.read_text().splitlines(keepends=True)
    log.write_text(first + "{nonsense\n" + "".join(others))
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is damaged .*delete that line"):
        Run(frozen_run).metrics()
    log.write_text(first + "".join(others[:-1]) + '{"event": "tr')
    assert Run(frozen_run).metrics() == whole[: len(others)]


@pytest.mark.parametrize("file", ["metrics.jsonl", "status.json", "config.yaml", "answers/step-00000002.jsonl"])
@pytest.mark.parametrize("content", [b"{nonsense\n", b"\xff\xfe\n", b'"a"\n'], ids=["broken", "no text", "no object"])
def test_a_damaged_file_is_told_by_name(frozen_run, capsys, file, content):
    kept = (frozen_run / file).read_bytes() if file.endswith(".jsonl") else b""
    (frozen_run / file).write_bytes(content + kept)
    code = main(["report", str(frozen_run)])
    err = capsys.readouterr().err
    assert "Traceback" not in err
    if code:
        assert code == 1
        assert file in err
        assert err.count("\n") == 1
    else:
        page = (frozen_run / "report.html").read_text()
        assert f"{file.rpartition('/')[2]} line 1 is" in page


def test_rewards_are_drawn_with_the_choice_and_of_many_answers_three_are_shown(frozen_run):
    status = json.loads((frozen_run / "status.json").read_text())
    choice = {"best_step": 2, "by": "reward", "not_distinguishable": [4], "overfitting_since": None}
    (frozen_run / "status.json").write_text(json.dumps(status | {"choice": choice}))
    rewards = [{"event": "reward", "step": s, "time": 0.0, "mean": s / 2, "low": s / 2 - 1, "high": s / 2 + 1, "n": 9, "scorer": "judge"}
               for s in range(5)]  # fmt: skip
    log = (frozen_run / "metrics.jsonl").read_text().rpartition("\n")[0] + "\n"
    (frozen_run / "metrics.jsonl").write_text(log + "".join(json.dumps(r) + "\n" for r in rewards))
    for step in (1, 3, 4):
        shutil.copy(frozen_run / "answers/step-00000002.jsonl", frozen_run / f"answers/step-{step:08d}.jsonl")
    page = render_report([Run(frozen_run)])
    for words in (
        "scored by judge",
        "chosen checkpoint (step 2)",
        "not distinguishable from it",
        "reward of the answers (score)",
    ):
        assert words in page
    assert re.findall(r"<div><b>(.*?)</b>", page[page.index('<div class="answers">') :]) == [
        "step 0, the base", "step 2", "step 4",
    ]  # fmt: skip


def test_files_lie_beside_the_page_and_none_is_overwritten(frozen_run, tmp_path):
    twin = tmp_path / "other" / "frozen"
    shutil.copytree(frozen_run, twin)
    write_report([str(frozen_run), str(twin)], str(tmp_path / "out" / "page.html"))
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*"))
    assert found == [
        "figures/frozen-loss-2.png", "figures/frozen-loss-2.svg", "figures/frozen-loss.png", "figures/frozen-loss.svg", "page.html",
        "tables/frozen-estimates-2.csv", "tables/frozen-estimates-2.tex", "tables/frozen-estimates.csv", "tables/frozen-estimates.tex",
        "tables/runs.csv", "tables/runs.tex",
    ]  # fmt: skip
    assert (tmp_path / "out/tables/frozen-estimates.csv").read_text().splitlines()[:2] == [
        "step,train loss,validation loss,validation perplexity", "0,4,4,20",
    ]  # fmt: skip


def test_directory_without_a_run_is_told(tmp_path):
    with pytest.raises(UserError, match=r"no status\.json"):
        write_report([str(tmp_path)])


def test_run_without_a_metric_is_told(frozen_run):
    (frozen_run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no metrics yet"):
        write_report([str(frozen_run)])


def test_browser_draws_it(frozen_run, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    page = write_report([str(frozen_run)])
    shot = tmp_path / "page.png"
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--enable-logging=stderr",
    ]
    command = [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=True)
    assert shot.stat().st_size > 10_000
    assert ":CONSOLE(" not in done.stderr
