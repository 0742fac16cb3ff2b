"""The commands that replay a trace: in the simulator, on the engine, and the demo in both."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twinserve.commands.options import VLLM_ARGS_HELP, Config, Force, Json, TraceFile, options_of, settings_of_vllm
from twinserve.commands.progress import Bar, say
from twinserve.engine.options import EngineOptions
from twinserve.planning.fleets import FleetOptions
from twinserve.settings.build_core import Settings
from twinserve.settings.config import validated
from twinserve.settings.errors import InputError
from twinserve.settings.files import in_place_of
from twinserve.settings.limits import MOST_TIME_SCALE
from twinserve.worlds.verdict import DOUBTFUL, Verdict, load_of
from twinserve.worlds.workload import LIKE_HELP, ClientOptions, RateOptions, TraceOptions

if TYPE_CHECKING:
    from twinserve.policies import Sequence

Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run record to write; must not exist.")]
RECORD = ("run.json",)
"""By what a run record is known."""
LATENCY_HELP = (
    "How long steps take: roofline:MODEL@DEVICE[:tp=N][:pp=N], MODEL a config.json or a shape such as llama-3-8b; a "
    "file that twinserve profile or fit wrote; or one that ships (smollm2-135m-cpu-2-threads, qwen3-0.6b-h100, "
    "qwen3-0.6b-h200, llama-3-8b-h200). Must be given, unless --latency-from is."
)


@options_of(RateOptions, "rates")
@options_of(TraceOptions, "trace_options")
@options_of(ClientOptions, "clients")
@options_of(FleetOptions, "fleet", but=("group",))
@options_of(Settings, "settings")
def sim(
    trace: TraceFile,
    rates: dict,
    trace_options: dict,
    clients: dict,
    fleet: dict,
    settings: dict,
    latency: Annotated[str | None, typer.Option(help=LATENCY_HELP)] = None,
    latency_from: Annotated[Path | None, typer.Option(help="A run record whose own step times are used.")] = None,
    step_by_step: Annotated[
        bool, typer.Option("--step-by-step", help="Simulate repeated steps one by one: slower, with the same results.")
    ] = False,
    intervals: Annotated[
        bool, typer.Option("--intervals", help="Say within which limits metrics lie nine times out of ten.")
    ] = False,
    within: Annotated[
        str | None, typer.Option(help="Count the requests that keep limits, such as 'TTFT <= 1 s and TPOT <= 50 ms'.")
    ] = None,
    measured: Annotated[
        str | None, typer.Option(help="Measure such as 'p99.9 TTFT and max queue of tenant=a' too.")
    ] = None,
    warm_up_s: Annotated[
        float, typer.Option(min=0, help="Requests of so many first seconds are neither counted nor measured by these.")
    ] = 0.0,
    drain_s: Annotated[float, typer.Option(min=0, help="Nor are those of so many last ones.")] = 0.0,
    energy: Annotated[
        bool, typer.Option("--energy", help="Say the joules of a token and of a request, by the device's power model.")
    ] = False,
    like: Annotated[str | None, typer.Option(help=f"{LIKE_HELP}.")] = None,
    vllm_args: Annotated[str | None, typer.Option(help=VLLM_ARGS_HELP)] = None,
    config: Config = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Replay a trace in the simulator, on a replica or on a fleet."""
    from twinserve.planning.judged import Judge, Rules
    from twinserve.planning.parallel import Workers
    from twinserve.planning.prediction import replica_intervals
    from twinserve.sim.fit import FittedLatency
    from twinserve.sim.intervals import NUM_DRAWS
    from twinserve.worlds.run import metered
    from twinserve.worlds.workload import load_workloads

    judge = Judge(Rules.parse(within, measured, warm_up_s, drain_s))
    verdict = Verdict()
    chosen = FleetOptions.load(fleet, config)
    if latency is not None and chosen.group and all(group.latency for group in chosen.group):
        raise InputError("expected none: each group of the fleet has its own", field="latency", value=latency)
    inside = validated(ClientOptions, {}, clients, None)
    settings = settings_of_vllm(vllm_args) | settings
    replicas, words = chosen.build_replicas(settings, config, latency, latency_from, like)
    workload, *others = load_workloads(trace, trace_options, rates, NUM_DRAWS if intervals else 1)
    with in_place_of(out, force, RECORD) as place:
        for line in (*words, load_of(workload)):
            say(line)
        limits = None
        if intervals:
            with Bar("intervals", NUM_DRAWS) as bar:
                drawn, told = [workload, *others], bar.advance
                limits = replica_intervals(drawn, replicas, chosen, Workers(None), advance=told, clients=inside.clients)
        with Bar("sim", len(workload.requests)) as bar:

            def ended(seq: Sequence) -> None:
                bar.ended(seq)
                verdict.ended(seq)
                judge.ended(seq)

            how: dict[str, Any] = {"out": place, "progress": ended, "step_by_step": step_by_step}
            served, drawn_by = metered(replicas) if energy else (replicas, None)
            how["derived"] = drawn_by
            summary = chosen.serve(workload, served, intervals=limits, clients=inside.clients, **how)
    judge.add_to(summary)
    for model in {id(replica.latency): replica.latency for replica in replicas}.values():
        if isinstance(model, FittedLatency) and model.num_outside:
            say(
                f"{model.num_outside} steps lie beyond what the latency was fitted on, by up to "
                f"{model.worst_excess:.1f}x"
            )
    _conclude(summary, verdict, as_json)


