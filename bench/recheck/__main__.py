"""Compares a page's tables with the rows: see the package."""

from __future__ import annotations

import sys
from pathlib import Path

from bench.recheck.curve import curves as curves_of
from bench.recheck.curve import floor_of, overview, pair, point
from bench.recheck.detect import detection, first
from bench.recheck.rows import UNCHECKED, Page
from bench.recheck.words import published, sentences


def tables(text: str) -> dict[str, list[list[str]]]:
    """title -> lines of cells, the head first, of a Markdown file."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in text.splitlines():
        if line.startswith("## "):
            title = line[3:]
        elif line.startswith("| ") and not line.startswith("| ---"):
            found.setdefault(title, []).append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def expected(page: Page, title: str, head: list[str], lines: list[list[str]]) -> list[list[str]] | None:
    """The lines of a table worked out again; None for tables that are not from the rows."""
    if title.startswith(("Memorized prompts", "Ordinary prompts")):
        return [page.method(line[0], title.split()[0].lower(), head) for line in lines]
    if title.startswith("Detection"):
        return [detection(page, line[0], int(line[1])) or [] for line in lines]
    if title.startswith("Does the first"):
        return [first(page, line[0]) for line in lines]
    if title.startswith("Published"):
        return [[*[UNCHECKED] * (len(line) - 1), published(page, line[-1])] for line in lines]
    column = "copy" if "copy rate" in title else "similarity"
    if not title.startswith(("Every point", "Who is on", "All of ours")):
        return None
    curves = curves_of(page, column)
    if title.startswith("Every point"):
        return [point(page, curves[line[0]], line) for line in lines]
    floor = floor_of(curves)
    if title.startswith("Who is on"):
        return [pair(page, curves, line[0], line[1], floor) for line in lines]
    return [overview(page, curves, line[0], floor, head) for line in lines]


def same(a: str, b: str) -> bool:
    """Equal, or equal but for a sign of zero, or not checked."""
    return b == UNCHECKED or a.replace("-0.000", "+0.000") == b.replace("-0.000", "+0.000")


def main(folder: Path) -> int:
    page, checked, wrong = Page(folder), 0, []
    text = (folder / "tables.md").read_text()
    for where, said, value in sentences(page, text):
        checked += 1
        if not same(said, value):
            wrong.append(f"sentences / {where}: the page has {said!r}, the rows give {value!r}")
    for title, (head, *lines) in tables(text).items():
        again = expected(page, title, head, lines)
        for line, want in zip(lines, again or [], strict=False):
            for name, cell, value in zip(head, line, want, strict=True):
                checked += value != UNCHECKED
                if not same(cell, value):
                    wrong.append(
                        f"{title} / {line[0]} / {line[1]} / {name}: the page has {cell!r}, the rows give {value!r}"
                    )
    print("\n".join([*wrong, f"{checked} numbers worked out again, {len(wrong)} of them differ"]))
    return bool(wrong)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m bench.recheck FOLDER_OF_A_PAGE")
    try:
        raise SystemExit(main(Path(sys.argv[1])))
    except FileNotFoundError as error:
        raise SystemExit(
            f"error: {error.filename}: no such file; a page has tables.md, settings.json and its rows"
        ) from None
