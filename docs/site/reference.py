"""The pages of the reference, made from the code: every command, every setting, a record's schema, and the versions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

import twinserve.traces.runs
from twinserve.commands.app import COMMANDS, parser
from twinserve.engine.options import EngineOptions
from twinserve.planning.fleets import FleetOptions
from twinserve.settings.build_core import Settings
from twinserve.settings.vllm_versions import VERSIONS
from twinserve.sim.fit import FIRST_SCHEMA as FIRST_LATENCY
from twinserve.sim.fit import SCHEMA as LATENCY
from twinserve.sim.profiles import SCHEMA as PROFILE
from twinserve.traces.formats.own import TRACE_FORMAT
from twinserve.traces.runs.record import FIRST_SCHEMA, SCHEMA
from twinserve.traces.runs.vllm_journal import FORMAT as JOURNAL
from twinserve.traces.runs.vllm_records import FORMAT as STEP_LOG
from twinserve.worlds.workload import ClientOptions, PointOptions, TraceOptions

ROOT = Path(__file__).resolve().parents[2]

GROUPS: dict[str, tuple[type[BaseModel], str]] = {
    "Settings": (Settings, "What decides. Names and defaults are vLLM's where vLLM has the setting."),
    "Engine": (EngineOptions, "What executes on the engine; the table `[engine]` of a file."),
    "Trace options": (TraceOptions, "How a trace is changed before it is replayed, in this order."),
    "Fleet": (FleetOptions, "Replicas behind a router; the table `[fleet]` of a file."),
    "Clients": (ClientOptions, "What clients and the door of an engine do, in simulations."),
    "Point": (PointOptions, "What a point of a sweep or of a search has beside those."),
}
"""Models whose fields are options, by the heading that `-h` has them under."""

PLACES = {
    "run": ("run.json", "The whole file."),
    "request": ("requests.jsonl", "A line a request, in the order in which they came in."),
    "step": ("steps.jsonl", "A line a step, or one for several that repeat it."),
    "summary": ("summary", "In `run.json`; `metrics.summary_of` says how each number is computed."),
    "distribution": ("distribution", "Of a latency, in a summary; null where there were no values."),
}


def pages() -> dict[str, str]:
    """Markdown by the name of its page."""
    return {"commands.md": commands(), "settings.md": settings(), "record.md": record(), "versions.md": versions()}


def commands() -> str:
    """Every command: what it does, a call of it, and its options; those of settings by a link."""
    group = parser()
    parts = ["# Commands\n", "Made from the code; `twinserve COMMAND -h` says the same on a terminal.\n"]
    for name, (_, example) in COMMANDS.items():
        command: Any = group
        for word in name.split():
            command = command.commands[word]
        context = typer.Context(command, info_name=f"twinserve {name}")
        usage = " ".join(command.collect_usage_pieces(context))
        parts += [f"## {name}\n", f"{_cell(command.help)}\n", f"    twinserve {name} {usage}\n"]
        own, shared = [], dict.fromkeys(GROUPS, 0)
        for parameter in command.get_params(context):
            panel = getattr(parameter, "rich_help_panel", None)
            if panel in GROUPS:
                shared[panel] += 1
            elif (found := parameter.get_help_record(context)) is not None:
                own.append((_code(found[0]), _cell(found[1])))
        parts.append(_table(("argument or option", ""), own))
        links = (f"{count} of [{panel}](settings.md#{_anchor(panel)})" for panel, count in shared.items() if count)
        if said := ", ".join(links):
            parts.append(f"Beside them: {said}.\n")
        parts.append(f"Such as:\n\n    {example}\n")
    return "\n".join(parts)


def settings() -> str:
    """Every setting that commands and files take, with its default."""
    parts = ["# Settings\n", "Made from the code. An option `--max-num-seqs` is `max_num_seqs` in a file.\n"]
    for title, (model, words) in GROUPS.items():
        rows = []
        for name, info in model.model_fields.items():
            default = "none" if info.default in (None, []) else str(info.default)
            rows.append((_code(name), _code(default), _cell(info.description)))
        parts += [f"## {title}\n", f"{words}\n", _table(("name", "default", ""), rows)]
    return "\n".join(parts)


def record() -> str:
    """What a run record's files hold, field by field."""
    file = Path(twinserve.traces.runs.__file__).parent / "record.schema.json"
    schema = json.loads(file.read_text(encoding="utf-8"))
    parts = [
        "# A run record\n",
        "Made from `traces/runs/record.schema.json`, a JSON Schema; what is read is checked as it says. What a record"
        " means stands in [traces](../docs/traces.md). `outputs.jsonl.gz`, of a real run, has the tokens of each"
        " answer.\n",
    ]
    for name, kind in schema["$defs"].items():
        title, words = PLACES[name]
        needed = kind.get("required", ())
        rows = [
            (_code(field), _kind(value), "yes" if field in needed else "no", _cell(value.get("description", "")))
            for field, value in kind["properties"].items()
        ]
        parts += [f"## {title}\n", f"{words}\n", _table(("field", "kind", "required", ""), rows)]
    return "\n".join(parts)


def versions() -> str:
    """What was changed by version, and which versions of files and of vLLM are known."""
    rows = [
        ("run record", _code(SCHEMA), _code(FIRST_SCHEMA)),
        ("trace", _code(TRACE_FORMAT), ""),
        ("latency", _code(LATENCY), _code(FIRST_LATENCY)),
        ("profile", _code(PROFILE), ""),
        ("journal of a vLLM", _code(JOURNAL), ""),
        ("step log of a vLLM", _code(STEP_LOG), ""),
    ]
    known = ", ".join(VERSIONS)
    return "\n".join(
        (
            "# Versions\n",
            _table(("file", "written", "read as well"), rows),
            f"vLLM's rules, which `vllm_version` chooses: {known}; [what they differ in](../docs/policies.md).\n",
            (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("# ", "## "),
        )
    )


def _kind(value: dict[str, Any]) -> str:
    """A JSON schema of a field in a word or two."""
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{_anchor(PLACES[name][0])})"
    if "const" in value:
        return _code(value["const"])
    if "enum" in value:
        return " or ".join(_code(json.dumps(one)) for one in value["enum"])
    for word in ("anyOf", "oneOf"):
        if word in value:
            return " or ".join(map(_kind, value[word]))
    kinds = value.get("type", "anything")
    words = " or ".join(kinds) if isinstance(kinds, list) else kinds
    if "items" in value and isinstance(value["items"], dict):
        return f"{words} of {_kind(value['items'])}"
    return words


def _anchor(title: str) -> str:
    """The anchor of a heading."""
    return title.lower().replace(" ", "-").replace(".", "")


def _cell(text: str | None) -> str:
    """A text as a cell of a table has it."""
    return escape(" ".join((text or "").split()), quote=False).replace("|", "&#124;")


def _code(text: str) -> str:
    return f"<code>{_cell(text)}</code>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
