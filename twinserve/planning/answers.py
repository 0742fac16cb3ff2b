"""A capacity in sentences: what was found, what binds, how far from its limits, and on what assumptions it stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from twinserve.planning.attainment import words_of
from twinserve.planning.capacity import Capacity, find_capacities
from twinserve.planning.objectives import Objective, Term
from twinserve.planning.parallel import Workers
from twinserve.planning.sweep import Plan, Store
from twinserve.sim.intervals import COVERAGE
from twinserve.worlds.verdict import load_of


def each_limit_alone(
    plan: Plan,
    capacity: Capacity,
    store: Store,
    workers: Workers,
    *,
    tolerance: float,
    advance: Callable[[], None] | None = None,
) -> dict[str, Capacity]:
    """What the case of a capacity could do if each limit of its objective were the only one, by the limit in words.

    Empty where there is one limit alone, which needs no second search.

    Raises:
        InputError: a point cannot be computed.
    """
    assert plan.objective is not None
    terms = plan.objective.terms
    found = {}
    for term in terms if len(terms) > 1 else ():
        alone = replace(plan, cases=[capacity.case], objective=Objective((term,)))
        (found[str(term)],) = find_capacities(
            alone, capacity.sought, store, workers, tolerance=tolerance, advance=advance
        )
    return found


def sentences_of(plan: Plan, capacity: Capacity, alone: dict[str, Capacity]) -> list[str]:
    """What was found, in sentences; `alone` is what `each_limit_alone` found."""
    lines = [_found(plan, capacity)]
    if capacity.value is not None:
        lines += _margins(plan, capacity)
        lines.append(f"Simulated {load_of(capacity.point.workload())}.")
    if alone:
        values = (f"{_amount(one)} by {limit}" for limit, one in alone.items())
        lines.append(f"Each limit alone: {', '.join(values)}.")
    lines.append(_assumed(capacity))
    return lines


def deployment_of(plan: Plan, capacity: Capacity) -> str:
    """What a deployment is, what binds it, and on what it stands, in a sentence or two.

    Nobody knows how far off a roofline is; of a fitted latency it is said within which limits its metrics lie.
    """
    parts = [_found(plan, capacity), *_margins(plan, capacity)]
    if limits := {term: capacity.intervals[term.metric] for term in _terms(plan) if term.metric in capacity.intervals}:
        words = (f"{term.name} {words_of(float(f'{low:.3g}'))} to {words_of(float(f'{high:.3g}'))}"
                 for term, (low, high) in limits.items())  # fmt: skip
        parts.append(f"{COVERAGE:.0%} limits: {', '.join(words)}.")
    else:
        parts.append("No limits are known for a latency that is not fitted.")
    return " ".join([*parts, _assumed(capacity)])


def _terms(plan: Plan) -> tuple[Term, ...]:
    return plan.objective.terms if plan.objective is not None else ()


def _amount(capacity: Capacity) -> str:
    if capacity.value is None:
        return "nothing"
    if capacity.sought == "rate":
        return f"{capacity.value:,.0f} requests/s" if capacity.value >= 1000 else f"{capacity.value:.4g} requests/s"
    if capacity.sought == "decode_replicas":
        return f"{capacity.case.points[0].fleet.prefill_replicas:,} prefill and {capacity.value:,} decode replicas"
    return f"{capacity.value:,} replica{'s' if capacity.value > 1 else ''}"


def _found(plan: Plan, capacity: Capacity) -> str:
    missed = "; ".join(capacity.missed)
    if capacity.value is None:
        if capacity.has_floor:
            return f"No number of replicas keeps {plan.objective}: {missed} is missed as far with more of them."
        return f"Nothing that was tried keeps {plan.objective}; what is missed: {missed or 'another limit a seed'}."
    num_replicas = len(capacity.point.replicas())
    served_by = f" on {num_replicas} replica{'s' if num_replicas > 1 else ''}" if capacity.sought == "rate" else ""
    verb = "keeps" if capacity.sought == "replicas" and capacity.value == 1 else "keep"
    text = f"{_amount(capacity)}{served_by} {verb} {plan.objective}"
    if capacity.failed is None:
        return f"{text}."
    return f"{text}; {_amount(replace(capacity, value=capacity.failed))} would miss {missed}."


def _margins(plan: Plan, capacity: Capacity) -> list[str]:
    """How much of each limit is used, by the worst of the seeds, and which binds."""
    objective = plan.objective
    assert objective is not None
    if objective.limits is not None:
        least = min(result["summary"]["attainment"]["share"] for result in capacity.results)
        return [f"{least:.2%} of requests keep {objective.limits}."]
    used = {}
    for term in objective.terms:
        used[term] = max(float(term.value(result["summary"]) or 0.0) for result in capacity.results)
    shares = {term: worst / term.limit_s for term, worst in used.items()}
    words = (f"{term.name} {words_of(float(f'{worst:.3g}'))} ({shares[term]:.0%})" for term, worst in used.items())
    return [f"Of the limits is used: {', '.join(words)}; {max(used, key=shares.__getitem__).name} binds."]


def _assumed(capacity: Capacity) -> str:
    point = capacity.case.points[0]
    spec = point.replicas()[0]
    settings = spec.settings
    pool = "a pool without end" if settings.num_gpu_blocks is None else f"{settings.num_gpu_blocks:,} KV blocks"
    ahead = "decided a step ahead" if settings.pipeline_depth else "decided step by step"
    ahead += f", KV over {point.fleet.ports}" if point.fleet.prefill_replicas else ""
    return (
        f"Assumed: {spec.latency_words}; {settings.max_num_seqs:,} sequences, "
        f"{settings.max_num_batched_tokens:,} tokens a step, {pool}, {ahead}, vLLM {settings.vllm_version}'s rules; "
        f"{len(capacity.case.points)} seed{'s' if len(capacity.case.points) > 1 else ''}."
    )
