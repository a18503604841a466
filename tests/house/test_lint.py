"""`make lint`, as part of the suite: style, format and strict types."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy"])
def test_clean(command):
    done = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_docstring_examples_run(doctest_namespace):
    import doctest
    import importlib

    package = ROOT / "src" / "tunesmith"
    names = [
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted(package.rglob("*.py"))
        if ">>> " in path.read_text()
    ]
    results = [
        doctest.testmod(importlib.import_module(name), extraglobs={"torch": __import__("torch")}) for name in names
    ]
    assert sum(r.failed for r in results) == 0
    assert sum(r.attempted for r in results) >= 20
