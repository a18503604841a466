"""The frame and the style of every page: one file, light and dark, for phones and for paper, without scripts or network."""

from __future__ import annotations

import html

STYLE = """
:root { color-scheme: light dark; --edge: light-dark(#ddd, #444); --soft: light-dark(#f6f6f4, #222);
  --accent: light-dark(#0072b2, #56b4e9); }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--edge); padding-bottom: .3rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; }
th, td { text-align: left; vertical-align: top; padding: .45rem .6rem; border-bottom: 1px solid var(--edge); }
th { font-weight: 600; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; background: #fff; border-radius: 6px; }
figcaption, .dim { opacity: .7; font-size: .9rem; } .group { color: var(--accent); font-size: .85rem; }
.wide { overflow-x: auto; }
.cut::after { content: " … cut at the token limit"; opacity: .6; font-size: .85em; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; border-radius: 6px; font-size: .85rem; }
@media print { :root { color-scheme: light; } }
.facts { display: flex; flex-wrap: wrap; gap: 1rem; }
.facts div { background: var(--soft); border-radius: 6px; padding: .6rem 1rem; } .facts b { display: block; font-size: 1.3rem; }
"""


def render_page(title: str, body: str, style: str = "") -> str:
    """A whole page. body: HTML below the heading. style: CSS that only this kind of page needs."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head><body>
<h1>{html.escape(title)}</h1>
{body}</body></html>
"""
