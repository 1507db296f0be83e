"""Prompts of any kind to rows: files (.txt, .csv, .jsonl, .parquet), lists, tables. A row that cannot be read is a `Problem`."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastguard import checks
from fastguard.files import is_unicode, short

MOST_DIGITS = 4300  # of an integer that Python reads from text
Prompts = str | os.PathLike[str] | Iterable[str | Mapping[str, Any]]


@dataclass(frozen=True)
class Problem:
    """A row that cannot be made. line: of the file, from 1 (of a parquet file or a list: its row). values: as they were read."""

    line: int
    message: str
    values: Any = None


Rows = Iterator[tuple[int, "Mapping[str, Any] | Problem"]]


def rows(prompts: Prompts, fields: Sequence[str] | None) -> Rows:
    """Line and values of every row of `prompts`: a file, a list of texts or mappings, or a table (pandas, polars, pyarrow, datasets).

    fields  the columns that a table with a header may have; None: any. It must have "prompt".

    ValueError if the prompts as a whole cannot be read, FileNotFoundError if the file is not there.
    """
    if not isinstance(prompts, (str, os.PathLike)):
        return _listed(prompts)
    path = Path(prompts)
    readers = {".txt": _txt, ".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise ValueError(f"prompts={str(path)!r}: must end in {', '.join(readers)}")
    return readers[path.suffix.lower()](path, fields)


def _listed(prompts: Iterable[Any]) -> Rows:
    if isinstance(prompts, Mapping):
        raise ValueError(
            f"prompts: a {type(prompts).__name__} is no list; put a single row in one, of several splits give one"
        )
    for number, prompt in enumerate(_records(prompts), 1):
        if isinstance(prompt, (str, Mapping)):
            yield number, {"prompt": prompt} if isinstance(prompt, str) else prompt
        else:
            message = f"prompts[{number - 1}] is {type(prompt).__name__}: must be text or a mapping"
            yield number, Problem(number, message, repr(prompt))


def _records(prompts: Any) -> Iterable[Any]:
    """The rows of a table: to iterate over one of pandas, polars or pyarrow gives its columns. Others are iterated over as they are."""
    if hasattr(prompts, "iter_rows"):  # polars
        return prompts.iter_rows(named=True)
    if hasattr(prompts, "to_pylist"):  # pyarrow
        return prompts.to_pylist()
    if hasattr(
        prompts, "itertuples"
    ):  # pandas, where what is missing is NaN or NA and an integer column with gaps is of floats
        present = prompts.notna().to_dict("records")
        values = prompts.to_dict("records")
        return (
            {name: value for name, value in row.items() if there[name]}
            for row, there in zip(values, present, strict=True)
        )
    return prompts


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


def _txt(path: Path, fields: Sequence[str] | None) -> Rows:
    return ((number, {"prompt": line}) for number, line in _lines(path) if line.strip())


def _jsonl(path: Path, fields: Sequence[str] | None) -> Rows:
    for number, line in _lines(path):
        try:
            if not is_unicode(line):
                raise ValueError("is not UTF-8 text")
            values = json.loads(line, object_pairs_hook=_unique, parse_int=_integer, parse_constant=_no_constant)
            if not isinstance(values, dict):
                allowed = f" with the fields {', '.join(fields)}" if fields else ""
                raise ValueError(f"is a JSON {type(values).__name__}: must be an object{allowed}")
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


def _csv(path: Path, fields: Sequence[str] | None) -> Rows:
    reader = csv.reader(io.StringIO(_decoded(path), newline=""), strict=True)
    header: list[str] | None = None
    start = 1
    while True:
        try:
            cells = _next_cells(reader)
        except csv.Error as error:
            raise ValueError(f"{path}: line {start}: not valid CSV: {error}") from None
        if cells is None:
            return
        if header is None:
            header = _header(path, cells, fields)
        elif len(cells) != len(header):
            message = f"has {len(cells)} cells, but the header has {len(header)} columns"
            yield start, Problem(start, message, cells)
        else:
            yield start, {name: cell or None for name, cell in zip(header, cells, strict=True)}
        start = reader.line_num + 1


def _next_cells(reader: Any) -> list[str] | None:
    """The next row, however long its cells are: one that is too long is its row's problem. The limit is the whole process'."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


def _header(path: Path, names: list[str], fields: Sequence[str] | None) -> list[str]:
    names = [name.strip() for name in names]
    if len(names) == 1:
        for separator in (";", "\t", "|"):
            if "prompt" in (cell.strip(' "') for cell in names[0].split(separator)) and separator in names[0]:
                raise ValueError(f"{path}: line 1: the separator is {separator!r}: must be a comma")
    for name in names:
        if fields is not None and name not in fields:
            allowed = f"allowed are {', '.join(fields)}{checks.meant(name, fields)}"
            raise ValueError(f"{path}: line 1: unknown column {short(name)}: {allowed}")
        if names.count(name) > 1:
            raise ValueError(f"{path}: line 1: column {short(name)} is there twice")
    if "prompt" not in names:
        raise ValueError(f"{path}: line 1: there is no column 'prompt' among {short(', '.join(names) or 'none')}")
    return names


def _parquet(path: Path, fields: Sequence[str] | None) -> Rows:
    """The rows of a file, or of the files of a directory in the order of their names, numbered from 1."""
    pyarrow = checks.extra("pyarrow", "parquet", f"prompts={str(path)!r}")
    parquet = checks.extra("pyarrow.parquet", "parquet", f"prompts={str(path)!r}")
    parts = sorted(p for p in path.rglob("*.parquet") if p.is_file()) if path.is_dir() else [path]
    if not all(part.is_file() for part in parts):
        raise FileNotFoundError(2, "No such file", str(path))
    number = 0
    for part in parts:
        try:
            with parquet.ParquetFile(part) as file:
                names = _header(part, file.schema_arrow.names, fields)
                for batch in file.iter_batches(batch_size=4096):
                    for row in _batch_rows(batch, names):
                        number += 1
                        yield number, Problem(number, row) if isinstance(row, str) else row
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            first = str(error).partition("\n")[0]
            raise ValueError(f"prompts={str(part)!r}: not a readable parquet file: {first}") from None


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
        yield row
