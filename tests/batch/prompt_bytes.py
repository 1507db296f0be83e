"""Prompt files as bytes."""

from __future__ import annotations

import io
import json

import pyarrow as pa
from pyarrow import parquet


def table(**columns) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def rows(*values: dict) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def one(**values) -> bytes:
    """A good row and a bad one, in line 2."""
    return rows({"prompt": "a cat"}, {"prompt": "a dog"} | values)
