"""The command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twinserve.engine.options import RUNNER_SETTINGS, EngineOptions
from twinserve.fleets import FleetOptions
from twinserve.options import Json, KeepsDashes, TraceFile, options_of, refuse_existing
from twinserve.progress import Bar, say
from twinserve.sweep_cli import capacity, sweep
from twinserve.trace_cli import trace_app
from twinserve.traces.errors import InputError, RunError
from twinserve.traces.settings import RULES, Settings
from twinserve.workload import TraceOptions

if TYPE_CHECKING:
    from twinserve.sim.fit import FittedLatency

app = typer.Typer(
    help="The same LLM serving policies in a simulator and in a real engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
model_app = typer.Typer(help="Bring a model, or hold one against transformers.", no_args_is_help=True)
app.add_typer(trace_app, name="trace")
record_app = typer.Typer(help="Bring a recorded run of another engine.", no_args_is_help=True)
app.add_typer(model_app, name="model")
app.add_typer(record_app, name="record")
app.command()(sweep)
app.command()(capacity)

Config = Annotated[
    Path | None, typer.Option("--config", help="TOML file of settings; the engine's in [engine]. Options override it.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run record to write; must not exist.")]
Traces = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the public traces, for a vLLM step log whose prompts are those of one.",
        envvar="TWINSERVE_TRACES",
    ),
]
LATENCY_HELP = (
    "A latency file, one that ships (smollm2-135m-cpu-2-threads, the default, or qwen3-0.6b-h100), or "
    "roofline:MODEL@DEVICE[:tp=N], MODEL a config.json or a shape such as llama-3-8b."
)


def _version(is_asked: bool) -> None:
    """Say which twinserve this is, and end."""
    if is_asked:
        from twinserve.traces.record import versions

        print(", ".join(f"{name} {version}" for name, version in versions().items()))
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Say the versions, and how the policies run."),
    ] = False,
) -> None:
    """The same serving policies in a simulator and in a real engine."""


UsageError: Any = typer.BadParameter.__mro__[1]
"""What the command-line parser raises for every misuse."""


def main() -> None:
    """Run a command; bad input is one line on stderr and exit status 2, a step that fails one and exit status 1."""
    try:
        code = app(prog_name="twinserve", standalone_mode=False)
    except InputError as error:
        print(f"twinserve: {error}", file=sys.stderr)
        code = 2
    except UsageError as error:
        message = " ".join(error.format_message().split())
        print(f"twinserve: {message}", file=sys.stderr)
        code = 2
    except RunError as error:
        message = " ".join(str(error).split())
        print(f"twinserve: {message}", file=sys.stderr)
        code = 1
    except (KeyboardInterrupt, typer.Abort):
        print("twinserve: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def print_summary(summary: dict[str, Any], as_json: bool) -> None:
    """A run's summary: JSON, or a table for a person."""
    if as_json:
        print(json.dumps(summary))
        return
    from twinserve.tables import summary_table

    summary_table(summary)


