"""The command line: the names of the commands, which lie in commands/, and how one ends."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from twinserve.commands.latencies import fit, profile
from twinserve.commands.models import generate, model_fetch, model_verify
from twinserve.commands.options import KeepsDashes
from twinserve.commands.records import compare, record_import, replay, report
from twinserve.commands.serving import serve, top
from twinserve.commands.sweeps import capacity, sweep
from twinserve.commands.traces import trace_convert, trace_fetch, trace_make, trace_stat
from twinserve.commands.upgrades import tune, upgrade
from twinserve.commands.worlds import demo, run, sim
from twinserve.settings.errors import InputError, RunError

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
app.command()(upgrade)
app.command()(tune)
app.command()(sim)
app.command()(run)
app.command()(replay)
app.command(cls=KeepsDashes)(compare)
app.command()(report)
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
