"""The few figures that stand at the top of README, from the results that the pages they lead to are made from."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from fidelity_text import error
from pages import table
from quantities import in_turns, megabytes, seconds


def headline(results: Path) -> str:
    """A table of what is measured: a row for each of the files that are there; nothing where none is."""
    files = ("h200/fidelity.json", "fidelity-vllm.json", "simulator.json", "h200.json")
    fidelity, vllm, simulator, engine = (_read(results / name) for name in files)
    rows = []
    if fidelity is not None:
        rows += [_decisions(fidelity, vllm), _errors(fidelity)]
    if simulator is not None:
        rows.append(_simulation(simulator))
    if engine is not None:
        what = f"256 requests at once, Qwen3-0.6B's shape, one {engine['card']}"
        rows.append([what, f"{engine['w256_output_tok_s']:,.0f} output tokens/s", "[the engine](docs/engine.md)"])
    return "\n".join(table(["Measured", "", ""], rows)) if rows else ""


def _decisions(fidelity: dict[str, Any], vllm: dict[str, Any] | None) -> list[str]:
    """How many decisions of recorded runs are made again."""
    equal, recorded = fidelity["decisions"]
    said, pages = [f"{equal:,} of {recorded:,} of the engine's"], ["[the engine's](docs/fidelity.md)"]
    if vllm is not None:
        replays = [run["replay"] for run in vllm["runs"].values()]
        equal, recorded = (sum(one[name] for one in replays) for name in ("equal", "recorded"))
        said.append(f"{equal:,} of {recorded:,} of a real vLLM's")
        pages.append("[vLLM's](docs/fidelity-vllm.md)")
    return ["decisions of recorded runs, made again from their records", ", ".join(said), ", ".join(pages)]


def _errors(fidelity: dict[str, Any]) -> list[str]:
    """How far simulated windows are from served ones."""
    errors = [abs(error(window, "tpot_s.mean")) for window in fidelity["windows"].values()]
    what = f"mean TPOT, simulated against served, {len(errors)} windows of an {fidelity['device']} that no fit has seen"
    said = f"{median(errors):.1%} off in the median, {max(errors):.1%} at worst"
    return [what, said, "[window by window](docs/fidelity.md)"]


def _simulation(simulator: dict[str, Any]) -> list[str]:
    """What a simulation of the Azure trace takes."""
    kinds = {name: runs["a"] for name, runs in in_turns(simulator).items() if name in ("interpreted", "compiled")}
    run = simulator["a"]
    took = " or ".join(f"{seconds(one['wall_s'])} {name}" for name, one in kinds.items())
    what = f"{run['requests']:,} requests of the Azure trace, {run['steps']:,} steps, simulated on one core"
    page = "[beside others](benchmarks/results.md#the-simulator)"
    return [what, f"{took}, {megabytes(run['peak_rss_mb'])}", page]


def _read(path: Path) -> Any:
    """A file of results; None where it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
