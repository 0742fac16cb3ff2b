"""The command that serves over HTTP, in either world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twinserve.commands.options import Config, options_of
from twinserve.commands.progress import say
from twinserve.commands.worlds import LATENCY_HELP
from twinserve.engine.options import EngineOptions
from twinserve.planning.fleets import OF_SIMULATIONS, FleetOptions
from twinserve.serving.options import ServeOptions
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.settings.files import refuse_existing
from twinserve.settings.limits import MOST_MIB, MOST_SETTINGS_BYTES, MOST_TIME_SCALE, MOST_WAIT_S


@options_of(ServeOptions, "server")
@options_of(FleetOptions, "fleet", but=("group", "die", "restart", "slow", *OF_SIMULATIONS))
@options_of(EngineOptions, "engine")
@options_of(Settings, "settings")
def serve(
    server: dict,
    fleet: dict,
    engine: dict,
    settings: dict,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Serve a simulated replica in real time: no model, no GPU.")
    ] = False,
    latency: Annotated[str | None, typer.Option(help=f"With --simulate: {LATENCY_HELP}")] = None,
    output_tokens: Annotated[
        str | None,
        typer.Option(help="With --simulate: how long answers are, fixed:N or lognormal:MEAN:CV; default: max_tokens."),
    ] = None,
    time_scale: Annotated[
        float, typer.Option(help="With --simulate: a simulated second takes so many on the wall.")
    ] = 1.0,
    record: Annotated[Path | None, typer.Option(help="Folder of the run record to write; must not exist.")] = None,
    record_tokens: Annotated[
        bool, typer.Option("--record-tokens", help="Record the tokens themselves, not only which prefixes are equal.")
    ] = False,
    record_segment_mib: Annotated[float, typer.Option(help="MiB after which the record begins a new segment.")] = 64,
    record_segment_s: Annotated[
        float, typer.Option(help="Seconds after which it does; a kill costs what is newer.")
    ] = 60,
    config: Config = None,
) -> None:
    """Serve OpenAI's interface over HTTP, from the engine or from a simulated replica."""
    options = ServeOptions.load(server, config)
    refuse_existing(record)
    try:
        from twinserve.serving import run
    except ImportError as error:
        raise InputError("the server needs FastAPI and uvicorn: pip install 'twinserve[serve]'") from error
    of_segments = (
        ("record_segment_mib", record_segment_mib, MOST_MIB),
        ("record_segment_s", record_segment_s, MOST_WAIT_S),
    )
    for field, value, most in of_segments:
        if not 0 < value <= most:
            raise InputError(f"expected a number > 0 and <= {most}", field=field, value=value)
    model: run.Model
    if simulate:
        from twinserve.traces.generator import LengthSpec

        for field, value in engine.items():
            raise InputError("expected none beside --simulate, which has no engine", field=field, value=value)
        if not 1 / MOST_TIME_SCALE <= time_scale <= MOST_TIME_SCALE:
            expected = f"expected a number from {1 / MOST_TIME_SCALE} to {MOST_TIME_SCALE}"
            raise InputError(expected, field="time_scale", value=time_scale)
        lengths = None if output_tokens is None else LengthSpec.parse(output_tokens, "output_tokens")
        of_fleet = FleetOptions.load(fleet, config)
        if of_fleet.die:
            raise InputError("expected none: a live replica does not die", field="die", value=str(of_fleet.die[0]))
        for name in OF_SIMULATIONS:
            if name in of_fleet.model_fields_set:
                raise InputError("expected none of it: live replicas have none", path=config, field=f"fleet.{name}")
        if set(of_fleet.roles) != {"both"}:
            raise InputError("expected 'both': a live replica answers what it computes", field="fleet.group.role")
        replicas, words = of_fleet.build_replicas(settings, config, latency)
        for line in words:
            say(line)
        facts = replicas[0].latency_facts
        name = str(facts.get("about", {}).get("model", facts["name"]))
        router, router_facts = of_fleet.build_router(), of_fleet.router_facts
        model = run.SimulatedModel(name, replicas, router, lengths, time_scale, router_facts)
    else:
        chosen = Settings.load(settings, config, beside=("engine", "serve"))
        for field, value in (("latency", latency), ("output_tokens", output_tokens), *fleet.items()):
            if value is not None:
                raise InputError("expected --simulate beside it", field=field, value=value)
        takes_defaults = options.generation_config == "auto"
        model = run.EngineModel(EngineOptions.load(engine, config), chosen, say, takes_defaults)
    kept = run.RecordOptions.of(
        record, keeps_tokens=record_tokens, segment_mib=record_segment_mib, segment_s=record_segment_s
    )
    counts = run.Service(options, model, record=kept, say=say).run()
    if counts is not None:
        ended = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()) if reason != "requests")
        say(f"{counts['requests']} requests{ended and ': '}{ended}; recorded in {record}")


def top(
    url: Annotated[str, typer.Argument(help="Of the server, this one or vLLM's: http://HOST:PORT.")],
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1, max=MOST_WAIT_S)] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
) -> None:
    """Watch a server by its metrics page: queues, KV cache, tokens a second, latencies."""
    import time
    from urllib.error import URLError
    from urllib.request import urlopen

    from rich.live import Live

    from twinserve.commands.tables import top_table

    try:
        from twinserve.serving.top import Reading, rows
    except ImportError as error:
        raise InputError("metrics need prometheus_client: pip install 'twinserve[serve]'") from error
    page = f"{url.rstrip('/').removesuffix('/metrics')}/metrics"

    def read() -> Reading:
        try:
            with urlopen(page, timeout=10) as response:
                return Reading.of(response.read(MOST_SETTINGS_BYTES).decode(), time.monotonic(), page)
        except (URLError, OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"cannot be read: {error}", path=page) from error

    before, now = None, read()
    with Live(top_table(url, rows(now, before)), auto_refresh=False) as live:
        while not once:
            time.sleep(interval)
            before, now = now, read()
            live.update(top_table(url, rows(now, before)), refresh=True)
