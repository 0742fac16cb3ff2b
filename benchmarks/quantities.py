"""Measured quantities in words: seconds, memory, ratios, each with its spread where it was measured more than once."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

NOTHING = "–"
NEUTRAL = {"x": 1.0, "%": 0.0}
"""What a comparison is by its unit where nothing differs: a ratio, or percent more or less."""


def number(value: float) -> str:
    """A number to three digits, or all digits before the point."""
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 1:
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return f"{value:.3g}"


def seconds(value: float) -> str:
    """Seconds, or milliseconds where they are few."""
    return f"{number(value)} s" if value >= 1 else f"{number(1000 * value)} ms"


def megabytes(value: float) -> str:
    """Memory or disk in 10**6 bytes."""
    return f"{number(value)} MB"


def duration(measured: dict[str, Any]) -> str:
    """A measurement's median, its least and most, and where it counts tokens, its throughput."""
    text = spread_of(measured)
    return f"{text}, {number(measured['tokens_per_s'])} tok/s" if "tokens_per_s" in measured else text


def spread_of(measured: dict[str, Any]) -> str:
    """A measurement's median, and its least and most if it was repeated."""
    repeats, text = measured["repeats_s"], seconds(measured["median_s"])
    return text if len(repeats) < 2 else f"{text} ({between(seconds(min(repeats)), seconds(max(repeats)))})"


def quantity(shown: dict[str, Any]) -> str:
    """A figure with its unit; of a comparison the median with its least and most, or that these do not tell it."""
    text = with_unit(shown["value"], shown["unit"])
    if "least" not in shown or shown["least"] == shown["most"]:
        return text
    limits = between(*(with_unit(shown[limit], shown["unit"]) for limit in ("least", "most")))
    return f"{text} ({limits})" if is_told_apart(shown) else f"within the spread ({limits})"


def between(least: str, most: str) -> str:
    """Two quantities as a range, their unit once if it is the same."""
    (low, unit), (_, other) = (re.fullmatch(r"([-\d.,e]+)(.*)", text).groups() for text in (least, most))  # type: ignore[union-attr]
    return f"{low if unit == other else least} to {most}"


def figure(name: str, value: float | str, unit: str = "") -> dict[str, Any]:
    """A figure to be shown."""
    return {"name": name, "value": value, "unit": unit}


def compared(name: str, turns: Seq[float], unit: str) -> dict[str, Any]:
    """A figure that compares neighbours: its median, least and most over their turns."""
    return figure(name, statistics.median(turns), unit) | {"least": min(turns), "most": max(turns)}


def speed_up(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """How many times faster `after` was than `before`, two cases that were measured in turns: turn by turn."""
    pairs = zip(before["repeats_s"], after["repeats_s"], strict=True)
    return compared(name, [slow / fast for slow, fast in pairs], "x")


def is_told_apart(compared: dict[str, Any]) -> bool:
    """Whether every turn of a comparison shows a difference in the same direction."""
    return not compared["least"] <= NEUTRAL[compared["unit"]] <= compared["most"]


def with_unit(value: float | str, unit: str) -> str:
    """A value and its unit."""
    text = value if isinstance(value, str) else number(value)
    return text + ("" if unit in NEUTRAL else " ") * bool(unit) + unit


def in_turns(measured: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The copies that were measured in turns, by name, the imported one last."""
    return measured["others"] | {measured["policies"]: measured}
