"""The commands that read run records: decide again, compare, draw, and bring those of another engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from twinserve.commands.options import Force, Json, Traces
from twinserve.commands.progress import Bar, Decisions, say
from twinserve.settings.errors import InputError
from twinserve.settings.files import in_place_of
from twinserve.settings.own_class import RULES

if TYPE_CHECKING:
    from twinserve.reports.asked import Asked


def replay(
    run: Annotated[Path, typer.Argument(help="A run record, or a vLLM step log.")],
    traces: Traces = None,
    as_json: Json = False,
) -> None:
    """Decide a recorded run again from its facts; exit status 1 at the first difference.

    Of a fleet, each replica's in turn.
    """
    from twinserve.traces.runs.fleet_record import is_fleet
    from twinserve.traces.runs.replay import ReplayResult
    from twinserve.traces.runs.replay import replay as decide_again
    from twinserve.traces.runs.vllm_records import load_deciders

    records = load_deciders(run, traces)
    equal, recorded, difference, where = 0, sum(len(record.steps) for record in records), None, ""
    rows = [row for record in records for row in record.requests]
    unanswered = len({row["id"] for row in rows} - {row["id"] for row in rows if row["finish_reason"] is not None})
    with Bar("replay", recorded) as bar:
        for record in records:
            part = decide_again(record, listener=Decisions(bar))
            equal += part.equal
            if part.difference is not None:
                difference, where = part.difference, f"replica {record.path.name}, " if is_fleet(run) else ""
                break
    result = ReplayResult(equal, recorded, difference, unanswered)
    if as_json:
        values = None if difference is None else vars(difference)
        counts = {"exact": result.is_exact, "equal": equal, "recorded": recorded, "unanswered": unanswered}
        print(json.dumps(counts | {"difference": values}))
    elif result.is_exact:
        left = f"; {unanswered} requests were left unanswered" if unanswered else ""
        print(f"exact: {equal} of {recorded} decisions made again{left}")
    else:
        print(f"differs after {equal} of {recorded} decisions: {where}{difference}")
    if not result.is_exact:
        raise typer.Exit(1)


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="SIM REAL | A... -- B...",
            help="A run record of the simulator and the one that it predicts; or, paired, those of two policies.",
        ),
    ],
    paired: Annotated[
        bool, typer.Option("--paired", help="What two policies differ by: A... -- B..., as many of each.")
    ] = False,
    max_error: Annotated[
        list[str] | None, typer.Option(help="METRIC=SHARE, such as tpot_s.mean=0.25; exit status 1 beyond it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Errors of a simulation against the run it predicts; or differences of two policies, with their intervals."""
    from twinserve.commands.tables import comparison_table
    from twinserve.traces.runs.compare import beyond, differing_settings, parse_limits
    from twinserve.traces.runs.compare import compare as compare_records
    from twinserve.traces.runs.vllm_records import load_run

    if paired:
        if max_error:
            raise InputError("expected none beside paired", field="max_error", value=max_error)
        _compare_pairs(runs, as_json)
        return
    limits = parse_limits(max_error or [])
    if len(runs) != 2:
        raise InputError("expected SIM REAL, or A... -- B... beside paired", field="runs", value=runs)
    sim, real = (load_run(Path(run)) for run in runs)
    comparisons = compare_records(sim, real)
    for name in differing_settings([sim, real]):
        if name in RULES:
            say(f"the runs differ in {name}")
    if as_json:
        print(json.dumps({row.metric: {"sim": row.sim, "real": row.real, "error": row.error} for row in comparisons}))
    else:
        if (sim.run["world"], real.run["world"]) == ("sim", "real"):
            comparison_table(comparisons)
        else:
            comparison_table(comparisons, (runs[0], runs[1], "difference"))
    too_far = beyond(comparisons, limits)
    for row in too_far:
        say(row.beyond(limits[row.metric]))
    if too_far:
        raise typer.Exit(1)


def _compare_pairs(runs: list[str], as_json: bool) -> None:
    """Print what the runs before `--` and those after it differ by."""
    from twinserve.commands.tables import paired_table
    from twinserve.planning.paired import paired
    from twinserve.traces.runs.compare import differing_settings
    from twinserve.traces.runs.vllm_records import load_run

    at = runs.index("--") if "--" in runs else 0
    if not 0 < at < len(runs) - 1:
        raise InputError("expected A... -- B... beside paired", field="runs", value=runs)
    a, b = ([load_run(Path(run)) for run in side] for side in (runs[:at], runs[at + 1 :]))
    differences = paired(a, b)
    if names := differing_settings([a[0], b[0]]):
        say(f"the sides differ in {', '.join(names)}")
    if len(a) == 1:
        say("one pair alone: no interval")
    if as_json:
        fields = ("a", "b", "difference", "interval")
        print(json.dumps({row.metric: {name: getattr(row, name) for name in fields} for row in differences}))
    else:
        paired_table(differences)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run records; say, a simulation and the run it predicts.")],
    out: Annotated[Path, typer.Option("--out", help="The HTML page to write; must not exist.")] = Path("report.html"),
    objective: Annotated[
        str | None, typer.Option(help="What the runs are judged by, such as 'p99 TTFT <= 1 s and p99 TPOT <= 50 ms'.")
    ] = None,
    force: Force = False,
) -> None:
    """One self-contained HTML page from run records."""
    from twinserve.reports.page import write_report
    from twinserve.traces.runs.vllm_records import load_run

    with in_place_of(out, force) as place:
        asked = None if objective is None else _asked(objective)
        records = [load_run(run) for run in runs]
        write_report(records, place, asked=asked, watch=_watched)
    print(out)


