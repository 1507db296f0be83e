"""Prompt files to requests. What is wrong is found in all rows before any work, with the line."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastguard.batch.request import FIELDS, Defaults, Request, named_policy, parse
from fastguard.files import is_unicode, short

SHOWN = 20  # problems listed in an error message
INTEGERS = ("seed", "steps", "width", "height")
MOST_DIGITS = 4300  # of an integer that Python reads from text


@dataclass(frozen=True)
class Problem:
    """A row that cannot be made. line: of the file, from 1 (of a parquet file or a list: its row). values: as they were read."""

    line: int
    message: str
    values: Any = None


Prompts = str | os.PathLike[str] | Iterable[str | Mapping[str, Any]]


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


def load(prompts: Prompts, defaults: Defaults, *, keep_going: bool = False) -> tuple[list[Request], list[Problem]]:
    """The images of a prompt file (.txt, .csv, .jsonl, .parquet) or of a list of prompts or rows, and the rows that are bad.

    BadRows if there are any and not `keep_going`, or if no good row is left; ValueError if the file as a whole cannot be read (its
    ending, its header, no rows), OSError if it is not there.
    """
    source, base = Source.of(prompts), Path()
    if isinstance(prompts, (str, os.PathLike)):
        base = Path(prompts).parent
        rows = _read(Path(prompts))
    else:
        rows = _listed(prompts)

    named_policy.cache_clear()  # a policy file may have changed since the last job of this process
    requests: list[Request] = []
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    count = 0
    for line, row in rows:
        count += 1
        if isinstance(row, Problem):
            problems.append(row)
            continue
        try:
            made = parse(row, defaults, count - 1, line=line, base=base)
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
    if problems and (not keep_going or not requests):
        raise BadRows(source, problems)
    return requests, problems


Rows = Iterator[tuple[int, "Mapping[str, Any] | Problem"]]


def _listed(prompts: Iterable[Any]) -> Rows:
    for number, prompt in enumerate(prompts, 1):
        if isinstance(prompt, (str, Mapping)):
            yield number, {"prompt": prompt} if isinstance(prompt, str) else prompt
        else:
            message = f"prompts[{number - 1}] is {type(prompt).__name__}: must be text or a mapping"
            yield number, Problem(number, message, repr(prompt))


def _read(path: Path) -> Rows:
    readers = {".txt": _txt, ".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise ValueError(f"prompts={str(path)!r}: must end in {', '.join(readers)}")
    return readers[path.suffix.lower()](path)


def _decoded(path: Path) -> str:
    """The text of a file; bytes that are not UTF-8 become lone surrogates, which no field may hold: so the row's line is known."""
    return path.read_bytes().decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    text = _decoded(path)
    lines = text.removesuffix("\n").split("\n") if text else []
    return ((number, line.removesuffix("\r")) for number, line in enumerate(lines, 1))


def _txt(path: Path) -> Rows:
    for number, line in _lines(path):
        yield number, {"prompt": line}


def _jsonl(path: Path) -> Rows:
    for number, line in _lines(path):
        try:
            if not is_unicode(line):
                raise ValueError("is not UTF-8 text")
            values = json.loads(line, object_pairs_hook=_unique, parse_int=_integer, parse_constant=_no_constant)
            if not isinstance(values, dict):
                raise ValueError(
                    f"is a JSON {type(values).__name__}: must be an object with the fields {', '.join(FIELDS)}"
                )
        except (ValueError, RecursionError) as error:
            reason = str(error)
            if isinstance(error, json.JSONDecodeError):
                reason = f"not valid JSON: {error.msg} at character {error.colno}"
            yield number, Problem(number, reason, line)
        else:
            yield number, values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"field {short(name)} is given twice")
    return dict(pairs)


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"an integer has {len(text)} characters: at most {MOST_DIGITS} are allowed")
    return int(text)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _csv(path: Path) -> Rows:
    reader = csv.reader(io.StringIO(_decoded(path), newline=""), strict=True)
    header: list[str] | None = None
    start = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}: line {start}: not valid CSV: {error}") from None
        if cells is None:
            return
        if header is None:
            header = _header(path, cells)
        elif len(cells) != len(header):
            message = f"has {len(cells)} cells, but the header has {len(header)} columns"
            yield start, Problem(start, message, cells)
        else:
            yield start, {name: cell or None for name, cell in zip(header, cells, strict=True)}
        start = reader.line_num + 1


def _header(path: Path, names: list[str]) -> list[str]:
    names = [name.strip() for name in names]
    for name in names:
        if name not in FIELDS:
            raise ValueError(f"{path}: line 1: unknown column {short(name)}: allowed are {', '.join(FIELDS)}")
        if names.count(name) > 1:
            raise ValueError(f"{path}: line 1: column {name!r} is there twice")
    if "prompt" not in names:
        raise ValueError(f"{path}: line 1: there is no column 'prompt' among {', '.join(names) or 'none'}")
    return names


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"prompts={str(path)!r}: needs pyarrow; pip install 'diffusers-fastguard[parquet]'") from None
    if not path.is_file():
        raise FileNotFoundError(2, "No such file", str(path))
    try:
        with parquet.ParquetFile(path) as file:
            names = _header(path, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=4096):
                for row in _batch_rows(batch, names):
                    number += 1
                    yield number, Problem(number, row) if isinstance(row, str) else row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"prompts={str(path)!r}: not a readable parquet file: {first}") from None


def _batch_rows(batch: Any, names: list[str]) -> Iterator[dict[str, Any] | str]:
    """The rows of a record batch; of one that holds what Python cannot, why: text that is no UTF-8, the year 30000, unknown time zones."""
    columns = dict(zip(names, batch.columns, strict=True))
    for i in range(batch.num_rows):
        row: dict[str, Any] = {}
        try:
            for name, column in columns.items():
                row[name] = column[i].as_py()
        except (ValueError, OverflowError, LookupError, NotImplementedError) as error:
            yield f"{name}: not a readable {column.type}: {error}"
            continue
        for name in INTEGERS:  # a column with gaps comes from pandas as float
            if isinstance(row.get(name), float) and row[name].is_integer():
                row[name] = int(row[name])
        yield row
