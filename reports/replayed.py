"""What comes of deciding a run again: whether that is exact, what requests waited for, which blocks were cached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from twinserve.reports.runs import Run
from twinserve.settings.errors import InputError
from twinserve.traces.runs.pools import Cached, PoolExplainer
from twinserve.traces.runs.waits import Waited, joined

_FACTS = {"seen", "aborted", "committed"}
"""What a step's row says of what its decision saw."""


@dataclass(frozen=True)
class Replayed:
    """What came of deciding a run again.

    Attributes:
        words: whether that is exact.
        waits: what the time of each request went into; None where it is not.
        cached: how many free KV blocks were cached, of each replica; none where it is not.
    """

    words: str
    waits: list[Waited] | None = None
    cached: tuple[Cached, ...] = ()


def replayed(run: Run, listener: Any = None) -> Replayed:
    """Decide a run again from its facts, each replica of a fleet in turn, heard by `listener`; say what came of it."""
    equal = recorded = 0
    every: list[Waited] = []
    cached: list[Cached] = []
    for record in run.replicas or (run.record,):
        if record.steps and not record.steps[0].keys() >= _FACTS:
            return Replayed("Not replayed: the steps do not say what each decision saw.")
        explainer = PoolExplainer(record, listener)
        try:
            result = explainer.decide_again(record)
        except InputError as error:
            return Replayed(f"Not replayed: {error}.")
        equal, recorded = equal + result.equal, recorded + len(record.steps)
        if result.difference is not None:
            where = f"replica {record.path.name}, " if run.replicas else ""
            return Replayed(f"Does not replay: differs after {equal:,} decisions, {where}{result.difference}.")
        every += explainer.ended()
        cached.append(explainer.cached)
    if not recorded:
        return Replayed("Not replayed: the record has no steps.")
    waits = joined(every, is_fleet=len(run.replicas) > 1)
    return Replayed(f"Replays exactly: {equal:,} of {recorded:,} decisions made again.", waits, tuple(cached))
