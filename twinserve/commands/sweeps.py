"""The commands that ask many simulations: a sweep, and the search for a capacity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from twinserve.commands.options import VLLM_ARGS_HELP, Json, options_of, settings_of_vllm
from twinserve.commands.progress import Bar, say
from twinserve.planning.fleets import FleetOptions
from twinserve.settings.build_core import Settings
from twinserve.settings.files import write_whole
from twinserve.settings.limits import MOST_JOBS
from twinserve.worlds.workload import ClientOptions, PointOptions, TraceOptions

if TYPE_CHECKING:
    from twinserve.planning.point import Point

Jobs = Annotated[
    int | None,
    typer.Option(help="Processes; one a core unless given. Results do not depend on it.", min=1, max=MOST_JOBS),
]
Ray = Annotated[str | None, typer.Option(help="HOST:PORT of a Ray cluster that computes in place of this machine.")]


_FOUND_BY_A_PLAN = (
    "group",
    "replicas",
    "prefill_replicas",
    "decode_replicas",
    "die",
    "failover_s",
    "restart",
    "slow",
)
"""Of a fleet, what a plan finds, and what there is none of in it."""


def sweep(
    plan: Annotated[Path, typer.Argument(help="A TOML file, see docs/capacity.md.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of results; that of an earlier sweep is gone on with.")],
    trace: Annotated[str | None, typer.Argument(help="A trace, unless the plan has one.")] = None,
    jobs: Jobs = None,
    ray: Ray = None,
    as_json: Json = False,
) -> None:
    """Simulate every combination of settings, traces, latencies and rates that a file asks for."""
    from twinserve.commands.sweep_views import page_of, remarks_of, sweep_cases
    from twinserve.planning.parallel import Workers
    from twinserve.planning.sweep import lines_of, load_plan, num_missing, opened, rows_of, run_points

    chosen = load_plan(plan, {} if trace is None else {"trace": trace})
    say_likes(chosen.points)
    with opened(out) as store, Workers(jobs, ray) as workers:
        missing = num_missing(chosen.points, store)
        say(f"{len(chosen.points)} points, {missing} to compute")
        with Bar("sweep", missing) as bar:
            results = run_points(chosen.points, store, workers, advance=bar.advance)
        lines, cases = lines_of(rows_of(chosen, results)), sweep_cases(chosen, results)
        remarks = remarks_of(chosen, results)
        write_whole(out / "results.jsonl", lines, replaces=True)
        write_whole(out / "page.html", page_of(f"Sweep of {plan.name}", remarks, chosen, cases), replaces=True)
    _show(lines, cases, remarks, out, as_json)


@options_of(TraceOptions, "trace_options")
@options_of(Settings, "settings")
@options_of(FleetOptions, "fleet", but=("group",))
@options_of(ClientOptions, "clients")
@options_of(PointOptions, "point")
def capacity(
    point: dict,
    clients: dict,
    trace_options: dict,
    settings: dict,
    fleet: dict,
    trace: Annotated[str | None, typer.Argument(help="A trace, unless the plan has one.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A TOML file, see docs/capacity.md; options override it.")] = None,
    find: Annotated[
        Literal["rate", "replicas"], typer.Option(help="The highest rate, or the fewest replicas.")
    ] = "rate",
    objective: Annotated[str | None, typer.Option(help="Such as 'p99 TTFT <= 1 s and p99 TPOT <= 50 ms'.")] = None,
    tolerance: Annotated[float, typer.Option(help="Share of itself to which a rate is found.")] = 0.02,
    seeds: Annotated[int | None, typer.Option(help="How many, each a search of its own.")] = None,
    price: Annotated[str | None, typer.Option(help="Of a GPU-hour, in any currency; by kind: h100=2.5,l4=0.8.")] = None,
    vllm_args: Annotated[str | None, typer.Option(help=VLLM_ARGS_HELP)] = None,
    jobs: Jobs = None,
    ray: Ray = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of results; that of an earlier one is gone on with.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the highest rate, or the fewest replicas, that keeps an objective, and what a million tokens cost then."""
    from twinserve.commands.sweep_views import capacity_cases, page_of, remarks_of
    from twinserve.planning.answers import each_limit_alone, sentences_of
    from twinserve.planning.capacity import find_capacities, rows_of, with_intervals
    from twinserve.planning.parallel import Workers
    from twinserve.planning.sweep import lines_of, load_plan, opened

    given = {"trace": trace, "objective": objective, "seeds": seeds, "price_per_gpu_hour": price}
    given |= point | settings_of_vllm(vllm_args) | settings | trace_options | fleet | clients
    chosen = load_plan(plan, {name: value for name, value in given.items() if value is not None})
    say_likes(chosen.points)
    with opened(out) as store, Workers(jobs, ray) as workers, Bar("capacity", None) as bar:
        capacities = find_capacities(chosen, find, store, workers, tolerance=tolerance, advance=bar.advance)
        capacities = with_intervals(capacities, store, workers, advance=bar.advance)
        lines, cases = lines_of(rows_of(chosen, capacities)), capacity_cases(chosen, capacities)
        remarks = remarks_of(chosen, [result for capacity in capacities for result in capacity.results])
        if len(capacities) == 1:
            (found,) = capacities
            alone = each_limit_alone(chosen, found, store, workers, tolerance=tolerance, advance=bar.advance)
            remarks = [*sentences_of(chosen, found, alone), *remarks]
        if out is not None:
            write_whole(out / "results.jsonl", lines, replaces=True)
            write_whole(out / "page.html", page_of("Capacity", remarks, chosen, cases), replaces=True)
    _show(lines, cases, remarks, out, as_json)


