"""Capacity: the highest rate, or the fewest replicas, that keeps an objective."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import NamedTuple

from twinserve.planning.objectives import Objective, interval
from twinserve.planning.parallel import Workers
from twinserve.planning.point import Job, Point, Result, Sought, compute
from twinserve.planning.sweep import Case, Plan, Store, cost_of, run_points
from twinserve.settings.errors import InputError
from twinserve.sim.intervals import Intervals, intervals

_MOST_REPLICAS = 1024
LEAST_TOLERANCE = 1e-6
"""Of a search for a rate: finer grids differ by less than rates are told to."""
_MOST_RETREATS = 100
"""So many lower loads are tried where what each seed keeps alone is not kept by all."""
_FLOOR = 0.99
"""Where more replicas leave more than this share of what misses an objective, no number of them lowers it."""
_WIDEST = 1024.0
"""Rates are tried up to so many times the one that the search begins with, and down to its so many-th part."""


class Found(NamedTuple):
    """The ends of a search: the largest number that keeps, and the one after it, which does not.

    `kept` is None where no number that may be tried keeps, `failed` where every one does.
    """

    kept: int | None
    failed: int | None


def largest(start: int, lowest: int, highest: int, stride: int = 1) -> Generator[int, bool, Found]:
    """Search the largest number in [lowest, highest] that keeps, if all smaller ones do.

    Yields a number at a time and is sent whether it keeps: away from `start` in strides that double until the answer
    changes, and then by bisection.
    """
    kept = failed = None
    number = start
    while kept is None or failed is None:
        if (yield number):
            kept = number
            if failed is None and number == highest:
                return Found(kept, None)
        else:
            failed = number
            if kept is None and number == lowest:
                return Found(None, failed)
        if kept is None or failed is None:
            number = min(highest, number + stride) if failed is None else max(lowest, number - stride)
            stride *= 2
    while failed - kept > 1:
        middle = (kept + failed) // 2
        if (yield middle):
            kept = middle
        else:
            failed = middle
    return Found(kept, failed)


class Scale:
    """Values of what is sought, as numbers that a search goes up while they keep.

    Rates stand on a grid, each `1 + tolerance` times the one before, the same for every search: so a search ends at two
    neighbours, and two searches share what they have computed. Replicas are numbered downwards.

    Args:
        most_gpus: no more replicas are tried than have so many GPUs with all others, but one; None: no bound.
    """

    def __init__(self, sought: Sought, tolerance: float, most_gpus: int | None = None):
        self.sought, self._ratio, self._most_gpus = sought, 1 + tolerance, most_gpus

    def value(self, number: int) -> float | int:
        """What stands at a number."""
        return float(f"{self._ratio**number:.6g}") if self.sought == "rate" else -number

    def search(self, point: Point) -> Generator[int, bool, Found]:
        """A search that begins at the point's own value; at a trace's own rate where it has none."""
        if self.sought != "rate":
            most = _MOST_REPLICAS
            if self._most_gpus is not None:
                one, two = (sum(self.at(point, -count).gpus().values()) for count in (1, 2))
                most = max(1, 1 + (self._most_gpus - one) // (two - one))
            count = point.fleet.num_replicas if self.sought == "replicas" else point.fleet.decode_replicas
            return largest(-min(count, most), -most, -1)
        rate = point.rate or point.own_rate() or 1.0
        start, reach = (round(math.log(x) / math.log(self._ratio)) for x in (rate, _WIDEST))
        return largest(start, start - reach, start + reach, max(1, round(math.log(1.5) / math.log(self._ratio))))

    def at(self, point: Point, number: int) -> Point:
        """The point with what stands at a number."""
        return point.with_sought(self.sought, self.value(number))


@dataclass(frozen=True)
class Capacity:
    """What a case can do.

    Attributes:
        case: its points are those at which the search began.
        sought: "rate" in requests a second, "replicas", or "decode_replicas" beside the case's own for prefill.
        value: the highest rate, or the fewest replicas, that was run with every seed and kept the objective in each;
            None where none was found.
        failed: the neighbour that misses it in at least one seed: the next rate, or a replica fewer; None where every
            value that was tried keeps.
        missed: what is missed at `failed`, in words.
        by_seed: the same as `value`, of each seed alone; None where none was found.
        results: of the runs at `value`, one a seed.
        num_runs: how many runs that took, those that were in the store among them.
        tried: the results at every value that was run, of the seeds for which it was, from the lowest value on.
        intervals: the limits of each metric at `value`, see `with_intervals`.
        has_floor: no value was found because more replicas do not lower what is missed, as when one request alone
            takes longer than its limit.
    """

    case: Case
    sought: Sought
    value: float | int | None
    failed: float | int | None
    missed: list[str]
    by_seed: list[float | int | None]
    results: list[Result] = field(repr=False)
    num_runs: int
    tried: dict[float | int, list[Result]] = field(default_factory=dict, repr=False)
    intervals: Intervals = field(default_factory=dict)
    has_floor: bool = False

    @property
    def point(self) -> Point:
        """The case's first point at `value`, which is not None."""
        assert self.value is not None
        return self.case.points[0].with_sought(self.sought, self.value)

    @property
    def mean(self) -> float | None:
        """Of `by_seed`."""
        known = self._known()
        return statistics.fmean(known) if known else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of the mean over seeds; None with one seed."""
        return interval(self._known())

    def _known(self) -> list[float | int]:
        known = [value for value in self.by_seed if value is not None]
        return known if len(known) == len(self.by_seed) else []


def find_capacities(
    plan: Plan,
    sought: Sought,
    store: Store,
    workers: Workers,
    *,
    tolerance: float = 0.02,
    most_gpus: int | Sequence[int] | None = None,
    advance: Callable[[], None] | None = None,
    compute: Callable[[Job], Result] = compute,
) -> list[Capacity]:
    """The capacity of every case of a plan, in their order.

    Each seed of a case is a search of its own; all searches go on side by side. What every seed keeps is then run with
    every seed, and where a seed misses it all the same, as it may where more load happens to be better than less, the
    next lower load is tried.

    Args:
        tolerance: rates are found to such a share of themselves.
        most_gpus: no more replicas are tried than have so many GPUs together, of all cases, or one number a case.
        advance: called as each point is finished.

    Raises:
        InputError: the plan has no objective, or a point cannot be computed.
    """
    objective = plan.objective
    if objective is None:
        raise InputError("is missing, expected text such as 'p99 TTFT <= 1 s'", field="objective")
    if not LEAST_TOLERANCE <= tolerance < 1:
        raise InputError(f"expected a share from {LEAST_TOLERANCE} to below 1", field="tolerance", value=tolerance)
    most = most_gpus if isinstance(most_gpus, Sequence) else [most_gpus] * len(plan.cases)
    finders = [
        _finder(case, Scale(sought, tolerance, of_case), objective)
        for case, of_case in zip(plan.cases, most, strict=True)
    ]
    wanted = {number: next(finder) for number, finder in enumerate(finders)}
    found: dict[int, Capacity] = {}
    while wanted:
        points = [point for of_case in wanted.values() for point in of_case]
        results = iter(run_points(points, store, workers, advance=advance, compute=compute))
        for number, of_case in list(wanted.items()):
            try:
                wanted[number] = finders[number].send(list(islice(results, len(of_case))))
            except StopIteration as end:
                found[number] = end.value
                del wanted[number]
    return [found[number] for number in range(len(finders))]


def _finder(case: Case, scale: Scale, objective: Objective) -> Generator[list[Point], list[Result], Capacity]:
    """The search of a case: yields the points that it has to know next, and is sent their results."""
    searches = [scale.search(point) for point in case.points]
    numbers = [next(search) for search in searches]
    found: dict[int, Found] = {}
    missed: dict[tuple[int, int], list[str]] = {}
    ran: dict[int, dict[int, Result]] = {}
    num_runs = 0
    lacking: dict[int, tuple[int, float]] = {}  # by seed, a number that misses, and its load
    has_floor = False
    while live := [seed for seed in range(len(searches)) if seed not in found]:
        num_runs += len(live)
        results = yield [scale.at(case.points[seed], numbers[seed]) for seed in live]
        for seed, result in zip(live, results, strict=True):
            ran.setdefault(numbers[seed], {})[seed] = result
            missed[seed, numbers[seed]] = what = objective.missed(result["summary"])
            if what and scale.sought != "rate":
                tried, load = numbers[seed], objective.load_of(result["summary"])
                before, load_before = lacking.setdefault(seed, (tried, load))
                if tried <= 2 * before:  # replicas are numbered downwards: at least twice as many
                    if math.inf > load > _FLOOR * load_before:
                        has_floor = True
                        found[seed] = Found(None, tried)
                        continue
                    lacking[seed] = tried, load
            try:
                numbers[seed] = searches[seed].send(not what)
            except StopIteration as end:
                found[seed] = end.value
    kept = [found[seed].kept for seed in range(len(searches))]
    failed = min((end for _, end in found.values() if end is not None), default=None)
    known = [number for number in kept if number is not None]
    number, results = None, []
    for lower in range(min(known), min(known) - _MOST_RETREATS, -1) if len(known) == len(kept) else ():
        num_runs += len(case.points)
        results = yield [scale.at(point, lower) for point in case.points]
        for seed, result in enumerate(results):
            ran.setdefault(lower, {})[seed] = result
            missed[seed, lower] = objective.missed(result["summary"])
        if not any(missed[seed, lower] for seed in range(len(results))):
            number = lower
            break
        failed = lower
    if number is None:
        results = []
    reasons = dict.fromkeys(what for (_, at), words in missed.items() if at == failed for what in words)
    return Capacity(
        case,
        scale.sought,
        None if number is None else scale.value(number),
        None if failed is None else scale.value(failed),
        list(reasons),
        [None if one is None else scale.value(one) for one in kept],
        results,
        num_runs,
        {value: of for value, of in sorted((scale.value(at), list(by.values())) for at, by in ran.items())},
        has_floor=has_floor,
    )


def with_intervals(
    capacities: Sequence[Capacity], store: Store, workers: Workers, *, advance: Callable[[], None] | None = None
) -> list[Capacity]:
    """The capacities with the limits of each metric at their values, see `sim.intervals`.

    There are none where no value was found, or where it is not known how far off a latency may be.

    Args:
        advance: called as each point is finished.

    Raises:
        InputError: a point cannot be computed.
    """
    drawn = [capacity.point.draws() if capacity.value is not None else [] for capacity in capacities]
    results = iter(run_points(chain(*drawn), store, workers, advance=advance))
    summaries = [[result["summary"] for result in islice(results, len(points))] for points in drawn]
    return [
        replace(capacity, intervals=intervals(of_case)) if of_case else capacity
        for capacity, of_case in zip(capacities, summaries, strict=True)
    ]


def rows_of(plan: Plan, capacities: list[Capacity]) -> list[Result]:
    """A row a case, in the order of the plan; with a price, `cost` is that of a million tokens at the capacity."""
    rows = []
    for capacity in capacities:
        first = capacity.case.points[0]
        row: Result = {
            "varied": capacity.case.varied,
            "point": first.flat(),
            "seeds": [point.seed for point in capacity.case.points],
            "objective": str(plan.objective),
            "sought": capacity.sought,
            "value": capacity.value,
            "failed": capacity.failed,
            "missed": capacity.missed,
            "by_seed": capacity.by_seed,
            "mean": capacity.mean,
            "interval": capacity.interval,
            "intervals": capacity.intervals,
            "num_runs": capacity.num_runs,
            "has_floor": capacity.has_floor,
            "results": [{name: value for name, value in r.items() if name != "inputs"} for r in capacity.results],
        }
        if plan.prices is not None and capacity.value is not None:
            row["cost"] = cost_of(capacity.results, plan.prices.per_hour(capacity.point.gpus()))
        rows.append(row)
    return rows