@contextmanager
def _watched(words: str, num_decisions: int | None) -> Iterator[Decisions]:
    """A bar while a page is made."""
    with Bar(f"report: {words}", num_decisions) as bar:
        yield Decisions(bar)


def _asked(text: str) -> Asked:
    """An objective as a page judges runs by it.

    Raises:
        InputError: the text has another form, or names what is not measured.
    """
    from twinserve.planning.objectives import Objective
    from twinserve.reports.asked import Asked
    from twinserve.traces.runs.compare import STATISTICS

    objective = Objective.parse(text)
    if objective.limits is not None:
        limits_s = {f"{name}_s": limit_s for name, limit_s in objective.limits.of}
        return Asked(str(objective), limits_s, objective.missed, share=objective.share)
    for term in objective.terms:
        if term.is_measured:
            names = ", ".join(STATISTICS)
            raise InputError(f"expected one of {names}, of all requests", field="objective", value=term.name)
    terms_s = {term.metric: term.limit_s for term in objective.terms}
    limits_s = {}
    for metric, limit_s in terms_s.items():
        name = metric.partition(".")[0]
        if name != "itl_s":  # a request has no one gap
            limits_s[name] = min(limit_s, limits_s.get(name, limit_s))
    return Asked(str(objective), limits_s, objective.missed, terms_s)


def export(
    run: Annotated[Path, typer.Argument(help="A run record, a fleet's, or a vLLM step log.")],
    kind: Annotated[
        Literal["perfetto", "parquet", "csv"],
        typer.Option("--format", help="A trace for ui.perfetto.dev; or the requests and the steps as tables."),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", help="The trace (gzip where it ends in .gz) or the folder to write; must not exist."),
    ],
    traces: Traces = None,
    force: Force = False,
) -> None:
    """Write a run for other tools: Perfetto's timeline, or two tables."""
    from twinserve.traces.runs.perfetto import export_perfetto
    from twinserve.traces.runs.tables import export_tables
    from twinserve.traces.runs.vllm_records import load_run

    with in_place_of(out, force, ("requests.parquet", "requests.csv")) as place:
        record = load_run(run, traces)
        if kind == "perfetto":
            export_perfetto(record, place)
        else:
            export_tables(record, place, kind)
    print(out)


def record_import(
    source: Annotated[Path, typer.Argument(help="A vLLM step log.")],
    out: Annotated[Path, typer.Argument(help="Folder of the run record to write; must not exist.")],
    traces: Traces = None,
    force: Force = False,
) -> None:
    """Write another engine's recorded run as a run record."""
    from twinserve.traces.runs.record import write_record
    from twinserve.traces.runs.vllm_records import read_vllm_record

    with in_place_of(out, force, ("run.json",)) as place:
        record = read_vllm_record(source, traces)
        write_record(record, place)
    say(f"{out}: {len(record.requests)} requests, {len(record.steps)} steps")


def record_stat(
    run: Annotated[Path, typer.Argument(help="A run record, a fleet's, or a vLLM step log.")],
    by: Annotated[
        Literal["tenant", "priority", "session", "prompt"],
        typer.Option(help="What makes a class; prompt: the power of two that its length is below."),
    ] = "tenant",
    warm_up_s: Annotated[float, typer.Option(min=0, help="Requests of so many first seconds are left out.")] = 0.0,
    drain_s: Annotated[float, typer.Option(min=0, help="And those of so many last ones.")] = 0.0,
    traces: Traces = None,
    as_json: Json = False,
) -> None:
    """What came of the requests of a run by class: latencies, tokens computed again, KV held, fairness."""
    from twinserve.commands.tables import class_table
    from twinserve.planning.classes import by_class
    from twinserve.traces.runs.vllm_records import load_deciders

    records = load_deciders(run, traces)
    found = by_class(records, by, warm_up_s=warm_up_s, drain_s=drain_s)
    if as_json:
        print(json.dumps(found))
    else:
        class_table(found)
