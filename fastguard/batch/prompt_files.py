"""Rows to requests. What is wrong is found in all rows before any work, with the line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fastguard.batch.options import JobOptions
from fastguard.batch.request import FIELDS, Request, named_policy, parse
from fastguard.batch.tables import Problem, Prompts, rows

SHOWN = 20  # problems listed in an error message


class Source(NamedTuple):
    """What errors call the prompts, and what they count in them."""

    name: str = "prompts"
    unit: str = "row"

    @classmethod
    def of(cls, prompts: Prompts) -> Source:
        if not isinstance(prompts, (str, os.PathLike)):
            return cls()
        name = os.fspath(prompts)
        return cls(name, "row" if name.lower().endswith(".parquet") else "line")


class BadRows(ValueError):
    """Rows that cannot be made; `problems` has all of them, the message the first ones."""

    def __init__(self, source: Source, problems: list[Problem]) -> None:
        self.problems = problems
        lines = [f"{source.unit} {p.line}: {p.message}" for p in problems[:SHOWN]]
        if len(problems) > SHOWN:
            lines.append(f"... and {len(problems) - SHOWN} more")
        count = f"{len(problems)} bad row{'s' * (len(problems) != 1)}"
        super().__init__("\n  ".join([f"{source.name}: {count}, nothing was done", *lines]))


def load(prompts: Prompts, options: JobOptions, fields: Sequence[str] = FIELDS) -> tuple[list[Request], list[Problem]]:
    """The images of `prompts` (see `fastguard.batch.tables.rows`) under `checked` options, and the rows that are bad.

    fields  those that are read; if they are not all there are, others are ignored

    BadRows if there are any and not `options.keep_going`, or if no good row is left; ValueError if the prompts as a whole cannot be
    read (a file's ending, its header, no rows), OSError if the file is not there.
    """
    source = Source.of(prompts)
    base = Path(prompts).parent if isinstance(prompts, (str, os.PathLike)) else Path()
    named_policy.cache_clear()  # a policy file may have changed since the last job of this process
    requests: list[Request] = []
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    count = 0
    for line, row in rows(prompts, fields, strict=fields is FIELDS):
        count += 1
        if isinstance(row, Problem):
            problems.append(row)
            continue
        if fields is not FIELDS:
            row = {name: row[name] for name in fields if name in row}
        try:
            made = parse(row, options, count - 1, line=line, base=base)
            for request in made:
                if request.id in seen:
                    raise ValueError(
                        f"id={request.id!r}: is that of {source.unit} {seen[request.id]} too; must be unique"
                    )
        except ValueError as error:
            problems.append(Problem(line, str(error), row))
            continue
        seen.update((request.id, line) for request in made)
        requests.extend(made)
    if not count:
        raise ValueError(f"{source.name}: there is no prompt in it")
    if problems and (not options.keep_going or not requests):
        raise BadRows(source, problems)
    return requests, problems
