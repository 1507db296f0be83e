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

    name: str
    unit: str

    @classmethod
    def of(cls, prompts: Prompts) -> Source:
        if not isinstance(prompts, (str, os.PathLike)):
            return cls("prompts", "row")
        return cls(os.fspath(prompts), "row" if os.fspath(prompts).lower().endswith(".parquet") else "line")


class BadRows(ValueError):
    """Rows that cannot be made; `problems` has all of them, the message the first ones."""

    def __init__(self, source: Source, problems: list[Problem]) -> None:
        self.problems = problems
        told = [f"{source.unit} {p.line}: {p.message}" for p in problems[:SHOWN]]
        told += [f"... and {len(problems) - SHOWN} more"] * (len(problems) > SHOWN)
        count = f"{len(problems)} bad row{'s' * (len(problems) != 1)}"
        super().__init__("\n  ".join([f"{source.name}: {count}, nothing was done", *told]))


def load(prompts: Prompts, options: JobOptions, fields: Sequence[str] = FIELDS) -> tuple[list[Request], list[Problem]]:
    """The images of `prompts` (see `fastguard.batch.tables.rows`) under options with a Policy, and the rows that are bad.

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
    for index, (line, row) in enumerate(rows(prompts, fields)):
        if isinstance(row, Problem):
            problems.append(row)
            continue
        try:
            read = row if fields == FIELDS else {name: row[name] for name in fields if name in row}
            made = parse(read, options, index, line=line, base=base)
            for request in made:
                if (first := seen.setdefault(request.id, line)) != line:
                    raise ValueError(f"id={request.id!r}: is that of {source.unit} {first} too; must be unique")
            requests += made
        except ValueError as error:
            problems.append(Problem(line, str(error), row))
    if not requests and not problems:
        raise ValueError(f"{source.name}: there is no prompt in it")
    if problems and (not options.keep_going or not requests):
        raise BadRows(source, problems)
    return requests, problems
