"""The charts of the study: bars of capacities, and curves of latencies."""

from __future__ import annotations

import math

from study_plan import Result
from svg import INK, MUTED, Drawing

RULE, LIMIT = "#dfe3e8", "#b84f08"
COLORS = ("#1f5fa8", "#86afdc", "#0b3765", "#c4560b")


def bars(title: str, groups: list[tuple[str, list[tuple[str, Result]]]], unit: str) -> str:
    """Horizontal bars: what every seed keeps; a dot a seed for what that seed alone keeps.

    Args:
        groups: a label, and for each series its name and a row of a capacity.
    """
    series = list(dict.fromkeys(name for _, of_group in groups for name, _ in of_group))
    left, right, top, thick, gap = 190, 60, 44, 16, 12
    height = top + sum(len(of_group) * thick + gap for _, of_group in groups) + 36
    drawing = Drawing(760, height, title)
    rows = [row for _, of_group in groups for _, row in of_group]
    most = max(value for row in rows for value in (row["value"] or 0, *(v or 0 for v in row["by_seed"])))
    step = nice_step(most)
    scale = (760 - left - right) / (math.ceil(most / step) * step)
    key_x = float(left)
    for name, color in zip(series, COLORS, strict=False):
        drawing.rectangle(key_x, 14, 12, 12, color)
        drawing.text(key_x + 18, 24, name)
        key_x += 40 + 6.6 * len(name)
    for tick in range(math.ceil(most / step) + 1):
        x = left + tick * step * scale
        drawing.line([(x, top - 6), (x, height - 34)], RULE)
        drawing.text(x, height - 18, f"{tick * step:g}", anchor="middle", color=MUTED)
    drawing.text(left + (760 - left - right) / 2, height - 3, unit, anchor="middle", color=MUTED)
    y = float(top)
    for label, of_group in groups:
        drawing.text(left - 10, y + len(of_group) * thick / 2 + 4, label, anchor="end")
        for name, row in of_group:
            value = row["value"]
            color = COLORS[series.index(name)]
            if value is None:
                drawing.text(left + 6, y + thick - 4, "none keeps it", color=MUTED)
            else:
                drawing.rectangle(left, y + 1, value * scale, thick - 2, color)
                for found in row["by_seed"]:
                    drawing.dot(left + found * scale, y + thick / 2, INK, 2.5)
                ends = [value, *row["by_seed"]]
                drawing.text(left + max(ends) * scale + 8, y + thick - 4, f"{value:.3g}", color=MUTED)
            y += thick
        y += gap
    return drawing.svg()


def curves(title: str, panels: list[Result], x_title: str) -> str:
    """Panels beside each other, each with a curve a series on a logarithmic axis, its intervals and a limit.

    Args:
        panels: `title`, `limit` and `series`: for each name its points (x, y, low, high).
    """
    width, height, top, bottom = 760, 320, 52, 44
    drawing = Drawing(width, height, title)
    key_x = 60.0
    for name, color in zip(panels[0]["series"], COLORS, strict=False):
        drawing.line([(key_x, 20), (key_x + 22, 20)], color, width=2)
        drawing.text(key_x + 28, 24, name)
        key_x += 50 + 6.6 * len(name)
    inner = (width - 60) / len(panels) - 60
    for number, panel in enumerate(panels):
        left = 60 + number * (inner + 60)
        points = [point for of_name in panel["series"].values() for point in of_name]
        low = 10 ** math.floor(math.log10(min(y for _, y, *_ in points)))
        high = 10 ** math.ceil(math.log10(max(max(y for _, y, *_ in points), panel["limit"])))
        scale = inner / max(x for x, *_ in points)

        def at(
            x: float, y: float, left: float = left, scale: float = scale, low: float = low, high: float = high
        ) -> tuple[float, float]:
            share = (math.log10(min(high, max(low, y))) - math.log10(low)) / (math.log10(high) - math.log10(low))
            return left + x * scale, height - bottom - share * (height - top - bottom)

        drawing.text(left, 44, panel["title"])
        for exponent in range(round(math.log10(low)), round(math.log10(high)) + 1):
            y = at(0, 10**exponent)[1]
            drawing.line([(left, y), (left + inner, y)], RULE)
            words = f"{10**exponent:g} s" if exponent >= 0 else f"{10 ** (exponent + 3):g} ms"
            drawing.text(left - 6, y + 4, words, anchor="end", color=MUTED)
        for x in sorted({x for x, *_ in points}):
            drawing.text(at(x, low)[0], height - bottom + 18, f"{x:g}", anchor="middle", color=MUTED)
        drawing.text(left + inner / 2, height - 6, x_title, anchor="middle", color=MUTED)
        limit_y = at(0, panel["limit"])[1]
        drawing.line([(left, limit_y), (left + inner, limit_y)], LIMIT, dash="5 4")
        for (_, of_name), color in zip(panel["series"].items(), COLORS, strict=False):
            drawing.line([at(x, y) for x, y, *_ in of_name], color, width=2)
            for x, y, least, greatest in of_name:
                drawing.line([at(x, least), at(x, greatest)], color)
                drawing.dot(*at(x, y), color)
    return drawing.svg()


def nice_step(most: float) -> float:
    """A round distance between ticks, of which four to eight reach `most`."""
    power = 10 ** math.floor(math.log10(most))
    return next(step for step in (power / 5, power / 2, power, 2 * power) if most / step <= 8)
