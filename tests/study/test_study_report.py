"""The study's page: golden text, the same bytes again, links that lead somewhere, damage that shows, a browser that draws it."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from frozen_study import Writer, learning, scored, write_study
from hanging import HANGS
from tunesmith.__main__ import main
from tunesmith.errors import UsageError, UserError
from tunesmith.study.look import COLOURS
from tunesmith.study.records import read_study
from tunesmith.study.report import render_study_report, write_report

GOLDEN = Path(__file__).parents[1] / "golden" / "study.txt"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study of all experiments, two seeds, with its report."""
    root = write_study(tmp_path_factory.mktemp("whole") / "study", seeds=2)
    write_report([str(root)])
    return root


@pytest.fixture(scope="module")
def page(whole):
    return (whole / "report/index.html").read_text()


def as_text(page: str) -> str:
    """What a reader reads: no style, drawings or configurations, a line a block; links as [text](target)."""
    page = re.sub(r"<style>.*?</style>|<svg.*?</svg>|<pre>.*?</pre>", "", page, flags=re.S)
    page = re.sub(r'<a [^>]*?href="(#[^"]*)"[^>]*>(.*?)</a>', r"[\2](\1)", page)
    page = re.sub(r"</(td|th)>", " | ", page)
    page = re.sub(r"<(h[1-6]|p|li|div|tr|figure|caption|summary|section|pre|ul)\b[^>]*>", "\n", page)
    lines = (" ".join(html.unescape(re.sub(r"<[^>]+>", "", line)).split()) for line in page.split("\n"))
    return "\n".join(line for line in lines if line) + "\n"


