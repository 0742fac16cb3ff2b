"""The names of the commands, which lie in the modules beside this one."""

from __future__ import annotations

from typing import Annotated

import typer

from twinserve.commands.latencies import fit, profile
from twinserve.commands.models import generate, model_describe, model_fetch, model_verify
from twinserve.commands.options import KeepsDashes
from twinserve.commands.records import compare, export, record_import, replay, report
from twinserve.commands.serving import serve, top
from twinserve.commands.sweeps import capacity, plan, sweep
from twinserve.commands.traces import trace_convert, trace_fetch, trace_make, trace_stat
from twinserve.commands.upgrades import tune, upgrade
from twinserve.commands.worlds import demo, run, sim

app = typer.Typer(
    help="The same LLM serving policies in a simulator and in a real engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
trace_app = typer.Typer(
    help="Look at a trace, make a synthetic one, change its format, bring a public one.", no_args_is_help=True
)
model_app = typer.Typer(help="Bring a model, or hold one against transformers.", no_args_is_help=True)
record_app = typer.Typer(help="Bring a recorded run of another engine.", no_args_is_help=True)
app.add_typer(trace_app, name="trace")
app.add_typer(model_app, name="model")
app.add_typer(record_app, name="record")
app.command()(sweep)
app.command()(capacity)
app.command()(plan)
app.command()(upgrade)
app.command()(tune)
app.command()(sim)
app.command()(run)
app.command()(replay)
app.command(cls=KeepsDashes)(compare)
app.command()(report)
app.command()(export)
app.command()(profile)
app.command()(fit)
app.command()(generate)
app.command()(serve)
app.command()(top)
app.command()(demo)
trace_app.command("stat")(trace_stat)
trace_app.command("convert")(trace_convert)
trace_app.command("fetch")(trace_fetch)
trace_app.command("make")(trace_make)
record_app.command("import")(record_import)
model_app.command("describe")(model_describe)
model_app.command("fetch")(model_fetch)
model_app.command("verify")(model_verify)


def _version(is_asked: bool) -> None:
    """Say which twinserve this is, and end."""
    if is_asked:
        from twinserve.traces.runs.record import versions

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
