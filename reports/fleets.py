"""A fleet by replica: what each had to do over time, when it was down, and what came of its requests."""

from __future__ import annotations

from typing import Any

import numpy as np

from twinserve.reports.drawing import MUTED, Figure, Trace, axis_names, base_axis, stacked_layout, time_axis
from twinserve.reports.runs import Part, Run
from twinserve.reports.tables import sortable_table
from twinserve.reports.text import number, percent
from twinserve.reports.thin import GROUPS, binned
from twinserve.traces.runs.tables import LATENCY_NS

_LANE_PX, _MOST_PX = 18, 420
_VIEWS = (("running", "running"), ("waiting", "waiting"), ("used_blocks", "KV blocks"))


def replica_figure(run: Run, number_of_run: int) -> Figure | None:
    """Requests running and waiting, and KV blocks in use, by replica and over time, with outages; None of no fleet."""
    if not run.replicas or not run.has_decisions:
        return None
    replicas = sorted({part.replica for part in run.parts} | {replica for replica, _, _ in run.outages})
    end_s = max(float(part.over_time("running")[0].max(initial=0.0)) for part in run.parts)
    height = min(_MOST_PX, max(60, _LANE_PX * len(replicas)))
    data: list[Trace] = []
    panels, shapes = [], []
    for axis, (total, title) in zip(axis_names(len(_VIEWS)), _VIEWS, strict=True):
        lanes = [_lane([part for part in run.parts if part.replica == one], total, end_s) for one in replicas]
        most = max(1.0, max(float(lane.max(initial=0.0)) for lane in lanes))
        ticks = {"tickmode": "linear", "dtick": max(1, -(-len(replicas) // 12)), "autorange": "reversed"}
        panels.append((height, base_axis(f"replica<br>{title}", showgrid=False, **ticks)))
        data.append(
            {
                "type": "heatmap",
                "x": (np.arange(GROUPS) + 0.5) * end_s / GROUPS,
                "y": replicas,
                "z": np.round(np.array(lanes), 1).tolist(),
                "zmin": 0,
                "zmax": most,
                "yaxis": axis,
                "colorscale": [[0, run.style.pale.replace("0.22", "0.04")], [1, run.style.full]],
                "colorbar": {
                    "thickness": 10,
                    "len": 1 / len(_VIEWS) * 0.9,
                    "y": 1 - (len(panels) - 0.5) / len(_VIEWS),
                    "outlinewidth": 0,
                    "tickfont": {"size": 10, "color": MUTED},
                },
                "hovertemplate": f"replica %{{y}}, %{{x:.4~g}} s: %{{z:,.4~g}} {title} in the mean<extra></extra>",
                "showlegend": False,
            }
        )
        shapes += [_outage(axis, *outage, end_s) for outage in run.outages]
    layout = stacked_layout(panels, time_axis() | {"range": [0, end_s]}) | {"shapes": shapes, "showlegend": False}
    notes = []
    if run.outages:
        said = [_down(*outage) for outage in run.outages]
        why = "was down, or not there" if "leases" in run.summary else "was down"
        notes.append(f"Crossed out, as it {why}: {', '.join(said)}.")
    caption = "Look for lanes stronger than the others: there the router sent more than it could spread."
    return Figure(f"replicas-{number_of_run}", "", caption, data, layout, notes, is_linked=True)


def _lane(parts: list[Part], total: str, end_s: float) -> np.ndarray:
    """The mean of a replica's total in equal stretches of time."""
    lane = np.zeros(GROUPS)
    for part in parts:
        if part.record.steps:
            lane += binned(*part.over_time(total), 0.0, end_s, GROUPS).mean
    return lane


def _down(replica: int, begin_s: float, end_s: float | None) -> str:
    return f"replica {replica} from {begin_s:.4g} s {'on' if end_s is None else f'to {end_s:.4g} s'}"


def _outage(axis: str, replica: int, begin_s: float, end_s: float | None, last_s: float) -> dict[str, Any]:
    """A lane crossed out while its replica was down."""
    until_s = last_s if end_s is None else end_s
    low, high = replica - 0.5, replica + 0.5
    corners = [(begin_s, low), (until_s, low), (until_s, high), (begin_s, high), (begin_s, low), (until_s, high)]
    path = "M " + " L ".join(f"{x},{y}" for x, y in corners) + f" M {begin_s},{high} L {until_s},{low}"
    line = {"color": MUTED, "width": 1}
    return {"type": "path", "path": path, "xref": "x", "yref": axis, "line": line, "name": "down"}


def replica_table(run: Run) -> str:
    """What each replica served: a row each, sortable."""
    served: dict[int, list[dict[str, Any]]] = {part.replica: [] for part in run.parts}
    for row in run.finished:
        served[row["replica"]].append(row)
    heads: list[tuple[str, str | None]] = [
        ("replica", None),
        ("finished", None),
        ("share", None),
        ("prompt tokens", None),
        ("cached", "Cached"),
        ("output tokens", None),
        ("mean TTFT, ms", "TTFT"),
        ("p99 TTFT, ms", "TTFT"),
        ("p99 TPOT, ms", "TPOT"),
        ("preemptions", "Preemptions"),
        ("steps", "Step"),
        ("busy", None),
        ("down, s", None),
    ]
    last_s = max(float((part.steps.start_s + part.steps.duration_s).max(initial=0.0)) for part in run.parts)
    rows = []
    for replica, requests in sorted(served.items()):
        parts = [part for part in run.parts if part.replica == replica]
        ttft, tpot = (
            np.array([ns for row in requests if (ns := LATENCY_NS[name](row)) is not None]) / 1e6
            for name in ("ttft_s", "tpot_s")
        )
        prompt, cached, output = (
            sum(row[name] for row in requests) for name in ("prompt_tokens", "cached_tokens", "output_tokens")
        )
        down = [(begin, last_s if end is None else end) for one, begin, end in run.outages if one == replica]
        busy_s = sum(float(part.steps.duration_s.sum()) for part in parts)
        cells: list[tuple[float | int | None, str]] = [
            (replica, str(replica)),
            (len(requests), f"{len(requests):,}"),
            _share(len(requests), len(run.finished)),
            (prompt, f"{prompt:,}"),
            _share(cached, prompt),
            (output, f"{output:,}"),
            _number(float(ttft.mean()) if len(ttft) else None),
            _number(float(np.percentile(ttft, 99)) if len(ttft) else None),
            _number(float(np.percentile(tpot, 99)) if len(tpot) else None),
            _number(sum(part.record.run["summary"]["preemptions"] for part in parts)),
            _number(sum(len(part.record.steps) for part in parts)),
            _share(busy_s, last_s),
            _number(float(sum(end - begin for begin, end in down))),
        ]
        rows.append(cells)
    return sortable_table(heads, rows)


def _number(value: float | int | None) -> tuple[float | int | None, str]:
    return value, number(value)


def _share(part: float, whole: float) -> tuple[float | None, str]:
    share = part / whole if whole else None
    return share, percent(share)
