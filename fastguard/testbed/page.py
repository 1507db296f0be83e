"""The demo's one self-contained HTML page: pictures as data URIs, no script, nothing fetched."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}
img{max-width:100%}table{border-collapse:collapse;margin:1em 0}
td,th{border-bottom:1px solid #ddd;padding:.25em .7em;text-align:right}
td:first-child,th:first-child{text-align:left}caption{text-align:left;font-weight:600;padding:.4em 0}
.note{color:#555}
"""


def data_uri(path: Path) -> str:
    """A PNG or SVG as text."""
    kind = "svg+xml" if path.suffix == ".svg" else "png"
    return f"data:image/{kind};base64," + base64.b64encode(path.read_bytes()).decode()


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of escaped texts."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><caption>{html.escape(title)}</caption>{line(head, 'th')}{body}</table>"


def page(title: str, lead: str, figures: Sequence[tuple[str, Path]], tables: str, foot: str) -> str:
    """The page: a lead, figures with captions, tables, a foot."""
    parts = [
        f'<figure><img alt="{html.escape(text)}" src="{data_uri(path)}">'
        f"<figcaption class=note>{html.escape(text)}</figcaption></figure>"
        for text, path in figures
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>"
        f"{''.join(parts)}{tables}<p class=note>{html.escape(foot)}</p></html>\n"
    )
