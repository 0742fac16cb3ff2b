"""The commands about another vLLM, or other flags of it: what an upgrade does to a trace, and which flags suit it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from twinserve.commands.options import VLLM_ARGS_HELP, Json, options_of, settings_of_vllm
from twinserve.commands.progress import Bar, say
from twinserve.commands.sweeps import Jobs, say_likes
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.worlds.workload import PointOptions, TraceOptions

Trace = Annotated[str, typer.Argument(help="A trace in any of the formats of docs/traces.md.")]
Plan = Annotated[Path | None, typer.Option(help="A TOML file, see docs/capacity.md; options override it.")]
Seeds = Annotated[int | None, typer.Option(help="How many, where the arrivals are random.", min=1)]
VllmArgs = Annotated[str | None, typer.Option(help=VLLM_ARGS_HELP)]


@options_of(TraceOptions, "trace_options")
@options_of(Settings, "settings", but=("vllm_version",))
@options_of(PointOptions, "point")
def upgrade(
    trace: Trace,
    point: dict,
    trace_options: dict,
    settings: dict,
    before: Annotated[str, typer.Option("--from", help="The version that serves now.")] = "0.24",
    after: Annotated[str, typer.Option("--to", help="The version to come.")] = "0.33",
    seeds: Seeds = None,
    vllm_args: VllmArgs = None,
    jobs: Jobs = None,
    as_json: Json = False,
) -> None:
    """Simulate a trace under two versions of vLLM and under each change alone, and say what moves by how much."""
    from twinserve.planning.parallel import Workers
    from twinserve.planning.upgrade import find_changes, version_of

    values = _values(trace, point, trace_options, settings_of_vllm(vllm_args) | settings, seeds)
    versions = version_of(before, "from"), version_of(after, "to")
    with Workers(jobs) as workers, Bar("upgrade", None) as bar:
        changes = find_changes(values, *versions, workers, advance=bar.advance)
    if as_json:
        for change in changes:
            print(json.dumps(asdict(change)))
        return
    from twinserve.commands.tables import change_table

    change_table(changes)
    if not any(change.moved for change in changes):
        say(f"nothing moves: vLLM {after} serves this trace as {before} does, by every metric")


@options_of(TraceOptions, "trace_options")
@options_of(Settings, "settings")
@options_of(PointOptions, "point")
def tune(
    trace: Trace,
    point: dict,
    trace_options: dict,
    settings: dict,
    objective: Annotated[str, typer.Option(help="Such as 'p99 TTFT <= 1 s and p99 TPOT <= 50 ms'.")],
    seeds: Seeds = None,
    vllm_args: VllmArgs = None,
    jobs: Jobs = None,
    as_json: Json = False,
) -> None:
    """Search the flags of vllm serve that suit an objective best, at the load of the trace or at --rate."""
    from twinserve.planning.objectives import Objective
    from twinserve.planning.parallel import Workers
    from twinserve.planning.sweep import load_plan
    from twinserve.planning.tune import tune as search

    values = _values(trace, point, trace_options, settings_of_vllm(vllm_args) | settings, seeds)
    points, aim = load_plan(None, values | {"objective": objective}).points, Objective.parse(objective)
    if any(option.like is None and option.latency is None for option in points):
        raise InputError("is missing, expected a latency of the machine that vLLM serves on", field="latency")
    say_likes(points[:1])
    with Workers(jobs) as workers, Bar("tune", None) as bar:
        found = search(points, aim, workers, advance=bar.advance)
    if as_json:
        print(json.dumps(asdict(found) | {"flags": found.flags, "helps": found.helps}))
        return
    limits = "one seed, so no interval" if found.interval is None else "95%: {:.1%} to {:.1%}".format(*found.interval)
    shares = f"the worst of '{aim}' is {found.after:.1%} of its limit, before {found.before:.1%}"
    if found.helps:
        print(f"{found.flags}\n{shares}: {found.gain:.1%} less ({limits}); {found.num_runs} simulations")
    else:
        what = (
            f"the best found, {found.flags}, gains {found.gain:.1%} ({limits})"
            if found.changed
            else "all else is worse"
        )
        print(f"none helps: {what}; {found.num_runs} simulations")


def _values(trace: str, point: dict, trace_options: dict, settings: dict, seeds: int | None) -> dict[str, Any]:
    """The fields of a plan, as the command line has them."""
    given = {"trace": trace, "seeds": seeds} | point | settings | trace_options
    return {name: value for name, value in given.items() if value is not None}
