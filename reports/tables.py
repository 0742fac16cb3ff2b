"""Tables of a page, as HTML; all that comes from a record is escaped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any

from twinserve.reports.runs import Run, same_trace
from twinserve.reports.text import flat, number, percent, plain, time_unit
from twinserve.traces.runs.compare import Comparison, compare, differ, value_of

_STATISTICS = ("mean", "p50", "p90", "p99")
_LATENCIES = (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("itl_s", "ITL"), ("e2e_s", "End to end"))
_TOTALS = (
    ("output_tok_s", "output tokens / s"),
    ("total_tok_s", "all tokens / s"),
    ("duration_s", "duration, s"),
    ("cached_tokens", "cached prompt tokens"),
    ("preemptions", "preemp&shy;tions"),
    ("device_wait_share", "device waits"),
    ("steps", "steps"),
)

Errors = dict[str, dict[str, Comparison]]
"""Comparisons by label of the simulation and by metric."""

_ABSENT = object()


def errors_of(runs: list[Run]) -> Errors:
    """Every simulation compared with the first real run of its trace; those without one are absent."""
    errors: Errors = {}
    for group in same_trace(runs):
        real, others = group[0], group[1:]
        if real.world == "real":
            for run in others:
                if run.world == "sim":
                    errors[run.label] = {row.metric: row for row in compare(run.record, real.record)}
    return errors


def latency_table(runs: list[Run], errors: Errors) -> str:
    """Mean and percentiles of every latency, a row a run and a row of errors below each simulation."""
    bodies = []
    for name, title in _LATENCIES:
        unit, scale = time_unit(max(run.summary[name]["p99"] or 0 for run in runs))
        metrics = [f"{name}.{statistic}" for statistic in _STATISTICS]

        def shown(run: Run, metric: str, scale: float = scale) -> str:
            value = value_of(run.summary, metric)
            return number(None if value is None else value * scale)

        bodies.append(_metric_rows(f"{title}, {unit}", metrics, runs, errors, shown))
    return metric_table(["latency", *([""] if len(runs) > 1 else []), *_STATISTICS], bodies)


def totals_table(runs: list[Run], errors: Errors) -> str:
    """Throughput, cached tokens, preemptions, waits, steps: a row a run, a row of errors below each simulation."""

    def shown(run: Run, metric: str) -> str:
        value, prompt_tokens = value_of(run.summary, metric), run.summary["prompt_tokens"]
        if metric == "cached_tokens" and value and prompt_tokens:
            return f"{number(value)} ({percent(value / prompt_tokens)})"
        return percent(value) if metric == "device_wait_share" else number(value)

    body = _metric_rows(None, [metric for metric, _ in _TOTALS], runs, errors, shown)
    return metric_table(["run", *(title for _, title in _TOTALS)], [body])


def settings_table(runs: list[Run]) -> str:
    """Every setting of every run; rows that differ are marked."""
    return _facts_table("setting", runs, [run.settings for run in runs])


def facts_table(runs: list[Run]) -> str:
    """Where each run came from: device, versions, trace with its transforms, and all else a replay has to know."""
    return _facts_table("fact", runs, [_facts(run) for run in runs])


def metric_table(heads: Iterable[str], bodies: Iterable[str]) -> str:
    """A table of numbers: the words at the head of its columns, and its bodies, all of them HTML."""
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    return f'<div class="scroll"><table class="metrics"><thead><tr>{head}</tr></thead>{"".join(bodies)}</table></div>'


def _metric_rows(
    title: str | None, metrics: list[str], runs: list[Run], errors: Errors, shown: Callable[[Run, str], str]
) -> str:
    """A table body; its first column holds `title`, its next one the runs where there are several or no title."""
    rows = []
    for run in runs:
        cells = "".join(_value_cell(run, metric, shown(run, metric)) for metric in metrics)
        rows.append((f'<th scope="row" class="{run.world}">{run.label}</th>', "", cells))
        if run.label in errors:
            cells = "".join(_error_cell(run, errors[run.label][metric]) for metric in metrics)
            rows.append(('<th scope="row">error</th>', ' class="error"', cells))
    if title is not None:
        stub = f'<th scope="rowgroup" rowspan="{len(rows)}">{title}</th>'
        rows = [(label if len(runs) > 1 else "", kind, cells) for label, kind, cells in rows]
        rows[0] = (stub + rows[0][0], *rows[0][1:])
    return "<tbody>" + "".join(f"<tr{kind}>{label}{cells}</tr>" for label, kind, cells in rows) + "</tbody>"


def _value_cell(run: Run, metric: str, text: str) -> str:
    value = value_of(run.summary, metric)
    return f'<td data-metric="{metric}" data-run="{run.label}" data-value="{value}">{text}</td>'


def _error_cell(run: Run, row: Comparison) -> str:
    return (
        f'<td data-metric="{row.metric}" data-error-of="{run.label}" data-value="{row.error}">'
        f"{percent(row.error, signed=True)}</td>"
    )


def _facts_table(kind: str, runs: list[Run], columns: list[Mapping[str, Any]]) -> str:
    rows = []
    for name, values in _joined(columns).items():
        marked = ' class="differs"' if _differ(values) else ""
        cells = "".join(f"<td>{_fact(value)}</td>" for value in values)
        rows.append(f'<tr{marked}><th scope="row">{escape(name)}</th>{cells}</tr>')
    head = "".join(
        f'<th scope="col"><span class="{run.world}">{run.label}</span> {escape(run.name)}</th>' for run in runs
    )
    return (
        f'<div class="scroll"><table class="facts"><thead><tr><th scope="col">{kind}</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _facts(run: Run) -> dict[str, Any]:
    record = run.record
    device = record.run.get("device")
    own = {} if device is None else {"device": device}
    facts = flat(run.facts)
    if isinstance(facts.get("trace.transforms"), list):
        facts["trace.transforms"] = _transforms(facts["trace.transforms"])
    return own | flat({"versions": record.run.get("versions", {})}) | facts


def _transforms(log: Iterable[Any]) -> str:
    """A trace's transforms in words, each with its parameters and what it changed."""
    texts = []
    for entry in log:
        if not (isinstance(entry, dict) and {"transform", "parameters", "changed"} <= entry.keys()):
            texts.append(plain(entry))
            continue
        given, changed = (_listed(entry[field]) for field in ("parameters", "changed"))
        texts.append(f"{plain(entry['transform'])} ({given}): {changed}")
    return "; ".join(texts) or "no transforms"


def _listed(values: Any) -> str:
    if not isinstance(values, dict):
        return plain(values)
    return ", ".join(f"{name} {plain(value)}" for name, value in values.items()) or "none"


def _joined(columns: list[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The values of every name in any column, in the order in which they come up."""
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name, _ABSENT) for column in columns] for name in names}


def _differ(values: list[Any]) -> bool:
    """Whether the runs that know the value disagree."""
    return differ([value for value in values if value is not _ABSENT])


def _fact(value: Any) -> str:
    return '<span class="absent">not recorded</span>' if value is _ABSENT else escape(plain(value))
