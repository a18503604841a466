"""The frame and the style of every page: one file, light and dark, for phones and for print, without scripts or network."""

from __future__ import annotations

import html
from pathlib import Path

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # the browser refuses every request and script


def render_page(title: str, body: str, style: str = "") -> str:
    """A whole page. body: HTML below the heading. style: CSS that only this kind of page needs."""
    return document(title, f"<main><h1>{html.escape(title)}</h1>\n{body}</main>", style)


def document(title: str, body: str, style: str = "", kind: str = "") -> str:
    """A whole page whose body brings its own heading. kind: a class for the style sheet."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head><body{f' class="{kind}"' if kind else ""}>
{body}
</body></html>
"""
