"""A run record as tables: a row a request, a row a step, nothing nested; for pandas, Parquet and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from twinserve.settings.errors import InputError
from twinserve.settings.files import WholeFolder, writing
from twinserve.traces.formats.recorded import replica_place
from twinserve.traces.runs.fleet_record import is_fleet, load_replicas
from twinserve.traces.runs.metrics import SERVED
from twinserve.traces.runs.record import RunRecord
from twinserve.traces.runs.vllm_records import load_run

if TYPE_CHECKING:
    from pandas import DataFrame

_NESTED = ("prompt", "stop_token_ids")
_COUNTED = ("admitted", "left", "preempted", "aborted")

Row = dict[str, Any]


def _tpot_ns(row: Row) -> float | None:
    gaps = row["output_tokens"] - 1
    return (row["finish_ns"] - row["first_token_ns"]) / gaps if gaps > 0 else None


LATENCY_NS = {
    "ttft_s": lambda row: row["first_token_ns"] - row["arrival_ns"],
    "tpot_s": _tpot_ns,
    "e2e_s": lambda row: row["finish_ns"] - row["arrival_ns"],
}
"""Of the row of a request that was served; None for TPOT of an answer of one token."""


class Frames(NamedTuple):
    """A run as pandas has it.

    Attributes:
        requests: a row a request; see `request_rows`.
        steps: a row a step; see `step_rows`.
    """

    requests: DataFrame
    steps: DataFrame


def load(run: str | Path) -> Frames:
    """A run record, or a vLLM step log, as two pandas frames; indexed by request and by step.

    Raises:
        InputError: it cannot be read, or pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise InputError("needs pandas: pip install pandas") from error

    record = load_run(Path(run))
    requests = pandas.DataFrame(request_rows(record)).set_index("id")
    steps = pandas.DataFrame(step_rows(record))
    return Frames(requests, steps)


def request_rows(record: RunRecord) -> list[Row]:
    """A row a request: the record's own fields but for its prompt's parts, and its latencies in seconds.

    `ttft_s`, `tpot_s` and `e2e_s` are those of the summary: of requests that were served alone, TPOT of answers longer
    than one token; `wait_s` lasts from arrival until it was first scheduled.
    """
    names = dict.fromkeys(name for row in record.requests for name in row if name not in _NESTED)
    rows = []
    for row in record.requests:
        times: Row = dict.fromkeys(("wait_s", "ttft_s", "tpot_s", "e2e_s"))
        if row["first_scheduled_ns"] is not None:
            times["wait_s"] = (row["first_scheduled_ns"] - row["arrival_ns"]) / 1e9
        if row["finish_reason"] in SERVED:
            took_ns = {name: latency(row) for name, latency in LATENCY_NS.items()}
            times |= {name: None if ns is None else ns / 1e9 for name, ns in took_ns.items()}
        rows.append({name: row.get(name) for name in names} | times)
    return rows


def step_rows(record: RunRecord) -> list[Row]:
    """A row a step: the plain fields of its row in the record, how many requests were admitted, left, were preempted or
    aborted, and its duration in seconds. Of a fleet, those of each replica in turn, with its number and its life."""
    if not is_fleet(record.path):
        return [_step_row(row) for row in record.steps]
    rows = []
    for part in load_replicas(record.path):
        replica, life = replica_place(part.path) or (0, 0)
        rows += [{"replica": replica, "life": life} | _step_row(row) for row in part.steps]
    return rows


def _step_row(row: Row) -> Row:
    plain = {name: value for name, value in row.items() if not isinstance(value, (list, dict)) and name != "count"}
    counts = {name: len(row[name]) for name in _COUNTED if name in row}
    return plain | counts | {"duration_s": (row["end_ns"] - row["start_ns"]) / 1e9}


def export_tables(record: RunRecord, out: Path, kind: Literal["csv", "parquet"]) -> None:
    """Write `requests` and `steps` of a run as two files of that kind into the new folder `out`.

    Raises:
        InputError: `out` exists or cannot be written, or what writes Parquet is not installed.
    """
    write = _write_csv if kind == "csv" else _parquet_writer()
    with WholeFolder(out) as folder:
        with writing(out):
            for name, rows in (("requests", request_rows(record)), ("steps", step_rows(record))):
                write(folder.partial / f"{name}.{kind}", rows)
        folder.finish()


def _names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _write_csv(path: Path, rows: list[Row]) -> None:
    """With a row of names; what is not known is empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _names(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8", newline="")


def _parquet_writer() -> Any:
    try:
        from pyarrow import Table, parquet
    except ImportError as error:
        raise InputError("needs pyarrow: pip install 'twinserve[traces]'") from error

    def write(path: Path, rows: list[Row]) -> None:
        parquet.write_table(Table.from_pydict({name: [row.get(name) for row in rows] for name in _names(rows)}), path)

    return write
