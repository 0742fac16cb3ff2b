"""Options of every command, as the command line itself says that it has them, with values that nobody means."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from changes import WORDS, changed_value
from outcome import run
from valid import DRAFTS, SMALLEST_PROFILE, Valid

AIM = ["--objective", "p99 TTFT <= 1 s", "--jobs", "1"]
ROOFLINE = ["--latency", "roofline:qwen3-0.6b@h100"]
NOT_TRIED = {"ray", "help"}
"""A cluster that is not there is waited for."""


REFUSED = {"top", "trace fetch", "record import", "model fetch"}
"""Commands of which what they are given here is refused, as the others need a network or another engine's record."""


def commands(valid: Valid, folder: Path) -> dict[str, list[str]]:
    """What every command is given beside the option that is tried; `demo` alone is not there, as it takes minutes."""
    trace, record, model, out = map(str, (valid.trace, valid.record, valid.model, folder / "out"))
    return {
        "sweep": [str(valid.plan), "--out", out, "--jobs", "1"],
        "capacity": [trace, *AIM, *ROOFLINE, "--limit", "6", "--tolerance", "0.5", "--out", out],
        "plan": [
            trace, *AIM, "--model", "qwen3-0.6b", "--devices", "h100", "--price", "h100=2", "--limit", "6", "--out", out
        ],
        "upgrade": [trace, *ROOFLINE, "--jobs", "1", "--limit", "4"],
        "tune": [trace, *AIM, *ROOFLINE, "--limit", "3"],
        "sim": [trace, "--latency", str(valid.latency), "--out", out],
        "run": [trace, "--model", model, "--time-scale", "0", "--limit", "3", "--num-gpu-blocks", "64", "--out", out],
        "replay": [record],
        "compare": [record, record],
        "report": [record, "--out", out],
        "profile": ["--model", model, *SMALLEST_PROFILE, "--out", out],
        "fit": [str(valid.real), "--out", out],
        "generate": ["the sky", "--model", model, "--max-tokens", "3", "--config", str(valid.few)],
        "serve": ["--simulate", "--latency", str(valid.latency), "--port", "0", "--record", out],
        "top": ["http://127.0.0.1:9", "--once"],
        "trace stat": [trace],
        "trace convert": [trace, out],
        "trace fetch": ["azure-2023-conv", "--mirror", "file:///nowhere"],
        "trace make": ["--out", out, "--requests", "20"],
        "record import": [record, out],
        "record stat": [record],
        "explain": [record],
        "export": [record, "--format", "csv", "--out", out],
        "config init": [out],
        "config check": [str(valid.plan.with_name("settings.toml"))],
        "model describe": ["qwen3-0.6b@h100"],
        "model fetch": ["nothing"],
        "model verify": [model, "--max-tokens", "2"],
    }  # fmt: skip


def leaves(command: Any, name: str = "") -> dict[str, Any]:
    """The commands that do something, by their names."""
    inner = getattr(command, "commands", None)
    if inner is None:
        return {name: command}
    found: dict[str, Any] = {}
    for part, one in inner.items():
        found |= leaves(one, f"{name} {part}".strip())
    return found


def option_case(rng: random.Random, valid: Valid, folder: Path) -> list[str]:
    """One or two options of some command, or one of its arguments, with a value that nobody means."""
    from twinserve.commands.app import parser

    given = commands(valid, folder)
    known = leaves(parser())
    assert known.keys() - given.keys() == {"demo"} and not given.keys() - known.keys()
    name = rng.choice(sorted(given))
    if name not in _checked:
        _checked.add(name)
        check_command(name, valid, folder.parent)
    arguments = [*given[name]]
    if rng.random() < 0.1:
        arguments[rng.randrange(len(arguments))] = rng.choice(WORDS)
        return [*name.split(), *arguments]
    options = [one for one in known[name].params if one.param_type_name == "option" and one.name not in NOT_TRIED]
    for option in rng.sample(options, min(len(options), rng.randint(1, 2))):
        flag = rng.choice([*option.opts, *option.secondary_opts])
        arguments += [flag] if option.is_flag else [flag, word_of(rng, option.name)]
    return [*name.split(), *arguments]


def word_of(rng: random.Random, name: str) -> str:
    """A value of an option."""
    if name == "speculative_config":
        return json.dumps(changed_value(rng, DRAFTS))
    return rng.choice(WORDS)


_checked: set[str] = set()


def check_command(name: str, valid: Valid, folder: Path) -> None:
    """A command takes what it is given beside the option that is tried; or every option of it would be refused."""
    (own := folder / f"whole {name}").mkdir()
    outcome = run([*name.split(), *commands(valid, own)[name]], folder)
    assert (outcome.status == 0) != (name in REFUSED), (name, outcome)
