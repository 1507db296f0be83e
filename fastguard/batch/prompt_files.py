"""Prompts of any kind to requests: files (.txt, .csv, .jsonl, .parquet), lists, tables. What is wrong is found in all rows before any work."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastguard import checks
from fastguard.batch.options import JobOptions
from fastguard.batch.request import FIELDS, Request, named_policy, parse
from fastguard.files import is_unicode, parse_json, short

SHOWN = 20  # problems listed in an error message

Prompts = str | os.PathLike[str] | Iterable[str | Mapping[str, Any]]


@dataclass(frozen=True)
class Problem:
    """A row that cannot be made. line: of the file, from 1 (of a parquet file or a list: its row). values: as they were read."""

    line: int
    message: str
    values: Any = None

    @classmethod
    def of(cls, request: Request, message: str) -> Problem:
        return cls(request.line or 0, message, {"id": request.id, "prompt": request.prompt})


def named(prompts: Prompts) -> tuple[str, str]:
    """What errors call the prompts, and what they count in them."""
    if not isinstance(prompts, (str, os.PathLike)):
        return "prompts", "row"
    return os.fspath(prompts), "row" if os.fspath(prompts).lower().endswith(".parquet") else "line"


class BadRows(ValueError):
    """Rows that cannot be made; `problems` has all of them, the message the first ones."""

    def __init__(self, prompts: Prompts, problems: list[Problem]) -> None:
        self.problems = problems
        name, unit = named(prompts)
        told = [f"{unit} {p.line}: {p.message}" for p in problems[:SHOWN]]
        told += [f"... and {len(problems) - SHOWN} more"] * (len(problems) > SHOWN)
        count = f"{len(problems)} bad row{'s' * (len(problems) != 1)}"
        super().__init__("\n  ".join([f"{name}: {count}, nothing was done", *told]))


def load(prompts: Prompts, options: JobOptions, fields: Sequence[str] = FIELDS) -> tuple[list[Request], list[Problem]]:
    """The images of `prompts` (see `rows`) under options with a Policy, and the rows that are bad.

    fields  those that are read; if they are not all there are, others are ignored

    BadRows if there are any and not `options.keep_going`, or if no good row is left; ValueError if the prompts as a whole cannot be
    read (a file's ending, its header, no rows), OSError if the file is not there.
    """
    name, unit = named(prompts)
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
                    raise ValueError(f"id={request.id!r}: is that of {unit} {first} too; must be unique")
            requests += made
        except ValueError as error:
            problems.append(Problem(line, str(error), row))
    if not requests and not problems:
        raise ValueError(f"{name}: there is no prompt in it")
    if problems and (not options.keep_going or not requests):
        raise BadRows(prompts, problems)
    return requests, problems


Rows = Iterator[tuple[int, Mapping[str, Any] | Problem]]


def rows(prompts: Prompts, fields: Sequence[str] = FIELDS) -> Rows:
    """Line and values of every row of `prompts`: a file, a list of texts or mappings, or a table (pandas, polars, pyarrow, datasets).

    fields  the columns that are read, "prompt" among them, which a table with a header must have. Beside `FIELDS` a header may have no
            others; beside other fields they are of no concern.

    ValueError if the prompts as a whole cannot be read, FileNotFoundError if the file is not there.
    """
    if not isinstance(prompts, (str, os.PathLike)):
        return _listed(prompts)
    path = Path(prompts)
    ending = ".parquet" if path.is_dir() and any(path.rglob("*.parquet")) else path.suffix.lower()
    if ending == ".txt":
        return ((number, {"prompt": line}) for number, line in _lines(path) if line.strip())
    if ending == ".jsonl":
        return _jsonl(path, fields)
    if ending in (".csv", ".parquet"):
        return (_csv if ending == ".csv" else _parquet)(path, fields)
    raise ValueError(f"prompts={str(path)!r}: must end in .txt, .csv, .jsonl, .parquet")


def _listed(prompts: Any) -> Rows:
    kind = type(prompts).__name__
    if isinstance(prompts, Mapping):
        raise ValueError(f"prompts: a {kind} is no list; put a single row in one, of several splits give one")
    if isinstance(prompts, (set, frozenset)):
        raise ValueError(f"prompts: a {kind} has no order: must be a list")
    if hasattr(prompts, "iter_rows"):  # polars; to iterate over a table gives its columns
        prompts = prompts.iter_rows(named=True)
    elif hasattr(prompts, "to_pylist"):  # pyarrow
        prompts = prompts.to_pylist()
    elif hasattr(prompts, "itertuples"):  # pandas: missing is NaN or NA, integers with gaps are floats
        prompts = prompts.astype(object).where(prompts.notna(), None).to_dict("records")
    for number, prompt in enumerate(prompts, 1):
        if isinstance(prompt, (str, Mapping)):
            yield number, {"prompt": prompt} if isinstance(prompt, str) else prompt
        else:
            message = f"prompts[{number - 1}] is {type(prompt).__name__}: must be text or a mapping"
            yield number, Problem(number, message, repr(prompt))


def _decoded(path: Path) -> str:
    """The text of a file without its byte order marks (files that were put together have them in the middle, too).

    Bytes that are not UTF-8 become lone surrogates, which no field may hold: so the row's line is known.
    """
    return path.read_bytes().decode("utf-8", errors="surrogateescape").replace("\ufeff", "")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # not splitlines: it splits at U+2028 and others too, which JSON allows within a string
    text = _decoded(path)
    lines = text.removesuffix("\n").split("\n") if text else []
    return ((number, line.removesuffix("\r")) for number, line in enumerate(lines, 1))


def _jsonl(path: Path, fields: Sequence[str]) -> Rows:
    for number, line in _lines(path):
        try:
            if not is_unicode(line):
                raise ValueError("is not UTF-8 text")
            values = parse_json(line)
            if not isinstance(values, dict):
                kind = type(values).__name__
                raise ValueError(f"is a JSON {kind}: must be an object with the fields {', '.join(fields)}")
            yield number, values
        except json.JSONDecodeError as error:
            yield number, Problem(number, f"not valid JSON: {error.msg} at character {error.colno}", line)
        except (ValueError, RecursionError) as error:
            yield number, Problem(number, str(error), line)


def _csv(path: Path, fields: Sequence[str]) -> Rows:
    reader = csv.reader(io.StringIO(_decoded(path), newline=""), strict=True)
    table, line = [], 1  # at which a row begins
    before = csv.field_size_limit(2**31 - 1)  # of the whole process; a cell that is too long is its row's problem
    try:
        for cells in reader:
            table.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}: line {line}: not valid CSV: {error}") from None
    finally:
        csv.field_size_limit(before)
    header = _header(path, table[0][1], fields) if table else []
    for line, cells in table[1:]:
        if len(cells) != len(header):
            yield line, Problem(line, f"has {len(cells)} cells, but the header has {len(header)} columns", cells)
        else:
            yield line, {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _header(path: Path, names: list[str], fields: Sequence[str]) -> list[str]:
    names = [name.strip() for name in names]
    told = None
    for name in reversed(names):
        if name not in fields and fields == FIELDS:
            told = f"unknown column {short(name)}: allowed are {', '.join(fields)}{checks.meant(name, fields)}"
        elif name in fields and names.count(name) > 1:
            told = f"column {short(name)} is there twice"
    if "prompt" not in names:
        told = told or f"there is no column 'prompt' among {short(', '.join(names) or 'none')}"
    for separator in ";\t|":
        if len(names) == 1 and separator in names[0] and "prompt" in names[0]:
            told = f"the separator is {separator!r}: must be a comma"
    if told is not None:
        raise ValueError(f"{path}: line 1: {told}")
    return names


def _parquet(path: Path, fields: Sequence[str]) -> Rows:
    """The rows of a file, or of the files of a directory in the order of their names, numbered from 1."""
    parquet = checks.extra("pyarrow.parquet", "parquet", f"prompts={str(path)!r}")
    pyarrow = checks.extra("pyarrow", "parquet", f"prompts={str(path)!r}")
    if not path.exists():
        raise FileNotFoundError(2, "No such file", str(path))
    number = 0
    for part in sorted(p for p in path.rglob("*.parquet") if p.is_file()) if path.is_dir() else [path]:
        try:
            with parquet.ParquetFile(part) as file:
                names = _header(part, file.schema_arrow.names, fields)
                wanted = [name for name in names if name in fields]
                for batch in file.iter_batches(batch_size=4096, columns=wanted):
                    for i in range(batch.num_rows):
                        number += 1
                        try:
                            yield number, batch.slice(i, 1).to_pylist()[0]
                        except (ValueError, OverflowError, LookupError, NotImplementedError) as error:
                            # text that is no UTF-8, the year 30000, unknown time zones
                            yield number, Problem(number, f"not a readable row: {error}")
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            first = str(error).partition("\n")[0]
            raise ValueError(f"prompts={str(part)!r}: not a readable parquet file: {first}") from None