@app.command()
@options_of(TraceOptions, "trace_options")
@options_of(FleetOptions, "fleet", but=("group",))
@options_of(Settings, "settings")
def sim(
    trace: TraceFile,
    trace_options: dict,
    fleet: dict,
    settings: dict,
    latency: Annotated[str | None, typer.Option(help=LATENCY_HELP)] = None,
    latency_from: Annotated[Path | None, typer.Option(help="A run record whose own step times are used.")] = None,
    step_by_step: Annotated[
        bool, typer.Option("--step-by-step", help="Simulate repeated steps one by one: slower, with the same results.")
    ] = False,
    config: Config = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Replay a trace in the simulator, on a replica or on a fleet."""
    from twinserve.sim.fit import FittedLatency
    from twinserve.workload import load_workload
    from twinserve.worlds import run_fleet, run_sim

    chosen = FleetOptions.load(fleet, config)
    replicas, words = chosen.build_replicas(settings, config, latency, latency_from)
    workload = load_workload(trace, trace_options)
    for line in words:
        say(line)
    with Bar("sim", len(workload.requests)) as bar:
        how: dict[str, Any] = {"out": out, "progress": bar.ended, "step_by_step": step_by_step}
        if chosen.is_fleet:
            router, facts = chosen.build_router(), chosen.router_facts
            summary = run_fleet(workload, replicas, router, router_facts=facts, outages=chosen.die, **how)
        else:
            (alone,) = replicas
            summary = run_sim(workload, alone.settings, alone.latency, latency_facts=alone.latency_facts, **how)
    for model in {id(replica.latency): replica.latency for replica in replicas}.values():
        if isinstance(model, FittedLatency) and model.num_outside:
            say(
                f"{model.num_outside} steps lie beyond what the latency was fitted on, by up to "
                f"{model.worst_excess:.1f}x"
            )
    print_summary(summary, as_json)


@app.command()
@options_of(TraceOptions, "trace_options")
@options_of(EngineOptions, "engine")
@options_of(Settings, "settings")
def run(
    trace: TraceFile,
    trace_options: dict,
    engine: dict,
    settings: dict,
    time_scale: Annotated[float, typer.Option(help="Arrivals come so many times later than in the trace.")] = 1.0,
    stop_at_eos: Annotated[bool, typer.Option("--stop-at-eos", help="Let end-of-sequence end an answer.")] = False,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    config: Config = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Replay a trace on the real engine, in real time."""
    from twinserve.policies import SamplingParams
    from twinserve.workload import load_workload
    from twinserve.worlds import load_llm, run_real

    options = EngineOptions.load(engine, config)
    chosen = Settings.load(settings, config, beside=("engine",))
    if not 0 <= time_scale < float("inf"):
        raise InputError("expected a number >= 0", field="time_scale", value=time_scale)
    workload = load_workload(trace, trace_options)
    refuse_existing(out)
    llm = load_llm(options, chosen)
    params = SamplingParams(temperature=temperature, ignore_eos=not stop_at_eos)
    with Bar("run", len(workload.requests), num_blocks=llm.settings.num_gpu_blocks) as bar:
        how: dict[str, Any] = {"progress": bar.ended, "watch": bar.stepped}
        summary = run_real(workload, llm, out=out, params=params, time_scale=time_scale, **how)
    print_summary(summary, as_json)


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="A run record, or a vLLM step log.")],
    traces: Traces = None,
    as_json: Json = False,
) -> None:
    """Decide a recorded run again from its facts; exit status 1 at the first difference.

    Of a fleet, each replica's in turn.
    """
    from twinserve.traces.fleet_record import is_fleet, load_replicas
    from twinserve.traces.replay import ReplayResult
    from twinserve.traces.replay import replay as decide_again
    from twinserve.traces.vllm_records import load_run

    records = load_replicas(run) if is_fleet(run) else [load_run(run, traces)]
    equal, recorded, difference, where = 0, sum(len(record.steps) for record in records), None, ""
    for record in records:
        part = decide_again(record)
        equal += part.equal
        if part.difference is not None:
            difference, where = part.difference, f"replica {record.path.name}, " if is_fleet(run) else ""
            break
    result = ReplayResult(equal, recorded, difference)
    if as_json:
        values = None if difference is None else vars(difference)
        print(json.dumps({"exact": result.is_exact, "equal": equal, "recorded": recorded, "difference": values}))
    elif result.is_exact:
        print(f"exact: {equal} of {recorded} decisions made again")
    else:
        print(f"differs after {equal} of {recorded} decisions: {where}{difference}")
    if not result.is_exact:
        raise typer.Exit(1)


@app.command(cls=KeepsDashes)
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
    from twinserve.tables import comparison_table
    from twinserve.traces.compare import beyond, differing_settings, parse_limits
    from twinserve.traces.compare import compare as compare_records
    from twinserve.traces.vllm_records import load_run

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
        comparison_table(comparisons)
    too_far = beyond(comparisons, limits)
    for row in too_far:
        say(row.beyond(limits[row.metric]))
    if too_far:
        raise typer.Exit(1)


def _compare_pairs(runs: list[str], as_json: bool) -> None:
    """Print what the runs before `--` and those after it differ by."""
    from twinserve.paired import paired
    from twinserve.tables import paired_table
    from twinserve.traces.compare import differing_settings
    from twinserve.traces.vllm_records import load_run

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


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run records; say, a simulation and the run it predicts.")],
    out: Annotated[Path, typer.Option("--out", help="The HTML page to write; must not exist.")] = Path("report.html"),
) -> None:
    """One self-contained HTML page from run records."""
    from twinserve.reports.page import write_report
    from twinserve.traces.vllm_records import load_run

    refuse_existing(out)
    write_report([load_run(run) for run in runs], out)
    print(out)


