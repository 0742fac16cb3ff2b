"""Whether a run's record is decided again exactly, in words."""

from __future__ import annotations

from typing import Any

from twinserve.reports.runs import Run
from twinserve.settings.errors import InputError
from twinserve.traces.runs.replay import replay

_FACTS = {"seen", "aborted", "committed"}
"""What a step's row says of what its decision saw."""


def replayed(run: Run, listener: Any = None) -> str:
    """Decide a run again from its facts, each replica of a fleet in turn, heard by `listener`; say what came of it."""
    equal = recorded = 0
    for record in run.replicas or (run.record,):
        if record.steps and not record.steps[0].keys() >= _FACTS:
            return "Not replayed: the steps do not say what each decision saw."
        try:
            result = replay(record, listener=listener)
        except InputError as error:
            return f"Not replayed: {error}."
        equal, recorded = equal + result.equal, recorded + len(record.steps)
        if result.difference is not None:
            where = f"replica {record.path.name}, " if run.replicas else ""
            return f"Does not replay: differs after {equal:,} decisions, {where}{result.difference}."
    if not recorded:
        return "Not replayed: the record has no steps."
    return f"Replays exactly: {equal:,} of {recorded:,} decisions made again."
