"""The commands that the README and the pages show, and how a test runs one."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def blocks(page: str, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall((ROOT / page).read_text()) if kind == language]


def commands(page: str, *others: str) -> list[str]:
    """Lines of the page's command blocks, comments taken off: those of tunesmith and make, and what begins with `others`."""
    lines = [
        line.partition("  #")[0].strip()
        for kind in ("", "sh")
        for body in blocks(page, kind)
        for line in body.splitlines()
    ]
    return [line for line in lines if line.startswith(("tunesmith ", "make ", *others))]


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    beside = "PYTEST_XDIST_WORKER" in os.environ  # other tests run at the same time; else all cores, as a user has them
    plain = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS" or beside}
    environment = {**plain, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        input="Hello!\n/quit\n",
        check=False,
    )
