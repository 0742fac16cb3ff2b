"""Sweeps: many points from one file, computed once each, whatever stops the work on the way."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from twinserve.planning.objectives import Objective, cost_per_million_tokens
from twinserve.planning.parallel import Workers
from twinserve.planning.point import Job, Point, Result, compute
from twinserve.planning.prices import Prices
from twinserve.settings.config import read_toml
from twinserve.settings.errors import InputError
from twinserve.settings.files import ending_with, lock_file, write_whole
from twinserve.settings.limits import MOST_POINTS
from twinserve.traces.kinds import checker
from twinserve.traces.lines import Line
from twinserve.traces.runs.rows import Summary

_AXES = ("grid", "list")
_OF_THE_PLAN = ("seeds", "objective", "price_per_gpu_hour")


@with_config(ConfigDict(strict=True))
class _Attained(TypedDict):
    """What kept the limits, see `Attainment.of`."""

    limits: str
    share: float | None
    goodput_req_s: float | None
    goodput_tok_s: float | None


@with_config(ConfigDict(strict=True))
class _Summary(Summary):
    """Of a point's run."""

    attainment: NotRequired[_Attained]


@with_config(ConfigDict(strict=True))
class _StoredResult(TypedDict):
    """What a file of a point holds, see `compute`."""

    inputs: dict[str, Any]
    latency: str
    span_s: float
    transforms: list[dict[str, Any]]
    summary: _Summary
    beyond_fit: NotRequired[float]


_check_result = checker(_StoredResult)


@dataclass(frozen=True)
class Case:
    """Points that differ in their seed alone.

    Attributes:
        varied: the fields in which the cases of a plan differ, with this one's values.
        points: one a seed.
    """

    varied: dict[str, Any]
    points: list[Point]


@dataclass(frozen=True)
class Plan:
    """What to compute, and what to judge it by.

    Attributes:
        prices: of GPU-hours.
    """

    cases: list[Case]
    objective: Objective | None = None
    prices: Prices | None = None

    @property
    def points(self) -> list[Point]:
        """All points, case by case."""
        return [point for case in self.cases for point in case.points]


def load_plan(path: Path | None, overrides: dict[str, Any] | None = None) -> Plan:
    """A plan from a TOML file, and from `overrides`, which come last.

    At the top of the file stand fields that all points share, `seeds` (how many, from `seed` on), `objective` and
    `price_per_gpu_hour`, a number or a table of them by kind of GPU. `[[list]]` holds fields of one case after another;
    `[grid]` has a list of values a field, and every combination of them, the last field's changing fastest, goes with
    each entry of the list.

    Raises:
        InputError: the file cannot be read, or says something that cannot be used.
    """
    try:
        return _plan(({} if path is None else read_toml(path)) | (overrides or {}))
    except InputError as error:
        if path is None or str(error).startswith(f"{path}:"):
            raise
        raise InputError(str(error), path=path) from error


def _plan(values: dict[str, Any]) -> Plan:
    shared = {name: value for name, value in values.items() if name not in (*_AXES, *_OF_THE_PLAN)}
    seeds = values.get("seeds", 1)
    if type(seeds) is not int or seeds < 1:
        raise InputError("expected an integer >= 1", field="seeds", value=seeds)
    price = values.get("price_per_gpu_hour")
    prices = None if price is None else Prices.of(price)
    text = values.get("objective")
    if text is not None and type(text) is not str:
        raise InputError("expected text such as 'p99 TTFT <= 1 s'", field="objective", value=text)
    objective = None if text is None else Objective.parse(text)
    if objective is not None:
        shared |= objective.asked(bool(values.get("warm_up_s") or values.get("drain_s")), values.get("measured"))
    cases = []
    num_points = seeds * _num_cases(values)
    if num_points > MOST_POINTS:
        problem = f"expected a plan of at most {MOST_POINTS} points, seeds counted (TWINSERVE_MOST_POINTS)"
        raise InputError(problem, field="points", value=num_points)
    for varied in _variations(values):
        first = Point.of(shared | varied)
        if seeds > 1 and not first.is_random():
            raise InputError(
                "expected 1, as nothing here is random; arrivals = 'poisson', shuffle_seed or spread_seed would be",
                field="seeds",
                value=seeds,
            )
        cases.append(Case(varied, [first.model_copy(update={"seed": first.seed + number}) for number in range(seeds)]))
    return Plan(cases, objective, prices)


def _num_cases(values: dict[str, Any]) -> int:
    """How many combinations there are, as far as lists are lists."""
    grid, listed = values.get("grid"), values.get("list", [{}])
    lengths = [len(choices) for choices in grid.values() if isinstance(choices, list)] if isinstance(grid, dict) else []
    return math.prod(lengths) * (len(listed) if isinstance(listed, list) else 1)


