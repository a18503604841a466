"""A page in Chromium: measured at a width, photographed, printed. Tests that need it skip where there is none."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hanging import HANGS

MEASURE = """<script>addEventListener('load', () => {
  const name = e => e.outerHTML.slice(0, 90), all = [...document.querySelectorAll('body *')];
  const scrolls = e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX);
  const inside = e => { for (let p = e.parentElement; p; p = p.parentElement) if (scrolls(p)) return true; return false; };
  const shown = e => e.getClientRects().length && !e.closest('svg');
  const columns = [...document.querySelectorAll('.answers, .sides')].filter(shown).map(
    g => [...g.children].map(c => c.getBoundingClientRect()).map(b => [Math.round(b.left), Math.round(b.width)]));
  const found = {
    width: innerWidth, page: document.documentElement.scrollWidth - innerWidth, columns,
    outside: all.filter(e => shown(e) && !inside(e) && e.getBoundingClientRect().right > innerWidth + 1).map(name),
    spilling: all.filter(e => shown(e) && !scrolls(e) && !inside(e) && getComputedStyle(e).display != 'inline'
      && e.scrollWidth > e.clientWidth + 1).map(name),
    scrolling: all.filter(e => shown(e) && scrolls(e) && e.scrollWidth > e.clientWidth + 1).map(name)};
  parent.postMessage(JSON.stringify(found), '*');
});</script></body>"""
# Of what a printer would see: the rules for paper hold on the screen, so that their effect can be measured.
PAPER = re.compile(r"@media print \{")


def browser() -> str:
    """Chromium's path; the test is skipped where there is none."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    return found


def browse(page: Path, tmp_path: Path, *flags: str) -> str:
    """What Chromium prints on a page with these flags."""
    always = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
              "--no-first-run", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
    command = [browser(), *always, *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=True).stdout


def measured(text: str, width: int, tmp_path: Path, *, paper: bool = False) -> dict[str, Any]:
    """Where the parts of a page lie at a width in CSS pixels. paper: under the rules for print.

    A phone's width is that of a frame: Chromium's own window is never narrower than 500 pixels.
    """
    browser()
    text = text.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    text = PAPER.sub("@media all {", text) if paper else text
    inner = json.dumps(text.replace("</body>", MEASURE)).replace("</", "<\\/")
    outer = tmp_path / "outer.html"
    outer.write_text(
        f"<!doctype html><body style='margin:0'><iframe width={width} height=900 style='border:0'></iframe><pre id=probe></pre>"
        "<script>addEventListener('message', e => document.getElementById('probe').textContent = e.data);"
        f"document.querySelector('iframe').srcdoc = {inner};</script></body>",
        encoding="utf-8",
    )
    told = browse(outer, tmp_path, "--dump-dom", "--virtual-time-budget=10000", "--window-size=1400,1000")
    return json.loads(html.unescape(re.findall(r'<pre id="?probe"?>(.*?)</pre>', told, re.S)[-1]))


def print_pdf(page: Path, tmp_path: Path) -> Path:
    """The page on paper."""
    pdf = tmp_path / f"{page.stem}.pdf"
    browse(page, tmp_path, f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    return pdf
