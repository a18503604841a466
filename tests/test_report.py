"""The report: a pure function of run directories, self-contained, and drawn by a real browser."""

import json
import re
import shutil
import subprocess

import pytest
import yaml

from tunesmith.errors import UserError
from tunesmith.runlog import Run
from tunesmith.study.report import render_report, write_report


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


def test_page_says_what_the_run_says(frozen_run):
    page = render_report([Run(frozen_run)])
    assert "finished at step 4" in page
    assert "4.000 → 3.100" in page
    assert "54.6 → 22.2" in page  # exp of the two
    assert "3.0 min" in page
    assert "1.25 GB" in page
    assert re.search(r"2 ★.*?3\.1000", page)
    assert "step 0: 0 of 1 · step 2: 1 of 1" in page


def test_answers_are_escaped_and_cut_ones_marked(frozen_run):
    page = render_report([Run(frozen_run)])
    assert '<td class="cut">&lt;b&gt;rambling &amp; more</td><td>A clear answer.</td>' in page


def test_page_asks_the_network_for_nothing(frozen_run):
    page = render_report([Run(frozen_run)])
    links = re.findall(r'(?:src|href|url|@import)\s*[=(]\s*["\']?([^"\')\s>]+)', page)
    assert [x for x in links if not x.startswith("#")] == []
    assert "<script" not in page


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
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert shot.stat().st_size > 10_000
    assert ":CONSOLE(" not in done.stderr
