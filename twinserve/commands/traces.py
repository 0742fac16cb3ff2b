"""The commands that look at traces, make them, change their format and bring public ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from twinserve.commands.options import Force, Json, TraceFile, options_of
from twinserve.commands.progress import say
from twinserve.settings.errors import InputError
from twinserve.settings.files import in_place_of
from twinserve.settings.limits import plain
from twinserve.worlds.workload import TraceOptions

LENGTHS_HELP = "fixed:N, lognormal:MEAN:CV, or empirical:FILE, the lengths of a trace."


@options_of(TraceOptions, "trace_options")
def trace_stat(trace: TraceFile, trace_options: dict, as_json: Json = False) -> None:
    """Lengths, rates, burstiness, reuse, and what was handled."""
    from twinserve.commands.tables import trace_table
    from twinserve.traces.statistics import trace_statistics
    from twinserve.worlds.workload import load_workload

    workload = load_workload(trace, trace_options, is_replayed=False)
    statistics = trace_statistics(workload.requests) | {"trace": workload.facts}
    if as_json:
        print(json.dumps(statistics))
    else:
        trace_table(statistics)


@options_of(TraceOptions, "trace_options")
def trace_convert(
    trace: TraceFile,
    out: Annotated[Path, typer.Argument(help="The trace to write, packed if it ends in .gz; must not exist.")],
    trace_options: dict,
    format: Annotated[
        Literal["ours", "mooncake", "azure"], typer.Option(help="The format to write; each holds all of any trace.")
    ] = "ours",
    force: Force = False,
) -> None:
    """Write a trace, or a changed part of it, in our own format, Mooncake's or Azure's."""
    from twinserve.traces.formats.reading import with_own_private_prompts
    from twinserve.traces.readers import write_trace
    from twinserve.worlds.workload import load_workload

    with in_place_of(out, force) as place:
        workload = load_workload(trace, trace_options, is_replayed=False)
        beside = write_trace(
            place,
            with_own_private_prompts(workload.requests) if workload.facts["transforms"] else workload.requests,
            {"made_from": workload.facts},
            format="twinserve" if format == "ours" else format,
            epoch_ns=workload.epoch_ns,
        )
    say(f"{out}: {len(workload.requests)} requests")
    if beside:
        counts = ", ".join(f"{name} of {count}" for name, count in beside.items())
        say(f"in the field twinserve, as {format}'s own cannot hold it: {counts}")


def trace_fetch(
    name: Annotated[str, typer.Argument(help="mooncake-conversation or azure-2023-conv.")],
    mirror: Annotated[str | None, typer.Option(help="URL of a folder that has the file, in place of GitHub.")] = None,
) -> None:
    """Bring a public trace into the cache, check its sha256, and say where it lies."""
    from twinserve.traces.fetch import PUBLIC_TRACES, fetch

    path = fetch(name, mirror)
    say(f"{name}: {PUBLIC_TRACES[name].credit}")
    print(path)


def trace_make(
    out: Annotated[Path, typer.Option("--out", help="The trace file to write; must not exist.")],
    requests: Annotated[int, typer.Option(help="How many, all turns counted.")] = 100,
    rate: Annotated[float, typer.Option(help="Requests a second in the long run.")] = 1.0,
    arrivals: Annotated[str, typer.Option(help="poisson, gamma, burst, mmpp or diurnal.")] = "poisson",
    cv: Annotated[float, typer.Option(help="Coefficient of variation of the gaps, for gamma.")] = 1.0,
    burst_size: Annotated[int, typer.Option(help="Conversations that arrive at one instant, for burst.")] = 1,
    peak: Annotated[float, typer.Option(help="Highest rate over the mean, for mmpp and diurnal.")] = 2.0,
    period_s: Annotated[float, typer.Option(help="From one peak to the next; of mmpp in the mean.")] = 86_400.0,
    users: Annotated[
        int, typer.Option(help="A closed loop of so many, each waiting for its answers, in place of rate and arrivals.")
    ] = 0,
    priority_shares: Annotated[
        str | None, typer.Option(help="Shares of conversations with priority 0, 1, ..., such as 0.2,0.8.")
    ] = None,
    prompt_tokens: Annotated[str, typer.Option(help=f"Text of a turn: {LENGTHS_HELP}")] = "lognormal:200:1",
    output_tokens: Annotated[str, typer.Option(help=f"Answer: {LENGTHS_HELP}")] = "lognormal:60:0.7",
    system_prompts: Annotated[int, typer.Option(help="Shared system prompts, one a conversation.")] = 0,
    system_prompt_tokens: Annotated[int, typer.Option(help="Length of each.")] = 0,
    turns: Annotated[int, typer.Option(help="Requests in a conversation.")] = 1,
    think_time_s: Annotated[float, typer.Option(help="Mean time from an answer to the next turn.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    force: Force = False,
) -> None:
    """Make a synthetic trace."""
    from twinserve.traces.generator import EmpiricalLengths, generate, parse_lengths
    from twinserve.traces.readers import write_trace

    with in_place_of(out, force) as place:
        options: dict = {
            "seed": seed,
            "num_requests": requests,
            "rate": rate,
            "arrivals": arrivals,
            "cv": cv,
            "burst_size": burst_size,
            "num_system_prompts": system_prompts,
            "system_prompt_tokens": system_prompt_tokens,
            "turns": turns,
            "think_time_s": think_time_s,
        }
        more = {"peak": peak, "period_s": period_s, "users": users, "priority_shares": _numbers(priority_shares)}
        lengths = {
            "prompt_tokens": parse_lengths(prompt_tokens, "prompt_tokens"),
            "output_tokens": parse_lengths(output_tokens, "output_tokens"),
        }
        made = generate(**lengths, **options, **more)  # type: ignore[arg-type]
        # What was not made use of is not said.
        is_periodic = arrivals in ("mmpp", "diurnal")
        used = {"peak": is_periodic, "period_s": is_periodic, "users": users > 0, "priority_shares": priority_shares}
        options |= {name: value for name, value in more.items() if used[name]}
        header: dict = {"made_by": options | {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens}}
        drawn = {name: spec.sha256 for name, spec in lengths.items() if isinstance(spec, EmpiricalLengths)}
        if drawn:
            header["sha256_of_lengths"] = drawn
        write_trace(place, made, header)
    say(f"{out}: {len(made)} requests over {made[-1].arrival_ns / 1e9:.1f} s")


def _numbers(text: str | None) -> list[float]:
    """The numbers of a list with commas.

    Raises:
        InputError: one is none.
    """
    try:
        return [float(plain(part)) for part in text.split(",")] if text else []
    except ValueError as error:
        raise InputError("expected numbers such as 0.2,0.8", field="priority_shares", value=text) from error
