"""The command that says why requests waited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twinserve.commands.options import Json, Traces
from twinserve.settings.errors import InputError

if TYPE_CHECKING:
    from twinserve.traces.runs.waits import Waited


def explain(
    run: Annotated[Path, typer.Argument(help="A run record, a fleet's, or a vLLM step log.")],
    request: Annotated[int | None, typer.Option(help="Of this request alone.")] = None,
    slowest: Annotated[
        int | None, typer.Option(min=1, help="Of so many requests, those that waited longest for a first token.")
    ] = None,
    traces: Traces = None,
    as_json: Json = False,
) -> None:
    """Why requests waited: every nanosecond of their times charged to one cause.

    The decisions are made again for it, as a replay does. The parts of a time add up to it exactly.
    """
    from twinserve.commands.tables import waits_table
    from twinserve.traces.runs.vllm_records import load_deciders
    from twinserve.traces.runs.waits import slowest_of, sums_of, waits_of

    def values(waits: list[Waited]) -> dict[str, Any]:
        return {"requests": [one.row["id"] for one in waits], **sums_of(waits)}

    if request is not None and slowest is not None:
        raise InputError("expected none beside request", field="slowest", value=slowest)
    waits = waits_of(load_deciders(run, traces))
    if request is not None:
        chosen = [one for one in waits if one.row["id"] == request]
        if not chosen:
            raise InputError("expected one that has ended in this run", path=run, field="request", value=request)
    else:
        chosen = slowest_of(waits, slowest or 0)
    is_whole = request is None and slowest is None
    if as_json:
        print(json.dumps(values(waits) if is_whole else [values([one]) for one in chosen]))
    elif is_whole:
        waits_table(f"{len(waits)} requests", waits)
    else:
        for one in chosen:
            waits_table(f"request {one.row['id']}", [one])