def test_golden_text(tmp_path):
    """Written anew with TUNESMITH_GOLDEN=write; look at the difference before you commit it."""
    root = write_study(tmp_path / "study", seeds=2, steps=10, only=("e1b", "e8"))
    write_report([str(root)])
    tables = sorted((root / "report/tables").iterdir())
    text = as_text((root / "report/index.html").read_text())
    text += "".join(f"\n==== {path.name}\n{path.read_text()}" for path in tables)
    if os.environ.get("TUNESMITH_GOLDEN") == "write":
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_rendered_again_by_another_process_it_is_the_same_bytes(whole, tmp_path):
    first = {p.relative_to(whole): p.read_bytes() for p in (whole / "report").rglob("*") if p.is_file()}
    moved = tmp_path / "elsewhere"
    shutil.copytree(whole, moved, ignore=shutil.ignore_patterns("report"))
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    command = [sys.executable, "-m", "tunesmith", "report", str(moved)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(moved / "report/index.html")
    again = {p.relative_to(moved): p.read_bytes() for p in (moved / "report").rglob("*") if p.is_file()}
    assert [p for p in first if first[p] != again.get(p)] == []
    assert again.keys() == first.keys()


def test_every_figure_and_table_is_a_file_too(whole, page):
    for name in [
        *(f"figure-{n}" for n in range(1, 10)),
        "figure-dpo",
        "figure-memory",
        "figure-batches",
        "figure-learning-rates",
    ]:
        assert f'id="{name}"' in page
        assert (whole / f"report/figures/{name}.svg").read_text().startswith("<svg")
        assert (whole / f"report/figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    for name in (
        "table-1",
        "table-2",
        "table-accumulation",
        "table-dpo",
        "table-prompts",
        "table-choices",
        "table-memory",
        "table-runs",
    ):
        assert f'id="{name}"' in page
        assert (whole / f"report/tables/{name}.csv").read_text().count("\n") >= 3
        latex = (whole / f"report/tables/{name}.tex").read_text()
        assert all(word in latex for word in (r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}"))
    for link in re.findall(r'href="((?!#)[^"]+)"', page):
        assert (whole / "report" / link).is_file()


NATS, SCORE = "loss, nats per target token", "reward of the answers (score)"
SHOWN = {
    "figure-1": (NATS, "optimizer step", "validation", "training rows", "validation rows"),
    "figure-2": (SCORE, "fine-tuning", "chosen (by e1-on-s1, step 40)", "not distinguishable from it"),
    "figure-3": (NATS, "AdamW", "Adam", "SGD-Nesterov", "SGD-momentum", "SGD"),
    "figure-6": (NATS, "rank 1", "rank 2", "rank 8", "rank 16", "full"),
    "figure-7": (SCORE, "rank 1", "rank 16", "full"),
    "figure-9": (SCORE, "helpful only", "validation"),
    "figure-learning-rates": (NATS, "lr 0.01 (not finished)", "lr 0.001"),
    "figure-batches": ("batch 1", "batch 4", "batch 4 = 4 x 1"),
    "figure-dpo": ("loss, nats per pair", "share with the chosen ahead", "chance", "reward margin", "drift, nats per answer"),
    "figure-memory": ("memory, GB of 10⁹ bytes", "optimizer state", "measured peak", "SGD", "LoRA rank 16", "all weights (E5)", "DPO"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_figures_name_their_axes_with_units_and_every_line(whole, name):
    words = re.findall(r"<text[^>]*>(.*?)</text>", (whole / f"report/figures/{name}.svg").read_text())
    assert [w for w in SHOWN[name] if w not in words] == []


def test_lines_differ_in_colour_and_in_dashes(whole):
    svg = (whole / "report/figures/figure-3.svg").read_text()
    lines = re.findall(r'style="fill: none; (stroke-dasharray: [^;]*; )?[^"]*stroke: (#\w+); stroke-width: [\d.]+', svg)
    drawn = {(dashes, colour) for dashes, colour in lines if colour in COLOURS[:5]}
    assert len({colour for _, colour in drawn}) == len({dashes for dashes, _ in drawn}) == 5


def test_the_paper_stands_beside_our_numbers(page):
    text = as_text(page)
    assert re.search(r"AdamW \| 13\.47.*?\| 13\.52 \| .*?\| 200\.0 \|", text)
    assert re.search(r"rank 16 \| 16,000 \| 8\.140.*?\| 8\.1554 \|", text)
    assert "8.02 GB at rank 1, 8.16 at rank 16 (+1.6 %)" in text


def test_every_link_leads_to_the_log_line_it_names(whole, page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    targets = set(re.findall(r'href="#([^"]+)"', page))
    assert targets <= set(ids)
    cited = re.findall(r'<li id="run-(.+?)-line-(\d+)"><b>\d+</b>(.*?)</li>', page)
    assert len(cited) > 100
    for run, line, shown in cited:
        logged = (whole / "runs" / run / "metrics.jsonl").read_text().splitlines()[int(line) - 1]
        assert json.loads(html.unescape(shown)) == json.loads(logged)


def test_a_linked_number_is_the_number_of_its_line(whole, page):
    row = re.search(r"<tr><td><a href=\"#run-e6-s1\">.*?</tr>", page)[0]
    loss, memory, minutes = re.findall(r'href="#run-e6-s1-line-(\d+)"[^>]*>([\d.]+)<', row)
    logged = [json.loads(line) for line in (whole / "runs/e6-s1/metrics.jsonl").read_text().splitlines()]
    assert float(loss[1]) == pytest.approx(logged[int(loss[0]) - 1]["validation_loss"], abs=5e-4)
    assert float(memory[1]) == pytest.approx(logged[int(memory[0]) - 1]["peak_memory_gb"], abs=5e-3)
    assert float(minutes[1]) == pytest.approx(40 / 60, abs=5e-3)


def test_answers_stand_side_by_side_and_are_escaped(page):
    block = re.search(r'<p class="prompt">How does blockchain.*?</div></div>', page, re.S)[0]
    assert re.findall(r"<div><b>(.*?)</b>", block) == ["base", "fine-tuned", "LoRA, rank 16", "DPO"]
    assert "the &lt;b&gt;the&lt;/b&gt; the" in block
    assert "cut at the token limit · reward" in block


def test_configuration_and_environment_of_every_run(whole, page):
    for run in sorted(p.name for p in (whole / "runs").iterdir()):
        section = page[page.index(f'<section class="run" id="run-{run}">') :].partition("</section>")[0]
        assert "<summary>Configuration</summary>" in section
        assert "device: made up" in section


def test_nothing_missing_is_silent(page):
    text = as_text(page)
    failed = "SGD-momentum, seed 1002 (e4-sgd-momentum-s2): failed at step 40: OSError: no space left on device"
    assert text.count(failed) >= 4  # figures 3 and 4, table 1, the claims
    assert "e1b-0.01-s1, e1b-0.01-s2: diverged at step 20" in text


def test_no_request_and_no_script(page):
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert (
        re.findall(r"(?:src|@import|url)\s*[=(]\s*[\"']?(?!#)[^\"')\s]+", re.sub(r"default-src.*?\"", "", page)) == []
    )


def test_commands_of_the_page_on_reports_run_as_written(whole, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    commands = re.findall(r"^tunesmith (.+)$", text, re.M)
    assert len(commands) == 2
    shutil.copytree(whole, tmp_path / "studies/paper-smoke")
    shutil.copytree(whole / "runs/e1-s1", tmp_path / "runs/sft")
    shutil.copytree(whole / "runs/e8-s1", tmp_path / "runs/dpo")
    monkeypatch.chdir(tmp_path)
    assert [main(command.split()) for command in commands] == [0, 0]
    assert capsys.readouterr().out.split() == ["studies/paper-smoke/report/index.html", "both.html"]


# ---- parts of studies, damage ----------------------------------------------------------------------------------------


def test_a_study_of_ones_own_gets_figures_and_a_table(tmp_path):
    w = Writer(tmp_path, seeds=2, steps=10)
    for seed in (1, 2):
        for label in ("short", "long"):
            w.run(f"{label}-{seed}", {}, learning(10, seed=seed))
            w.show("context", "Length of the context", f"{label}-{seed}", label, seed)
    root = w.finish()
    write_report([str(root)])
    text = as_text((root / "report/index.html").read_text())
    assert "none of the paper's experiments" in text
    assert "Length of the context: validation loss." in text
    assert sorted(p.name for p in (root / "report/figures").glob("*.svg")) == [
        "figure-context-train.svg",
        "figure-context-validation.svg",
    ]
    assert "short" in (root / "report/tables/table-context.csv").read_text()


def test_a_study_that_has_only_begun(tmp_path):
    w = Writer(tmp_path, seeds=1, steps=10)
    for key in ("e1", "e2", "e4", "e5", "e7", "e8"):
        w.run(f"{key}-s1", {}, [], state="waiting")
        w.show(key, key, f"{key}-s1", "AdamW", 1)
    root = w.finish()
    write_report([str(root)])
    text = as_text((root / "report/index.html").read_text())
    assert "6 runs, 6 not run yet" in text
    assert "Figure 4: Validation loss by optimizer: not drawn. AdamW, seed 1 (e4-s1): not run yet." in text
    assert "Not in this study: E1b, E6." in text
    assert "0 hold, 0 do not hold" in text


def test_only_the_wanted_figures_of_the_paper(tmp_path):
    root = write_study(tmp_path / "study", seeds=1, steps=10, only=("e4",))
    plan = json.loads((root / "plan.json").read_text())
    (root / "plan.json").write_text(json.dumps(plan | {"figures": ["figure-4"], "tables": ["table-2"]}))
    write_report([str(root)])
    assert not (root / "report/figures/figure-3.svg").exists()
    assert (root / "report/figures/figure-4.svg").exists()
    assert not (root / "report/tables/table-1.csv").exists()


def test_runs_of_different_data_or_scorers_in_one_figure_are_told_under_it(tmp_path):
    w = Writer(tmp_path, seeds=1, steps=10)
    for label, data, scorer in (("rank 1", "sample", "one model"), ("rank 2", "hh-static", "another model")):
        lines, answers = scored(learning(10), lambda x: x, seed=1, scorer=scorer)
        w.run(label.replace(" ", ""), {"data.name": data, "lora.rank": 1}, lines, answers=answers)
        w.show("e5", "E5", label.replace(" ", ""), label, 1)
    text = as_text(render_study_report(read_study(w.finish()))[0])
    assert text.count("losses are not comparable: data.name is sample: rank1; hh-static: rank2") == 2
    assert "Scored by different models, so the rewards are not comparable: another model, one model" in text


DAMAGES = {
    "empty": b"",
    "not text": b"\xff\xfe\x00\x01",
    "cut": b'{"event": "eval", "st',
    "a list": b"[]\n",
    "nulls": b'{"step": null}\n',
}
FILES = ("plan.json", "progress.json", "runs/e6-s1/config.yaml", "runs/e6-s1/status.json", "runs/e6-s1/metrics.jsonl",
         "runs/e6-s1/environment.json", "runs/e6-s1/answers/step-00000010.jsonl")  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("small") / "study", seeds=1, steps=10, only=("e6",))


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_an_error_or_stands_on_the_page(small, tmp_path, file):
    for kind, content in DAMAGES.items():
        root = tmp_path / kind
        shutil.copytree(small, root)
        (root / file).write_bytes(content)
        if file in ("plan.json", "progress.json"):
            if (file, kind) != ("progress.json", "nulls"):  # an object without runs: nothing was begun
                with pytest.raises(UserError, match=file):
                    read_study(root)
            continue
        text = as_text(render_study_report(read_study(root))[0])
        assert "Every run" in text
        if kind in ("not text", "cut"):
            assert f"{Path(file).name}" in text
            assert "damaged" in text


def test_a_log_of_nothing_is_told(small, tmp_path):
    root = tmp_path / "study"
    shutil.copytree(small, root)
    (root / "runs/e6-s1/metrics.jsonl").write_text("")
    text = as_text(render_study_report(read_study(root))[0])
    assert "e6-s1: metrics.jsonl is empty" in text
    assert "Figure 8: Loss of the helpful-only run: not drawn" in text


def test_a_study_is_reported_alone(small, capsys):
    with pytest.raises(UsageError, match="has its own page"):
        write_report([str(small), str(small / "runs/e6-s1")])
    assert main(["report", str(small), str(small / "runs/e6-s1")]) == 2
    assert "Traceback" not in capsys.readouterr().err


# ---- a browser -------------------------------------------------------------------------------------------------------

PROBE = """<script>addEventListener('load', () => {
  const empty = [...document.querySelectorAll('figure svg')].filter(s => {
    const box = s.getBBox(), seen = s.getBoundingClientRect();
    return box.width < 50 || box.height < 50 || seen.width < 200 || seen.height < 100 || !s.querySelector('path');
  }).map(s => s.getAttribute('aria-label'));
  const wide = [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1
    && !e.closest('.plot, .wide, pre')).map(e => e.outerHTML.slice(0, 80));
  const found = {figures: document.querySelectorAll('figure svg').length, empty, wide,
    images: [...document.images].filter(i => !i.naturalWidth).length,
    requests: performance.getEntriesByType('resource').map(r => r.name), overflow: document.documentElement.scrollWidth - innerWidth};
  const out = document.createElement('pre'); out.id = 'probe'; out.textContent = JSON.stringify(found); document.body.append(out);
});</script></body>"""


def browse(page: Path, tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    always = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
              "--no-first-run", "--hide-scrollbars", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
    command = [browser, *always, *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=True)


@pytest.mark.parametrize("width", [1400, 500])
def test_browser_draws_every_figure_and_asks_for_nothing(whole, tmp_path, width):
    page = (whole / "report/index.html").read_text()
    open_to_scripts = page.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    probed = whole / f"report/probed-{width}.html"
    probed.write_text(open_to_scripts.replace("</body>", PROBE))
    done = browse(probed, tmp_path, "--dump-dom", f"--window-size={width},1200")
    found = json.loads(html.unescape(re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)[1]))
    probed.unlink()
    assert found == {"figures": 13, "empty": [], "wide": [], "images": 0, "requests": [], "overflow": 0}
    assert ":CONSOLE(" not in done.stderr


def page_requests(log: Path) -> set[str]:
    """Who asked for something, the browser's own errands ("not an origin") left out."""
    return set(re.findall(r'"initiator":"([^"]*)"', log.read_text())) - {"not an origin"}


def test_browser_shows_the_page_itself_without_an_error_and_sends_nothing(whole, tmp_path):
    log, shot = tmp_path / "net.json", tmp_path / "page.png"
    done = browse(
        whole / "report/index.html", tmp_path, f"--screenshot={shot}", "--window-size=1400,2000", f"--log-net-log={log}"
    )
    assert ":CONSOLE(" not in done.stderr
    assert shot.stat().st_size > 50_000
    assert page_requests(log) == set()
    asking = tmp_path / "asking.html"
    asking.write_text('<img src="http://127.0.0.1:9/x.png">')
    browse(asking, tmp_path, "--dump-dom", f"--log-net-log={log}")
    assert page_requests(log) == {"null"}  # what the line above would have seen
