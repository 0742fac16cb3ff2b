"""The reference of the site: every command, every setting and every field of a record, made from the code."""

from __future__ import annotations

import html
import importlib.util
import json
import re
from pathlib import Path

import pytest

import twinserve.traces.runs
from twinserve.commands.app import COMMANDS, parser
from twinserve.engine.options import EngineOptions
from twinserve.planning.fleets import FleetOptions
from twinserve.settings.build_core import Settings
from twinserve.worlds.workload import ClientOptions, PointOptions, TraceOptions

SITE = Path(__file__).resolve().parents[1] / "docs" / "site"


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("reference", SITE / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


def section(page: str, title: str) -> str:
    return page.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_its_options_there_or_a_link_to_them(pages, name):
    text, command = section(pages["commands.md"], name), parser()
    for word in name.split():
        command = command.commands[word]
    assert COMMANDS[name][1] in text
    told = set(re.findall(r"(--?[\w-]+)", " ".join(re.findall(r"^\| <code>(.*?)</code>", text, re.MULTILINE))))
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    own = [option for option in options if set(option.opts) <= told]
    assert len(own) + sum(map(int, re.findall(r"(\d+) of \[", text))) == len(options)
    arguments = re.findall(r"^\| <code>[^-].*</code>", text, re.MULTILINE)
    assert len(arguments) == len(command.params) - len(options)


@pytest.mark.parametrize("model", [Settings, EngineOptions, TraceOptions, FleetOptions, ClientOptions, PointOptions])
def test_a_setting_has_a_row_with_its_default_and_its_words(pages, model):
    rows = [
        [html.unescape(cell.strip()) for cell in line.split("|")[1:-1]] for line in pages["settings.md"].splitlines()
    ]
    told = {row[0]: row[1:] for row in rows if len(row) == 3}
    for name, info in model.model_fields.items():
        default, words = told[f"<code>{name}</code>"]
        assert default == f"<code>{'none' if info.default in (None, []) else info.default}</code>" and words


def test_a_field_of_a_record_has_a_row(pages):
    schema = json.loads((Path(twinserve.traces.runs.__file__).parent / "record.schema.json").read_text())
    rows = [line.split("|")[1].strip() for line in pages["record.md"].splitlines() if line.startswith("| <code>")]
    assert rows == [f"<code>{field}</code>" for kind in schema["$defs"].values() for field in kind["properties"]]


def test_tables_are_whole(pages):
    for page in pages.values():
        for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
            assert len({line.count("|") for line in table.splitlines()}) == 1, table
