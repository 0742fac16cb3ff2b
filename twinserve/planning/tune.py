"""Settings of vLLM that suit a trace: searched one after another, and judged on seeds that the search has not seen."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from twinserve.planning.objectives import Objective, interval
from twinserve.planning.parallel import Workers
from twinserve.planning.point import Point
from twinserve.planning.sweep import Store, run_points
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError

KNOBS: dict[str, tuple[int, ...]] = {
    "max_num_batched_tokens": (512, 1024, 2048, 4096, 8192, 16384, 32768),
    "max_num_seqs": (16, 32, 64, 128, 256, 512, 1024),
    "long_prefill_token_threshold": (0, 256, 512, 1024, 2048),
    "prefill_schedule_interval": (1, 2, 4, 8),
}
"""What is searched, in this order, and the values that are tried beside the present one."""
_MOST_ROUNDS = 3


@dataclass(frozen=True)
class Tuning:
    """What a search has found.

    Attributes:
        changed: the knobs that are set otherwise, with their values.
        before, after: the worst of the objective's terms, as a share of its limit; the mean over the seeds of judging.
        gain: by what share that became less, the mean over the seeds; `interval` holds it with a confidence of 95%,
            None with one seed.
        num_runs: simulations, of search and judging.
    """

    changed: dict[str, int]
    before: float
    after: float
    gain: float
    interval: tuple[float, float] | None
    num_runs: int

    @property
    def helps(self) -> bool:
        """Is there a change whose gain is above 0, with the interval's confidence where there is one?"""
        return bool(self.changed) and (self.gain if self.interval is None else self.interval[0]) > 0

    @property
    def flags(self) -> str:
        """The changed knobs as flags of `vllm serve`."""
        return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in self.changed.items())


def tune(
    points: list[Point],
    objective: Objective,
    workers: Workers,
    *,
    store: Store | None = None,
    advance: Callable[[], None] | None = None,
) -> Tuning:
    """Search the settings under which the worst term of an objective is the smallest share of its limit.

    Each knob by itself takes the best of its values, with the others as they are by then, again until none changes. So
    a best that only two knobs together would show can be missed. What is found is compared with what was, on as many
    other seeds.

    Args:
        points: one a seed, alike otherwise; at the load for which to tune.

    Raises:
        InputError: a point cannot be computed, or a metric of the objective is not defined for these requests.
    """
    store = store or Store()
    num_runs = 0
    known: dict[tuple, list[float]] = {}

    def scores(settings: Settings, seeds: list[Point]) -> list[float]:
        nonlocal num_runs
        key = tuple(settings.model_dump().items()), seeds[0].seed
        if key not in known:
            run = [point.model_copy(update={"settings": settings}) for point in seeds]
            known[key] = [
                objective.load_of(result["summary"]) for result in run_points(run, store, workers, advance=advance)
            ]
            num_runs += len(run)
        return known[key]

    best = present = points[0].settings
    for _ in range(_MOST_ROUNDS):
        before = best
        for name, values in KNOBS.items():
            candidates = [best, *(found for value in values if (found := _with(best, name, value)) is not None)]
            best = min(candidates, key=lambda settings: statistics.fmean(scores(settings, points)))
        if best == before:
            break
    shift = len(points) if points[0].is_random() else 0
    others = [point.model_copy(update={"seed": point.seed + shift}) for point in points]
    was, now = scores(present, others), scores(best, others)
    gains = [0.0 if after == before else 1 - after / before for before, after in zip(was, now, strict=True)]
    changed = {name: getattr(best, name) for name in KNOBS if getattr(best, name) != getattr(present, name)}
    means = statistics.fmean(was), statistics.fmean(now), statistics.fmean(gains)
    return Tuning(changed, *means, interval(gains), num_runs)


def _with(settings: Settings, name: str, value: int) -> Settings | None:
    """The settings with another value of a knob; None where they would contradict one another."""
    changed: dict[str, Any] = settings.model_dump() | {name: value}
    try:
        return None if getattr(settings, name) == value else Settings.load(changed)
    except InputError:
        return None
