"""Parquet: a table of any of the formats, as the lines that it would be as text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from twinserve.settings.errors import InputError


def lines(path: Path) -> Iterator[str]:
    """The rows of a file as lines of CSV, or of JSON where a column holds lists.

    Raises:
        InputError: pyarrow is not installed, or it cannot read the file.
    """
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError as error:
        problem = "is a Parquet file: expected the package pyarrow, pip install 'twinserve[traces]'"
        raise InputError(problem, path=path) from error
    try:
        file = parquet.ParquetFile(path)
        schema = file.schema_arrow
        is_flat = not any(types.is_nested(field.type) for field in schema)
        if is_flat:
            yield _csv_line(schema.names)
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                yield _csv_line(map(_text, row.values())) if is_flat else json.dumps(row, default=_text)
    except (ArrowException, OSError) as error:
        raise InputError(f"expected a whole Parquet file: {error}", path=path) from error


def _csv_line(values: Any) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(values)
    return text.getvalue()


def _text(value: Any) -> Any:
    """A value as CSV has it; instants, pandas' of nanoseconds too, in ISO 8601."""
    return value.isoformat(sep=" ") if isinstance(value, datetime) else value