@app.command()
@options_of(EngineOptions, "engine")
@options_of(Settings, "settings", but=Settings.model_fields.keys() - RUNNER_SETTINGS)
def profile(
    out: Annotated[Path, typer.Option("--out", help="The latency file to write; must not exist.")],
    engine: dict,
    settings: dict,
    shapes: Annotated[int, typer.Option(help="Shapes of steps that are measured.", min=16)] = 128,
    max_seqs: Annotated[int, typer.Option(help="The most decodes in a step.", min=1)] = 16,
    max_context: Annotated[int, typer.Option(help="The longest context, in tokens.", min=64)] = 1024,
    max_prompt: Annotated[int, typer.Option(help="The most prompt tokens in a step.", min=32)] = 512,
    repeats: Annotated[int, typer.Option(help="Steps of each shape that count.", min=1)] = 5,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Measure step times of a model on this device, fit a latency model and save it."""
    from twinserve.worlds import fit_steps, load_llm, measure_steps

    options = EngineOptions.load(engine, config)
    chosen = Settings.load(settings, config, beside=("engine",))
    refuse_existing(out)
    llm = load_llm(options, chosen)
    samples = measure_steps(
        llm,
        shapes=shapes,
        max_seqs=max_seqs,
        max_context=max_context,
        max_prompt=max_prompt,
        repeats=repeats,
        progress=lambda total: Bar("profile", total),
    )
    _save_latency(fit_steps(llm, samples), out, as_json)


def _save_latency(fitted: FittedLatency, out: Path, as_json: bool) -> None:
    """Save a latency model, and print it or how far off it is."""
    fitted.save(out)
    if as_json:
        print(json.dumps(fitted.data))
    else:
        from twinserve.tables import residual_table

        residual_table(fitted.data)


@app.command()
def fit(
    runs: Annotated[list[Path], typer.Argument(help="Run records of one engine on one device, or vLLM step logs.")],
    out: Annotated[Path, typer.Option("--out", help="The latency file to write; must not exist.")],
    traces: Traces = None,
    as_json: Json = False,
) -> None:
    """Fit a latency model from the steps of recorded runs and save it."""
    from twinserve.worlds import fit_runs

    refuse_existing(out)
    _save_latency(fit_runs(runs, traces), out, as_json)


@app.command()
@options_of(EngineOptions, "engine")
def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    engine: dict,
    max_tokens: Annotated[int, typer.Option(help="The most tokens to answer with.", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among so many of the likeliest tokens; 0: all.", min=0)] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of so much probability.")] = 1.0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt."""
    from dataclasses import asdict

    from twinserve.policies import SamplingParams
    from twinserve.worlds import load_llm

    options = EngineOptions.load(engine, config)
    chosen = Settings.load({}, config, beside=("engine",))
    try:
        params = SamplingParams(temperature, max_tokens, top_k, top_p, options.seed)
    except ValueError as error:
        raise InputError(str(error)) from error
    llm = load_llm(options, chosen)
    from twinserve.engine.hub import chat_prompt

    (completion,) = llm.generate([prompt if raw else chat_prompt(llm.tokenizer, prompt)], params)
    if completion.refusal is not None:
        raise InputError(completion.refusal, field="prompt", value=prompt)
    print(json.dumps(asdict(completion)) if as_json else completion.text)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the results; a previous demo's are replaced.")] = Path(
        "reports/demo"
    ),
) -> None:
    """The main job on what ships with the project: profile, serve, simulate, replay, compare, report."""
    from twinserve.demo import run_demo

    if not run_demo(out):
        raise typer.Exit(1)


@record_app.command("import")
def record_import(
    source: Annotated[Path, typer.Argument(help="A vLLM step log.")],
    out: Annotated[Path, typer.Argument(help="Folder of the run record to write; must not exist.")],
    traces: Traces = None,
) -> None:
    """Write another engine's recorded run as a run record."""
    from twinserve.traces.record import write_record
    from twinserve.traces.vllm_records import read_vllm_record

    refuse_existing(out)
    record = read_vllm_record(source, traces)
    write_record(record, out)
    say(f"{out}: {len(record.requests)} requests, {len(record.steps)} steps")


@model_app.command("fetch")
def model_fetch(name: Annotated[str, typer.Argument(help="smollm2-135m.")]) -> None:
    """Bring a model and say where it lies."""
    from twinserve.engine.hub import fetch

    print(fetch(name, progress=say))


@model_app.command("verify")
@options_of(EngineOptions, "engine", but=EngineOptions.model_fields.keys() - {"device", "dtype"})
def model_verify(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, smollm2-135m, or a hub id.")],
    engine: dict,
    max_tokens: Annotated[int, typer.Option(help="Generated after each prompt.", min=1)] = 32,
    as_json: Json = False,
) -> None:
    """Hold a model on this engine against transformers; exit status 1 if more than rounding differs in float32."""
    from twinserve.worlds import require_engine

    options = EngineOptions.load(engine)
    require_engine(options.device)
    from twinserve.engine.hub import resolve_model
    from twinserve.engine.verify import verify

    folder = resolve_model(model, progress=say)
    report = verify(folder, device=options.device, dtype=options.dtype, max_tokens=max_tokens, progress=say)
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        from twinserve.tables import verify_table

        verify_table(report.as_dict())
    if report.agrees is False:
        raise typer.Exit(1)
