"""Sweeps and capacities as a person sees them: the same cases in a table on the terminal and on a page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from twinserve.planning.capacity import Capacity
from twinserve.planning.deployments import Deployment
from twinserve.planning.objectives import Term, interval
from twinserve.planning.point import Result
from twinserve.planning.sweep import Plan, cost_of
from twinserve.reports.sweep import Axis, Estimate, PageCase, Tried, sweep_page
from twinserve.reports.text import number
from twinserve.sim.intervals import COVERAGE
from twinserve.sim.roofline import RooflineLatency

_USUAL = (Term("ttft_s.p99", 0.0), Term("tpot_s.p99", 0.0))
"""What is shown where no objective says which metrics count; its limits are not."""

COST, OUTPUT_COST, SPEED = "cost of 1M tokens", "cost of 1M output tokens", "output tokens/s"
GPU_SECONDS = "GPU seconds of 1M tokens"


def sweep_cases(plan: Plan, results: list[Result]) -> list[PageCase]:
    """A row a case of a sweep."""
    left = iter(results)
    cases = []
    for case in plan.cases:
        of_case = [next(left) for _ in case.points]
        values = _values(plan, of_case, case.points[0].gpus())
        if plan.objective is None:
            cases.append(PageCase(case.varied, values))
            continue
        missed = list(dict.fromkeys(what for r in of_case for what in plan.objective.missed(r["summary"])))
        words = {"misses": "; ".join(missed) or "nothing"}
        cases.append(PageCase(case.varied, values, not missed, words))
    return cases


def capacity_cases(plan: Plan, capacities: list[Capacity]) -> list[PageCase]:
    """A row a case whose capacity was sought."""
    cases = []
    for capacity in capacities:
        unit = "replicas" if capacity.sought == "replicas" else "rate, requests/s"
        values = {unit: Estimate(capacity.value), "mean over seeds": Estimate(capacity.mean, capacity.interval)}
        values["misses at"] = Estimate(capacity.failed)
        if capacity.value is not None:
            values |= _values(plan, capacity.results, capacity.point.gpus())
        words = {"what is missed there": "; ".join(capacity.missed) or "nothing"}
        for term in _terms(plan):
            if (limits := capacity.intervals.get(term.metric)) is not None:
                words[f"{COVERAGE:.0%} limits of {_column(term)}"] = " to ".join(
                    number(1e3 * limit) for limit in limits
                )
        tried = [
            Tried(value, _values(plan, results, {}), not any(plan.objective.missed(r["summary"]) for r in results))
            for value, results in capacity.tried.items()
            if plan.objective is not None
        ]
        cases.append(PageCase(capacity.case.varied, values, capacity.value is not None, words, tried, unit))
    return cases


def deployment_cases(plan: Plan, deployments: list[Deployment]) -> list[PageCase]:
    """A row a deployment."""
    cases = []
    for deployment in deployments:
        capacity, num_prefill = deployment.capacity, deployment.num_prefill
        num_decode = deployment.num_replicas - num_prefill
        together = {kind: count // deployment.num_replicas for kind, count in deployment.gpus.items()}
        latency = capacity.point.replicas()[0].latency
        shared = str(latency.split) if isinstance(latency, RooflineLatency) else ""
        words = " and ".join(f"{count} x {kind}" for kind, count in together.items())
        varied = {"a replica": f"{words} ({shared})" if shared else words}
        varied["P+D"] = f"{num_prefill}+{num_decode}" if num_prefill else "–"
        others = {"latency", "prefill_replicas"}
        varied |= {name: value for name, value in capacity.case.varied.items() if name not in others}
        values: dict[str, Estimate] = {
            "replicas": Estimate(deployment.num_replicas, None if num_prefill else capacity.interval),
            "price an hour": Estimate(deployment.price_per_hour),
        }
        values.update(_values(plan, capacity.results, deployment.gpus))
        missed = {"one fewer misses": "; ".join(capacity.missed) or "there are none fewer"}
        cases.append(PageCase(varied, values, True, missed))
    return cases


def page_of(title: str, remarks: Sequence[str], plan: Plan, cases: list[PageCase]) -> str:
    """The page: cost, where there is a price, or else time, against what the objective limits."""
    upwards = [Axis(_column(t), _column(t), 1e3 * t.limit_s or None) for t in _terms(plan)]
    cost = GPU_SECONDS if plan.prices is None else COST
    varied = {name for case in plan.cases for name in case.varied}
    shared = {name: value for name, value in plan.points[0].flat().items() if name not in (*varied, "seed")}
    return sweep_page(title, remarks, cases, shared, Axis(cost, cost), upwards)


def remarks_of(plan: Plan, results: list[Result]) -> list[str]:
    """What a reader of results should know, in sentences."""
    remarks = [f"Latency: {', '.join(dict.fromkeys(r['latency'] for r in results))}."] if results else []
    if plan.objective is not None:
        remarks.append(f"Objective: {plan.objective}.")
    if plan.prices is not None:
        remarks.append(f"Price: {plan.prices}.")
    beyond = [r["beyond_fit"] for r in results if "beyond_fit" in r]
    if beyond:
        remarks.append(f"{len(beyond)} runs leave what the latency was fitted on, by up to {max(beyond):.1f} times.")
    short = [r for r in results if (e2e := r["summary"]["e2e_s"]["p99"]) is not None and r["span_s"] < 10 * e2e]
    if short:
        remarks.append(
            f"In {len(short)} of {len(results)} runs arrivals last less than ten times the p99 end-to-end latency: a "
            "longer trace may keep less."
        )
    return remarks


def _terms(plan: Plan) -> tuple[Term, ...]:
    return plan.objective.terms if plan.objective is not None and plan.objective.terms else _USUAL


def _column(term: Term) -> str:
    return f"{term.name}, ms"


def _values(plan: Plan, results: list[Result], gpus: dict[str, int]) -> dict[str, Estimate]:
    values = {}
    for term in _terms(plan):
        found_s = [term.value(r["summary"]) for r in results]
        values[_column(term)] = _estimate([None if value is None else 1e3 * value for value in found_s])
    if all("attainment" in r["summary"] for r in results):
        found = [r["summary"]["attainment"] for r in results]
        values |= {"share that keeps the limits": _estimate([one["share"] for one in found])}
        values |= {"goodput, requests/s": _estimate([one["goodput_req_s"] for one in found])}
    values[SPEED] = _estimate([r["summary"]["output_tok_s"] for r in results])
    if plan.prices is None:
        seconds = cost_of(results, 3600.0 * sum(gpus.values()))
        values[GPU_SECONDS] = Estimate(seconds["total"])
    else:
        cost = cost_of(results, plan.prices.per_hour(gpus))
        values |= {COST: Estimate(cost["total"]), OUTPUT_COST: Estimate(cost["output"])}
    return values


def _estimate(values: list[Any]) -> Estimate:
    if None in values:
        return Estimate(None)
    return Estimate(statistics.fmean(values), interval(values))
