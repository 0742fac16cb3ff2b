"""Which GPUs, how many together and how many replicas of them, for prefill and decode together or apart, keep an
objective for a workload, the cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from twinserve.planning.capacity import Capacity, find_capacities
from twinserve.planning.capacity import rows_of as capacity_rows
from twinserve.planning.parallel import Workers
from twinserve.planning.point import Result
from twinserve.planning.prices import Prices
from twinserve.planning.sweep import Case, Plan, Store, load_plan
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.settings.limits import plain
from twinserve.sim.roofline import RooflineLatency
from twinserve.sim.splits import Split

MOST_GPUS = 128
"""Of a deployment, unless another number is given."""
SPLITS = ("tp=1", "tp=2", "tp=4", "tp=8")
"""How devices share the model, in what is tried."""


@dataclass(frozen=True)
class Deployment:
    """The fewest replicas of one kind that keep an objective.

    Attributes:
        capacity: its `value` is the number of replicas, or of those for decode; `missed` is what one fewer misses.
        gpus: how many of each kind that takes.
        price_per_hour: of all of them.
    """

    capacity: Capacity
    gpus: dict[str, int]
    price_per_hour: float

    @property
    def num_replicas(self) -> int:
        """All of them."""
        return self.capacity.point.fleet.num_replicas

    @property
    def num_prefill(self) -> int:
        """Those that compute prompts and first tokens alone; 0: all do both."""
        return self.capacity.point.fleet.prefill_replicas


def candidates(
    model: str,
    devices: Sequence[str],
    options: str = "",
    splits: Sequence[str] = SPLITS,
    most_gpus: int = MOST_GPUS,
) -> tuple[list[str], list[str]]:
    """The latencies of a model on devices, alone and together, and in words why others are left out.

    Args:
        options: of each latency, behind the device, such as ":quantization=fp8".
        splits: how devices share the model, each as it stands behind the device: "tp=8:pp=2".
        most_gpus: of a replica.

    Raises:
        InputError: the model, a device, an option or a split is not known, or nothing is left.
    """
    latencies, left_out = [], []
    try:
        shared = {text: Split.parse(text) for text in splits}
    except ValueError as error:
        raise InputError(str(error), field="splits", value=",".join(splits)) from error
    for device in devices:
        alone = RooflineLatency.parse(f"{model}@{device}{options}")
        for text, split in shared.items():
            try:
                if (count := split.num_devices * split.data) > most_gpus:
                    raise ValueError(f"{count} GPUs a replica, expected at most {most_gpus}")
                RooflineLatency(alone.shape, alone.device, split=split).num_blocks(16)
            except ValueError as error:
                left_out.append(f"{device}, {text}: {error}")
            else:
                latencies.append(f"roofline:{model}@{device}{options}:{text}")
    if not latencies:
        raise InputError(f"fits nowhere: {'; '.join(left_out)}", field="model", value=model)
    return latencies, left_out


def parse_choices(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Values to choose from by setting, from texts such as "max_num_batched_tokens=2048,8192".

    Raises:
        InputError: a text has another form, or names no setting, or one twice.
    """
    choices: dict[str, list[Any]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if name not in Settings.model_fields or name in choices or not values:
            problem = "expected each setting once at most, such as max_num_batched_tokens=2048,8192"
            raise InputError(problem, field="try", value=text)
        choices[name] = [_value_of(word.strip()) for word in values.split(",")]
    return choices


def _value_of(word: str) -> Any:
    if word in ("true", "false"):
        return word == "true"
    try:
        return int(plain(word))
    except ValueError:
        return word


def plan_of(
    latencies: Sequence[str], values: dict[str, Any], choices: Mapping[str, Sequence[Any]] | None = None
) -> Plan:
    """A plan with a case a latency and a combination of the values to choose from.

    Args:
        values: the fields that all cases share; with `objective` and `price_per_gpu_hour`.
        choices: values by setting.

    Raises:
        InputError: a value cannot be used, or a kind of GPU has no price.
    """
    grid = {"grid": {name: list(of) for name, of in choices.items()}} if choices else {}
    plan = load_plan(None, values | grid | {"list": [{"latency": latency} for latency in latencies]})
    for case in plan.cases:
        _prices(plan).per_hour(case.points[0].gpus())
    return plan


def find_deployments(
    plan: Plan,
    store: Store,
    workers: Workers,
    *,
    most_gpus: int = MOST_GPUS,
    advance: Callable[[], None] | None = None,
) -> list[Deployment]:
    """The deployments of every case that has one, the cheapest an hour first, of equal ones that of fewer GPUs, and of
    those the one that uses less of what binds: with replicas that do both, and with prefill and decode apart, where
    that takes no more of them.

    Args:
        most_gpus: of a deployment; what needs more is not found.
        advance: called as each point is finished.

    Raises:
        InputError: the plan has no objective or no price, or a point cannot be computed.
    """
    prices = _prices(plan)
    found = []
    together = find_capacities(plan, "replicas", store, workers, most_gpus=most_gpus, advance=advance)
    limits = [_most_apart(capacity, most_gpus) for capacity in together]
    for capacity in (*together, *_find_apart(plan, limits, store, workers, advance)):
        if capacity.value is not None:
            gpus = capacity.point.gpus()
            found.append(Deployment(capacity, gpus, prices.per_hour(gpus)))
    return sorted(found, key=lambda one: (one.price_per_hour, sum(one.gpus.values()), _load_of(plan, one)))


def _most_apart(together: Capacity, most_gpus: int) -> int:
    """How many replicas prefill and decode may take apart: as many as together, or, where no number keeps, as many as
    there may be; 0 where they cannot be apart."""
    point = together.case.points[0]
    try:
        point.with_fleet({"prefill_replicas": 1, "decode_replicas": 1}).replicas()
    except InputError:
        return 0
    if together.value is not None:
        return int(together.value)
    return most_gpus // sum(point.with_sought("replicas", 1).gpus().values())


def fewest_apart(most: int) -> Generator[int, int | None, int | None]:
    """Search the number of replicas for prefill with which the fewest replicas keep in all.

    Yields a number and is sent how many for decode it needs beside it, which are fewer than `most`, or None. It doubles
    while there are none, and goes up from behind the largest such number then: as long as each one more saves one for
    decode, and fewer in all could be found.

    Args:
        most: of both together.
    """
    failed, number = 0, 1
    while (decode := (yield number)) is None:
        failed, number = number, min(2 * number, most - 1)
        if number == failed:
            return None
    best, fewest, before = None, most + 1, most
    for prefill in range(failed + 1, most):
        if prefill + 1 >= fewest:
            break
        needed = decode if prefill == number else (yield prefill)
        if needed is None:
            continue
        if prefill + needed < fewest:
            best, fewest = prefill, prefill + needed
        if needed >= before:
            break
        before = needed
    return best


def _find_apart(
    plan: Plan, limits: Sequence[int], store: Store, workers: Workers, advance: Callable[[], None] | None
) -> list[Capacity]:
    """Of every case, the fewest replicas with prefill and decode apart that keep the objective, no more than its limit;
    those of cases that have none are left out. All searches go on side by side."""
    searches = {place: fewest_apart(limit) for place, limit in enumerate(limits) if limit > 1}
    wanted = {place: next(search) for place, search in searches.items()}
    latest = dict.fromkeys(wanted, 1)
    tried: dict[tuple[int, int], Capacity] = {}
    best: dict[int, Capacity] = {}
    while wanted:
        cases, most_gpus = [], []
        for place, prefill in wanted.items():
            cases.append(_apart(plan.cases[place], prefill, latest[place]))
            alone = plan.cases[place].points[0].with_sought("replicas", 1)
            most_gpus.append((prefill + limits[place] - 1) * sum(alone.gpus().values()))
        found = find_capacities(
            replace(plan, cases=cases), "decode_replicas", store, workers, most_gpus=most_gpus, advance=advance
        )
        for place, capacity in zip(list(wanted), found, strict=True):
            tried[place, wanted[place]] = capacity
            needed = None if capacity.value is None else int(capacity.value)
            latest[place] = needed or 1
            try:
                wanted[place] = searches[place].send(needed)
            except StopIteration as end:
                del wanted[place]
                if end.value is not None:
                    best[place] = tried[place, end.value]
    return [best[place] for place in sorted(best)]


def _apart(case: Case, prefill: int, decode: int) -> Case:
    """A case with so many replicas for prefill, and so many for decode to begin with."""
    options = {"prefill_replicas": prefill, "decode_replicas": decode}
    return Case(case.varied | {"prefill_replicas": prefill}, [point.with_fleet(options) for point in case.points])


def best_of_each(deployments: Sequence[Deployment]) -> list[Deployment]:
    """Of each kind of replica, with prefill and decode together and apart, the first, in their order: other settings of
    it are no other deployment."""
    best: dict[Any, Deployment] = {}
    for deployment in deployments:
        is_apart = deployment.num_prefill > 0
        best.setdefault((deployment.capacity.case.varied["latency"], is_apart), deployment)
    return list(best.values())


def _load_of(plan: Plan, deployment: Deployment) -> float:
    assert plan.objective is not None
    return max(plan.objective.load_of(result["summary"]) for result in deployment.capacity.results)


def rows_of(plan: Plan, deployments: Sequence[Deployment]) -> list[Result]:
    """A row a deployment, in their order: that of a capacity, with `gpus` and `price_per_hour`."""
    rows = capacity_rows(plan, [deployment.capacity for deployment in deployments])
    return [
        row | {"gpus": deployment.gpus, "price_per_hour": deployment.price_per_hour}
        for row, deployment in zip(rows, deployments, strict=True)
    ]


def _prices(plan: Plan) -> Prices:
    if plan.prices is None:
        raise InputError("is missing, expected a number, or one by kind of GPU: h100=2.5,l4=0.8", field="price")
    return plan.prices
