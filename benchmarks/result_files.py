"""The JSON files of results."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def scratch_folder() -> Path:
    """A new folder for results that nobody asked to keep elsewhere."""
    return Path(tempfile.mkdtemp(prefix="twinserve-results-"))


def load_json(path: Path) -> Any:
    """What a file of results holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, values: Any) -> None:
    """Write a file of results, and the folder that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def merge(path: Path, values: dict[str, Any]) -> None:
    """Put `values` into a JSON file beside what is there; those of "repeats" one by one."""
    old = load_json(path) if path.exists() else {}
    repeats = old.get("repeats", {}) | values.get("repeats", {})
    merged = old | values | ({"repeats": repeats} if repeats else {})
    write_json(path, merged)
