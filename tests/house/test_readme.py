"""Every command that the README and the pages in docs/ show does what they say, as written."""

import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shown_commands import ROOT, blocks, commands, run
from tunesmith.files.converted import INSTALL_SMOLLM2, SMOLLM2_PACKAGE

NEEDS_HUB = re.compile(r"gpt2-medium|--config paper/|runs/hh|--data\.name hh")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


@pytest.mark.long
def test_readme_commands_run_as_written(folder):
    shown = [c for c in commands("README.md") if c.startswith("tunesmith ") and not NEEDS_HUB.search(c)]
    assert len(shown) >= 5
    for command in shown:
        done = run(command, folder)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert done.stdout.strip()


@pytest.mark.long
def test_commands_of_the_page_on_preferences_run_as_written(folder):
    """They go on from the README's first run."""
    assert (folder / "runs/first").is_dir()
    for command in commands("docs/preferences.md"):
        if not NEEDS_HUB.search(command):
            named = command.replace("runs/judge", "runs/judge-2").replace("runs/aligned", "runs/aligned-2")
            done = run(named, folder)
            assert done.returncode == 0, f"{named}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.long
def test_commands_of_the_page_on_judging_run_as_written(folder):
    """They go on from the README's runs. The one that asks a language model has a server of its own in test_compare."""
    shown = [c for c in commands("docs/judging.md") if "--judge " not in c]
    assert len(shown) > 5
    for command in shown:
        done = run(command, folder)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec(SMOLLM2_PACKAGE) is None, reason=f"no SmolLM2 here: {INSTALL_SMOLLM2}")
def test_commands_of_the_page_on_smollm2_run_as_written_in_fewer_steps(folder):
    shown = commands("docs/smollm2.md")
    assert len(shown) == 8
    for command in shown:
        shorter = re.sub(r"--train\.steps \d+", "--train.steps 2 --eval.iters 2", command)
        for written, few in (
            ("warmup_steps 6", "warmup_steps 1"),
            ("--limit 8", "--limit 2"),
            ("tokens 64", "tokens 8"),
        ):
            shorter = shorter.replace(written, few)
        done = run(shorter, folder)
        assert done.returncode == 0, f"{shorter}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.long
@pytest.mark.parametrize("page", ["README.md", "docs/training.md", "docs/data.md", "docs/preferences.md"])
def test_commands_for_the_hub_are_valid(page, folder):
    """What needs a download is checked up to the download: options, presets and names."""
    for command in commands(page):
        if command.startswith("tunesmith ") and NEEDS_HUB.search(command) and "--resume" not in command:
            done = run(f"{command} --print_config", folder)
            assert done.returncode == 0, f"{command}: {done.stderr}"


def test_the_readme_shows_the_lines_that_its_plan_prints(folder):
    (command,) = [c for c in commands("README.md") if c.startswith("tunesmith plan ")]
    printed = run(command, folder).stdout.splitlines()
    (shown,) = [body for body in blocks("README.md", "text") if body.startswith("fits in ")]
    for line in shown.splitlines()[:2]:
        assert line in printed


def test_every_part_of_the_package_that_the_docs_name_can_be_imported():
    named = {
        name
        for page in ("README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
        for name in re.findall(r"`(tunesmith(?:\.[a-z_]\w*)+)`", (ROOT / page).read_text(encoding="utf-8"))
    }
    assert len(named) > 10
    for name in named:
        pkgutil.resolve_name(name)


def test_make_targets_exist():
    for page in ("README.md",):
        for command in commands(page):
            if command.startswith("make "):
                subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.long
def test_python_in_the_docs_runs(folder):
    for number, page in enumerate(("README.md", "docs/training.md", "docs/preferences.md")):
        (folder / str(number)).mkdir()
        for body in blocks(page, "python"):
            done = subprocess.run(
                [sys.executable, "-c", body], cwd=folder / str(number), capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{page}: {body}\n{done.stderr[-2000:]}"
            assert done.stdout.strip()


def test_readme_is_short_and_names_no_file_that_is_not_there():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)|src=\"(?!http)([^\"]+)\"", text):
        assert (ROOT / (target[0] or target[1]).partition("#")[0]).exists(), target


@pytest.mark.long
def test_demo_in_its_shortest_form(folder):
    done = run("tunesmith demo --model sample --steps 2 --out demo", folder)
    assert done.returncode == 0, done.stderr[-2000:]
    report = Path(done.stdout.strip().splitlines()[-1].removeprefix("Report: "))
    page = report.read_text()
    assert "<svg" in page
    for name in ("sft", "lora", "reward", "dpo"):
        assert f'<h2 id="{name}">' in page
    assert "How does blockchain technology work" in page


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md", "docs/planning.md"])
def test_tables_are_those_of_the_measured_results(page):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from table import overview, table

    text = (ROOT / page).read_text()
    shown = re.findall(r"<!-- table: (\S[^>]*) -->\n(.*?)\n\n", text, re.S)
    assert shown
    for files, lines in shown:
        results = [json.loads((ROOT / file).read_text()) for file in files.split()]
        made = overview(results) if len(results) > 1 else table(results[0])
        assert lines == made, f"{page}: make the table anew from {files}"