@options_of(TraceOptions, "trace_options")
@options_of(Settings, "settings")
@options_of(FleetOptions, "fleet", but=_FOUND_BY_A_PLAN)
@options_of(PointOptions, "point", but=("latency", "limits"))
def plan(
    point: dict,
    trace_options: dict,
    settings: dict,
    fleet: dict,
    trace: Annotated[str, typer.Argument(help="A trace file or folder.")],
    model: Annotated[str, typer.Option(help="A shape that ships, a config.json or its folder.")],
    devices: Annotated[str, typer.Option(help="Kinds of GPU to choose from, such as h100,l40s, or TOML files.")],
    price: Annotated[str, typer.Option(help="Of a GPU-hour, in any currency; by kind: h100=2.5,l40s=1.1.")],
    objective: Annotated[str, typer.Option(help="Such as 'p99 TTFT <= 1 s and p99 TPOT <= 50 ms'.")],
    quantization: Annotated[
        str | None, typer.Option(help="Of the weights: fp8; as the model has it unless given.")
    ] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="Of the KV cache: fp8; 16 bits unless given.")] = None,
    splits: Annotated[
        str | None,
        typer.Option(help="How GPUs may share the model, such as tp=1,tp=8:pp=2; unless given, tp of 1, 2, 4 and 8."),
    ] = None,
    most_gpus: Annotated[
        int | None, typer.Option(min=1, help="Of a deployment: what needs more is not looked for; 128 unless given.")
    ] = None,
    choices: Annotated[
        list[str] | None,
        typer.Option("--try", help="A setting to choose: max_num_batched_tokens=2048,8192; may be given again."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="How many, each a search of its own.")] = None,
    jobs: Jobs = None,
    ray: Ray = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of results; that of an earlier plan is gone on with.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the cheapest GPUs, how many share the model, and how many replicas, with prefill and decode together or
    apart, keep an objective for a trace."""
    from twinserve.commands.sweep_views import deployment_cases, page_of, remarks_of
    from twinserve.planning.answers import deployment_of
    from twinserve.planning.deployments import (
        MOST_GPUS,
        SPLITS,
        best_of_each,
        candidates,
        find_deployments,
        parse_choices,
        plan_of,
        rows_of,
    )
    from twinserve.planning.parallel import Workers
    from twinserve.planning.sweep import lines_of, opened

    options = {"quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
    text = "".join(f":{name}={value}" for name, value in options.items() if value is not None)
    shared = SPLITS if splits is None else _listed(splits)
    most = most_gpus or MOST_GPUS
    latencies, left_out = candidates(model, _listed(devices), text, shared, most)
    given = {"trace": trace, "objective": objective, "seeds": seeds, "price_per_gpu_hour": price}
    given |= point | settings | trace_options | fleet
    named = {name: value for name, value in given.items() if value is not None}
    chosen = plan_of(latencies, named, parse_choices(choices or []))
    for reason in left_out:
        say(f"left out: {reason}")
    say_likes(chosen.points)
    with opened(out) as store, Workers(jobs, ray) as workers, Bar("plan", None) as bar:
        found = find_deployments(chosen, store, workers, most_gpus=most, advance=bar.advance)
        lines, cases = lines_of(rows_of(chosen, found)), deployment_cases(chosen, found)
        remarks = remarks_of(chosen, [result for one in found for result in one.capacity.results])
        best = best_of_each(found)
        kinds = len({one.capacity.case.varied["latency"] for one in best})
        remarks.append(f"{kinds} of {len(latencies)} kinds of replica keep the objective with at most {most} GPUs.")
        for place, deployment in enumerate(best[:3], 1):
            remarks.append(f"{place}. {deployment_of(chosen, deployment.capacity)}")
        if out is not None:
            write_whole(out / "results.jsonl", lines, replaces=True)
            write_whole(out / "page.html", page_of("Plan", remarks, chosen, cases), replaces=True)
    _show(lines, deployment_cases(chosen, best[:3]), remarks, out, as_json)


def _listed(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def say_likes(points: list[Point]) -> None:
    """Say which vLLM's defaults hold where nothing is set."""
    from twinserve.worlds.vllm_like import like_of

    for like in dict.fromkeys(like_of(point.like, point.latency) for point in points):
        if like is not None:
            say(str(like))


def _show(lines: str, cases: list, remarks: list[str], out: Path | None, as_json: bool) -> None:
    """Print what was found: JSON lines, or a table."""
    for remark in remarks:
        say(remark)
    if as_json:
        print(lines, end="")
    else:
        from twinserve.commands.tables import case_table
        from twinserve.reports.sweep import case_columns

        case_table(*case_columns(cases))
    if out is not None:
        say(f"{out / 'results.jsonl'}, {out / 'page.html'}")
