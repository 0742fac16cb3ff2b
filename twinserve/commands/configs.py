"""The commands about files of settings: one to begin with, and what a file says."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from twinserve.engine.options import EngineOptions
from twinserve.planning.fleets import FleetOptions
from twinserve.serving.options import ServeOptions
from twinserve.settings.build_core import Settings
from twinserve.settings.files import write_whole

TABLES: dict[str, type[EngineOptions | FleetOptions | ServeOptions]] = {
    "engine": EngineOptions,
    "fleet": FleetOptions,
    "serve": ServeOptions,
}
"""The tables of a file that are no settings of the policies, by name."""
HEAD = """\
Settings of twinserve, for --config of sim, run, profile, generate and serve; options override them.
Each line holds a default. Take away its # to set it; what has no value is not set unless it gets one."""


def config_init(
    out: Annotated[Path, typer.Argument(help="The TOML file to write; must not exist.")] = Path("twinserve.toml"),
) -> None:
    """Write a file with every setting, its meaning and its default, to begin with."""
    lines = [f"# {line}" for line in HEAD.splitlines()]
    for name, model in {"": Settings, **TABLES}.items():
        lines += ["", *([f"[{name}]"] if name else []), *_lines(model)]
    write_whole(out, "\n".join(lines) + "\n")
    print(out)


def _lines(model: type[BaseModel]) -> list[str]:
    """A comment and a commented default for every field that has a text."""
    lines = []
    for name, info in model.model_fields.items():
        if info.description is not None:
            words = f"{info.description[0].upper()}{info.description[1:]}"
            lines += ["", *(f"# {line}" for line in textwrap.wrap(words, 100)), f"# {name} = {_toml(info.default)}"]
    return lines[1:]


def _toml(value: Any) -> str:
    return "" if value is None else json.dumps(value)


def config_check(
    file: Annotated[Path, typer.Argument(help="A TOML file, as --config takes it.")],
) -> None:
    """Check a file of settings, and print what it sets."""
    found: dict[str, BaseModel] = {"": Settings.load({}, file, beside=TABLES)}
    found |= {name: model.load({}, file) for name, model in TABLES.items()}
    for name, options in found.items():
        for field, value in options.model_dump(exclude_unset=True).items():
            print(f"{name}.{field}" if name else field, "=", json.dumps(value, default=str))
