"""The commands that make a latency model: from steps measured here, and from those of recorded runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twinserve.commands.options import Config, Force, Json, Traces, options_of
from twinserve.commands.progress import Bar, say
from twinserve.engine.options import RUNNER_SETTINGS, EngineOptions
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.settings.files import in_place_of, pair_in_place_of, write_pair
from twinserve.settings.limits import MOST_SHAPES, MOST_TOKENS
from twinserve.worlds.workload import TraceOptions

if TYPE_CHECKING:
    from twinserve.sim.fit import FittedLatency


DRAFTING = ("speculative_config", "pipeline_depth")
"""The settings of an engine that drafts: its steps are measured as it decides them."""


@options_of(EngineOptions, "engine")
@options_of(Settings, "settings", but=Settings.model_fields.keys() - {*RUNNER_SETTINGS, *DRAFTING})
@options_of(TraceOptions, "trace_options")
def profile(
    out: Annotated[
        Path, typer.Option("--out", help="The latency file to write, its profile beside it; must not exist.")
    ],
    engine: dict,
    settings: dict,
    trace_options: dict,
    shapes: Annotated[int, typer.Option(help="Shapes of steps that are measured.", min=16, max=MOST_SHAPES)] = 128,
    max_seqs: Annotated[int, typer.Option(help="The most decodes in a step.", min=1, max=MOST_TOKENS)] = 16,
    max_context: Annotated[int, typer.Option(help="The longest context, in tokens.", min=64, max=MOST_TOKENS)] = 1024,
    max_prompt: Annotated[int, typer.Option(help="The most prompt tokens in a step.", min=32, max=MOST_TOKENS)] = 512,
    repeats: Annotated[int, typer.Option(help="Steps of each shape that count.", min=1, max=MOST_SHAPES)] = 5,
    trace: Annotated[
        Path | None, typer.Option(help="Half of the shapes are those of steps that simulating this trace makes.")
    ] = None,
    latency: Annotated[
        str | None, typer.Option(help="What the trace is simulated with; the other shapes' measurements unless given.")
    ] = None,
    config: Config = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure step times of a model on this device, fit a latency model and save it."""
    from twinserve.sim.profiles import profile_beside
    from twinserve.worlds.run import choose_latency, fit_profile, load_llm, measure_steps, profile_of
    from twinserve.worlds.workload import load_workload

    options = EngineOptions.load(engine, config)
    chosen = Settings.load(settings, config, beside=("engine",))
    if "pipeline_depth" in settings and chosen.speculative_config is None:
        problem = "expected none without speculative_config, as it is the engine's own then"
        raise InputError(problem, field="pipeline_depth", value=chosen.pipeline_depth)
    if trace is None and (trace_options or latency):
        raise InputError("is missing, expected one beside its options", field="trace")
    with pair_in_place_of(out, profile_beside(out), force):
        workload = None if trace is None else load_workload(trace, trace_options)
        model = None if latency is None else choose_latency(latency)[0]
        with closing(load_llm(options, chosen, progress=say)) as llm:
            samples = measure_steps(
                llm,
                shapes=shapes,
                max_seqs=max_seqs,
                max_context=max_context,
                max_prompt=max_prompt,
                repeats=repeats,
                progress=lambda total: Bar("profile", total),
                workload=workload,
                latency=model,
            )
            measured = profile_of(llm, samples)
        fitted = fit_profile(measured)
        with _shown(fitted, as_json):
            write_pair(out, fitted.text(), profile_beside(out), measured.packed(), force)


def fit(
    runs: Annotated[list[Path], typer.Argument(help="Run records of one engine on one device, or vLLM step logs.")],
    out: Annotated[Path, typer.Option("--out", help="The latency file to write; must not exist.")],
    profile: Annotated[
        Path | None, typer.Option(help="Steps that `twinserve profile` measured of it, to be fitted with the runs'.")
    ] = None,
    acceptance: Annotated[
        Path | None, typer.Option(help="A file to write too: the law of acceptance of the runs' drafts.")
    ] = None,
    traces: Traces = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Fit a latency model from the steps of recorded runs and save it."""
    from twinserve.worlds.run import fit_acceptance, fit_runs

    if acceptance is None:
        with in_place_of(out, force) as place:
            fitted = fit_runs(runs, traces, profile)
            with _shown(fitted, as_json):
                fitted.save(place)
        return
    with pair_in_place_of(out, acceptance, force):
        fitted, law = fit_runs(runs, traces, profile), fit_acceptance(runs)
        with _shown(fitted, as_json):
            write_pair(out, fitted.text(), acceptance, law.text(), force)


@contextmanager
def _shown(fitted: FittedLatency, as_json: bool) -> Iterator[None]:
    """Prints a latency model that has been saved, or how far off it is; and the model where it cannot be saved."""
    try:
        yield
    except InputError:
        print(json.dumps(fitted.data))
        raise
    if as_json:
        print(json.dumps(fitted.data))
    else:
        from twinserve.commands.tables import residual_table

        residual_table(fitted.data)