def _variations(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What each case has beside the shared fields."""
    grid, listed = values.get("grid", {}), values.get("list", [{}])
    if type(grid) is not dict:
        raise InputError("expected a table of lists", field="grid", value=grid)
    for name, choices in grid.items():
        if type(choices) is not list or not choices:
            raise InputError("expected a list of values", field=f"grid.{name}", value=choices)
    if type(listed) is not list or not listed or not all(type(entry) is dict for entry in listed):
        raise InputError("expected an array of tables, [[list]]", field="list", value=listed)
    for entry in listed:
        for name in entry:
            if name in grid:
                raise InputError("expected it only there", field=f"list has {name}, which stands in [grid]")
        for choice in product(*grid.values()):
            yield entry | dict(zip(grid, choice, strict=True))


class Store:
    """Finished points by their keys; in a folder, each as a file that is there whole or not at all.

    One process at a time uses a folder; what it has finished is there for the next.

    Args:
        folder: made where there is none; None keeps the points in memory.

    Raises:
        InputError: the folder holds something else, cannot be written, or is in use.
    """

    def __init__(self, folder: Path | None = None):
        self._folder, self._known = folder, dict[str, Result]()
        if folder is None:
            return
        self._is_new = not folder.exists()
        try:
            if folder.exists() and not (folder / "points").is_dir() and any(folder.iterdir()):
                raise InputError("expected a new name, or the folder of an earlier sweep", path=folder)
            (folder / "points").mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(folder / "lock")
        except BlockingIOError as error:
            raise InputError("is in use by another sweep", path=folder) from error
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"cannot be written: {getattr(error, 'strerror', None) or error}", path=folder) from error

    def get(self, job: Job) -> Result | None:
        """The result of a job that was finished before.

        Raises:
            InputError: there is a file, and it is not what was written.
        """
        if job.key not in self._known and self._folder is not None and self._path(job).exists():
            try:
                result = json.loads(self._path(job).read_text(encoding="utf-8"))
                if result["inputs"] != job.inputs:
                    raise ValueError("another point's")
                _check_result(Line(self._path(job), None, result))
                if job.point.limits is not None and "attainment" not in result["summary"]:
                    raise ValueError("without attainment")
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                raise InputError("is not what a sweep wrote, remove it", path=self._path(job)) from error
            self._known[job.key] = result
        return self._known.get(job.key)

    def put(self, job: Job, result: Result) -> None:
        """Keep the result of a job."""
        self._known[job.key] = json.loads(json.dumps(result))
        if self._folder is not None:
            write_whole(self._path(job), json.dumps(result) + "\n", replaces=True)

    def _path(self, job: Job) -> Path:
        assert self._folder is not None
        return self._folder / "points" / f"{job.key}.json"

    def holds_something(self) -> bool:
        """Are there points in its folder?"""
        return self._folder is not None and any((self._folder / "points").iterdir())

    def close(self) -> None:
        """Let the next process have the folder; one that it has made is gone where no point got into it."""
        if self._folder is not None:
            with suppress(OSError):
                if self._is_new and not self.holds_something():
                    (self._folder / "points").rmdir()
                    (self._folder / "lock").unlink()
                    self._folder.rmdir()
            self._lock.close()


@contextmanager
def opened(folder: Path | None) -> Iterator[Store]:
    """A store that is closed in the end; who is stopped before it reads how to go on."""
    store = Store(folder)
    try:
        goes_on = f"the same command goes on with what is in {folder}"
        with ending_with(lambda: goes_on if store.holds_something() else ""):
            yield store
    finally:
        store.close()


def run_points(
    points: Iterable[Point],
    store: Store,
    workers: Workers,
    *,
    advance: Callable[[], None] | None = None,
    compute: Callable[[Job], Result] = compute,
) -> list[Result]:
    """The result of every point, in their order; those in the store are not computed, and none is computed twice.

    Args:
        advance: called as each point that has to be computed is finished.

    Raises:
        InputError: a point cannot be computed; those that can are in the store.
    """
    jobs = [Job.of(point) for point in points]
    missing = list({job.key: job for job in jobs if store.get(job) is None}.values())
    failure = None
    for number, result in workers.computed(compute, missing):
        if isinstance(result, InputError):
            failure = failure or result
        else:
            store.put(missing[number], result)
        if advance is not None:
            advance()
    if failure is not None:
        raise failure
    results = [store.get(job) for job in jobs]
    return [result for result in results if result is not None]


def num_missing(points: Iterable[Point], store: Store) -> int:
    """How many of the points are still to be computed."""
    return len({job.key for point in points if store.get(job := Job.of(point)) is None})


def rows_of(plan: Plan, results: list[Result]) -> list[Result]:
    """A row a point, in the order of the plan: its fields, which of them vary, identities, and its result.

    With an objective, `missed` says what of it is missed; with a price, `cost` is that of a million tokens, of output
    and in all.
    """
    rows = []
    cases = [case for case in plan.cases for _ in case.points]
    for case, point, result in zip(cases, plan.points, results, strict=True):
        identities = {name: result["inputs"][name] for name in ("trace", "replicas", "code")}
        row: Result = {"varied": case.varied, "point": point.flat(), "identities": identities}
        row |= {name: value for name, value in result.items() if name != "inputs"}
        if plan.objective is not None:
            row["missed"] = plan.objective.missed(result["summary"])
        if plan.prices is not None:
            row["cost"] = cost_of([result], plan.prices.per_hour(point.gpus()))
        rows.append(row)
    return rows


def cost_of(results: list[Result], price_per_hour: float) -> dict[str, float | None]:
    """What a million tokens cost in the mean over runs, all GPUs at so much an hour: of output, and in all.

    Of a fleet that scales, those replicas are paid for that were there, from when they were asked for.
    """
    costs = {}
    price_per_hour *= statistics.fmean(_share_paid(result["summary"]) for result in results)
    for name, metric in (("output", "output_tok_s"), ("total", "total_tok_s")):
        rates = [result["summary"][metric] for result in results]
        mean = None if None in rates else statistics.fmean(rates)
        costs[name] = cost_per_million_tokens(mean, price_per_hour)
    return costs


def _share_paid(summary: dict[str, Any]) -> float:
    """The share of a fleet's replicas that is paid for, over the duration of a run."""
    if not summary.get("leases") or not summary["duration_s"]:
        return 1.0
    return summary["replica_s"] / (summary["duration_s"] * summary["most_replicas"])


def lines_of(rows: list[Result]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)