@options_of(RateOptions, "rates")
@options_of(TraceOptions, "trace_options")
@options_of(EngineOptions, "engine")
@options_of(Settings, "settings")
def run(
    trace: TraceFile,
    rates: dict,
    trace_options: dict,
    engine: dict,
    settings: dict,
    time_scale: Annotated[float, typer.Option(help="Arrivals come so many times later than in the trace.")] = 1.0,
    stop_at_eos: Annotated[bool, typer.Option("--stop-at-eos", help="Let end-of-sequence end an answer.")] = False,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    config: Config = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Replay a trace on the real engine, in real time."""
    from twinserve.policies import SamplingParams
    from twinserve.worlds.run import load_llm, run_real
    from twinserve.worlds.workload import load_workloads

    options = EngineOptions.load(engine, config)
    chosen = Settings.load(settings, config, beside=("engine",))
    if not 0 <= time_scale <= MOST_TIME_SCALE:
        raise InputError(f"expected a number from 0 to {MOST_TIME_SCALE}", field="time_scale", value=time_scale)
    try:
        params = SamplingParams(temperature=temperature, ignore_eos=not stop_at_eos)
    except ValueError as error:
        raise InputError(str(error)) from error
    (workload,) = load_workloads(trace, trace_options, rates)
    verdict = Verdict()
    with in_place_of(out, force, RECORD) as place, closing(load_llm(options, chosen, progress=say)) as llm:
        say(load_of(workload))
        with Bar("run", len(workload.requests), num_blocks=llm.settings.num_gpu_blocks) as bar:

            def ended(seq: Sequence) -> None:
                bar.ended(seq)
                verdict.ended(seq)

            how: dict[str, Any] = {"progress": ended, "watch": bar.stepped}
            summary = run_real(workload, llm, out=place, params=params, time_scale=time_scale, **how)
    _conclude(summary, verdict, as_json)


def _conclude(summary: dict[str, Any], verdict: Verdict, as_json: bool) -> None:
    """Print a run's summary, JSON or a table for a person, and say what is to be doubted of it.

    Raises:
        Exit: with a status of its own, if something is.
    """
    if as_json:
        print(json.dumps(summary))
    else:
        from twinserve.commands.tables import summary_table

        summary_table(summary)
    doubts = verdict.doubts(summary)
    for line in doubts:
        say(line)
    if doubts:
        raise typer.Exit(DOUBTFUL)


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the results; a previous demo's are replaced.")] = Path(
        "reports/demo"
    ),
) -> None:
    """The main job on what ships with the project: profile, serve, simulate, replay, compare, report."""
    from twinserve.commands.demo import run_demo

    if not run_demo(out):
        raise typer.Exit(1)
