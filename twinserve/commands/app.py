"""The names of the commands, which lie in the modules beside this one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

import typer

from twinserve.commands.configs import config_check, config_init
from twinserve.commands.explain import explain
from twinserve.commands.latencies import fit, profile
from twinserve.commands.models import generate, model_describe, model_fetch, model_verify
from twinserve.commands.options import Command, Group, KeepsDashes
from twinserve.commands.records import compare, export, record_import, record_stat, replay, report
from twinserve.commands.serving import serve, top
from twinserve.commands.sweeps import capacity, plan, sweep
from twinserve.commands.traces import trace_convert, trace_fetch, trace_make, trace_stat
from twinserve.commands.upgrades import tune, upgrade
from twinserve.commands.worlds import demo, run, sim

SHAPE: dict[str, Any] = {"rich_markup_mode": None, "cls": Group}
app = typer.Typer(pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}, **SHAPE)
GROUPS = {
    "trace": typer.Typer(help="Look at a trace, make a synthetic one, change its format, bring a public one.", **SHAPE),
    "model": typer.Typer(help="Bring a model, say what it needs, or hold one against transformers.", **SHAPE),
    "config": typer.Typer(help="Begin a file of settings, or check one.", **SHAPE),
    "record": typer.Typer(help="Bring a recorded run of another engine, or look at one by class.", **SHAPE),
}
"""Commands of two words, by the first."""

H100 = "--latency roofline:llama-3-8b@h100"
SLO = '--objective "p99 TTFT <= 1 s and p99 TPOT <= 50 ms"'
COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "capacity": (capacity, f"twinserve capacity TRACE {H100} {SLO} --price 2.5"),
    "plan": (plan, f"twinserve plan TRACE --model llama-3-70b --devices h100,l40s --price h100=2.5,l40s=1.1 {SLO}"),
    "sweep": (sweep, "twinserve sweep docs/studies/azure.toml --out sweeps/first"),
    "tune": (tune, f"twinserve tune TRACE {H100} {SLO}"),
    "upgrade": (upgrade, f"twinserve upgrade TRACE --from 0.24 --to 0.33 {H100}"),
    "sim": (sim, f"twinserve sim TRACE {H100} --out runs/sim"),
    "run": (run, "twinserve run TRACE --limit 60 --max-output-tokens 64 --out runs/real"),
    "replay": (replay, "twinserve replay runs/real"),
    "compare": (compare, "twinserve compare runs/sim runs/real"),
    "report": (report, "twinserve report runs/sim runs/real --out report.html"),
    "explain": (explain, "twinserve explain runs/sim --slowest 3"),
    "export": (export, "twinserve export runs/sim --format perfetto --out sim.json.gz"),
    "profile": (profile, "twinserve profile --out latency.json"),
    "fit": (fit, "twinserve fit runs/real --out latency.json"),
    "generate": (generate, 'twinserve generate "What is the capital of France?"'),
    "serve": (serve, "twinserve serve --simulate --latency llama-3-8b-h200 --port 8000"),
    "top": (top, "twinserve top http://127.0.0.1:8000"),
    "demo": (demo, "twinserve demo"),
    "trace stat": (trace_stat, "twinserve trace stat TRACE"),
    "trace convert": (trace_convert, "twinserve trace convert TRACE small.jsonl --limit 1000"),
    "trace fetch": (trace_fetch, "twinserve trace fetch azure-2023-conv"),
    "trace make": (trace_make, "twinserve trace make --out mine.jsonl --requests 100 --rate 2"),
    "config init": (config_init, "twinserve config init twinserve.toml"),
    "config check": (config_check, "twinserve config check twinserve.toml"),
    "record import": (record_import, "twinserve record import LOG runs/vllm"),
    "record stat": (record_stat, "twinserve record stat runs/sim --by tenant"),
    "model describe": (model_describe, "twinserve model describe gpt-oss-120b@h100:tp=2"),
    "model fetch": (model_fetch, "twinserve model fetch smollm2-135m"),
    "model verify": (model_verify, "twinserve model verify models/qwen3-0.6b"),
}
"""Every command, and a call of it."""

for words, (command, example) in COMMANDS.items():
    *group, name = words.split()
    kind = KeepsDashes if command is compare else Command
    parent = GROUPS[group[0]] if group else app
    parent.command(name, cls=kind, epilog=f"\b\nExample:\n  {example}")(command)
for name, parent in GROUPS.items():
    app.add_typer(parent, name=name)


@functools.cache
def parser() -> Any:
    """What reads a command line, made of all commands; once in a process, as that takes a while."""
    return typer.main.get_command(app)


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
