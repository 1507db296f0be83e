"""Prompts of any kind to rows: files (.txt, .csv, .jsonl, .parquet), lists, tables. A row that cannot be read is a `Problem`."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastguard import checks
from fastguard.files import is_unicode, parse_json, short

if TYPE_CHECKING:
    from fastguard.batch.request import Request

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


Rows = Iterator[tuple[int, "Mapping[str, Any] | Problem"]]


def rows(prompts: Prompts, fields: Sequence[str], *, strict: bool = True) -> Rows:
    """Line and values of every row of `prompts`: a file, a list of texts or mappings, or a table (pandas, polars, pyarrow, datasets).

    fields  the columns that are read, "prompt" among them, which a table with a header must have
    strict  a header with other columns is refused; otherwise they are of no concern

    ValueError if the prompts as a whole cannot be read, FileNotFoundError if the file is not there.
    """
    if not isinstance(prompts, (str, os.PathLike)):
        return _listed(prompts)
    path = Path(prompts)
    readers = {".txt": _txt, ".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.is_dir() and any(path.rglob("*.parquet")):
        return _parquet(path, fields, strict)
    if path.suffix.lower() not in readers:
        raise ValueError(f"prompts={str(path)!r}: must end in {', '.join(readers)}")
    return readers[path.suffix.lower()](path, fields, strict)


def _listed(prompts: Iterable[Any]) -> Rows:
    if isinstance(prompts, Mapping):
        raise ValueError(
            f"prompts: a {type(prompts).__name__} is no list; put a single row in one, of several splits give one"
        )
    if isinstance(prompts, (set, frozenset)):
        raise ValueError(f"prompts: a {type(prompts).__name__} has no order: must be a list")
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
    if hasattr(prompts, "itertuples"):  # pandas: what is missing is NaN or NA, an integer column with gaps is of floats
        return prompts.astype(object).where(prompts.notna(), None).to_dict("records")
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


def _txt(path: Path, fields: Sequence[str], strict: bool) -> Rows:
    return ((number, {"prompt": line}) for number, line in _lines(path) if line.strip())


def _jsonl(path: Path, fields: Sequence[str], strict: bool) -> Rows:
    for number, line in _lines(path):
        try:
            if not is_unicode(line):
                raise ValueError("is not UTF-8 text")
            values = parse_json(line)
            if not isinstance(values, dict):
                raise ValueError(
                    f"is a JSON {type(values).__name__}: must be an object with the fields {', '.join(fields)}"
                )
        except (ValueError, RecursionError) as error:
            reason = str(error)
            if isinstance(error, json.JSONDecodeError):
                reason = f"not valid JSON: {error.msg} at character {error.colno}"
            yield number, Problem(number, reason, line)
        else:
            yield number, values


def _csv(path: Path, fields: Sequence[str], strict: bool) -> Rows:
    table = _cells(path)
    header = _header(path, table[0][1], fields, strict) if table else []
    for line, cells in table[1:]:
        if len(cells) != len(header):
            yield line, Problem(line, f"has {len(cells)} cells, but the header has {len(header)} columns", cells)
        else:
            yield line, {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _cells(path: Path) -> list[tuple[int, list[str]]]:
    """The line at which a row begins, and its cells, however long: one that is too long is its row's problem."""
    reader = csv.reader(io.StringIO(_decoded(path), newline=""), strict=True)
    table, line = [], 1
    before = csv.field_size_limit(2**31 - 1)  # of the whole process
    try:
        for cells in reader:
            table.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}: line {line}: not valid CSV: {error}") from None
    finally:
        csv.field_size_limit(before)
    return table


def _header(path: Path, names: list[str], fields: Sequence[str], strict: bool) -> list[str]:
    names = [name.strip() for name in names]
    if len(names) == 1:
        for separator in (";", "\t", "|"):
            if "prompt" in (cell.strip(' "') for cell in names[0].split(separator)) and separator in names[0]:
                raise ValueError(f"{path}: line 1: the separator is {separator!r}: must be a comma")
    for name in names:
        if strict and name not in fields:
            allowed = f"allowed are {', '.join(fields)}{checks.meant(name, fields)}"
            raise ValueError(f"{path}: line 1: unknown column {short(name)}: {allowed}")
        if name in fields and names.count(name) > 1:
            raise ValueError(f"{path}: line 1: column {short(name)} is there twice")
    if "prompt" not in names:
        raise ValueError(f"{path}: line 1: there is no column 'prompt' among {short(', '.join(names) or 'none')}")
    return names


def _parquet(path: Path, fields: Sequence[str], strict: bool) -> Rows:
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
                names = _header(part, file.schema_arrow.names, fields, strict)
                wanted = [name for name in names if name in fields]
                for batch in file.iter_batches(batch_size=4096, columns=wanted):
                    for row in _batch_rows(batch):
                        number += 1
                        yield number, Problem(number, row) if isinstance(row, str) else row
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            first = str(error).partition("\n")[0]
            raise ValueError(f"prompts={str(part)!r}: not a readable parquet file: {first}") from None


def _batch_rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a record batch; of one that holds what Python cannot, why: text that is no UTF-8, the year 30000, unknown time zones."""
    for i in range(batch.num_rows):
        row: dict[str, Any] = {}
        try:
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                row[name] = column[i].as_py()
        except (ValueError, OverflowError, LookupError, NotImplementedError) as error:
            yield f"{name}: not a readable {column.type}: {error}"
            continue
        yield row
