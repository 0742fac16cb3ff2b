"""What came of the drafts of speculative runs."""

from __future__ import annotations

from typing import Any

from twinserve.reports.drawing import Figure, base_axis, base_layout, said_of
from twinserve.reports.runs import Run
from twinserve.reports.tables import key, metric_table
from twinserve.reports.terms import term
from twinserve.reports.text import number, percent
from twinserve.traces.runs.compare import value_of

_COLUMNS = (
    ("drafts", term("rows with drafts", "Rows with drafts")),
    ("tokens_per_step", term("tokens a step", "Tokens a step")),
    ("draft_tokens", term("drafted tokens", "Drafted")),
    ("accepted_tokens", term("accepted", "Accepted")),
    ("wasted_tokens", term("wasted", "Wasted")),
    ("acceptance_rate", "share accepted"),
)


def drafting_runs(runs: list[Run]) -> list[Run]:
    """Those whose rows had drafts."""
    return [run for run in runs if run.summary.get("speculation")]


def drafts_table(runs: list[Run]) -> str:
    """What was drafted, accepted and wasted, and what a row with drafts gave: a row for each of `drafting_runs`."""
    rows = []
    for run in runs:
        cells = "".join(_cell(run, name) for name, _ in _COLUMNS)
        rows.append(f'<tr><th scope="row">{key(run)}{run.text}</th>{cells}</tr>')
    return metric_table(["run", *(title for _, title in _COLUMNS)], [f"<tbody>{''.join(rows)}</tbody>"])


def _cell(run: Run, name: str) -> str:
    metric = f"speculation.{name}"
    value = value_of(run.summary, metric)
    text = percent(value) if name == "acceptance_rate" else number(value)
    return f'<td data-metric="{metric}" data-run="{run.text}" data-value="{value}">{text}</td>'


def acceptance_figure(runs: list[Run]) -> Figure:
    """How often the draft at each position was right, in each of `drafting_runs`."""
    shares = {run.label: run.summary["speculation"]["acceptance_by_position"] for run in runs}
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": run.text,
            "x": [*range(1, len(shares[run.label]) + 1)],
            "y": [100 * share for share in shares[run.label]],
            "line": {"color": run.style.full, "dash": run.style.dash, "width": 2},
            "marker": {"color": run.style.full, "symbol": run.style.symbol, "size": 8},
            "hovertemplate": f"draft %{{x}}: %{{y:.1f}}%<extra>{run.text}</extra>",
            "showlegend": len(runs) > 1,
        }
        for run in runs
    ]
    layout = base_layout(
        300,
        xaxis=base_axis("position of the draft in its row", dtick=1),
        yaxis=base_axis("rows in which it was accepted (%)", range=[0, 101]),
        hovermode="closest",
    )
    caption = "Look at how fast it falls: a draft that is seldom right is mostly computed in vain."
    notes = [said_of(run, runs, f"{', '.join(map(percent, shares[run.label]))}.", ": ") for run in runs]
    return Figure("acceptance", "Acceptance by position", caption, data, layout, notes)
