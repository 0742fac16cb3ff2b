"""Tables of a page, as HTML; all that comes from a record is escaped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any

from twinserve.reports.runs import Run, same_trace
from twinserve.reports.terms import sorter, term
from twinserve.reports.text import flat, number, percent, plain, time_unit
from twinserve.traces.runs.compare import STATISTICS, Comparison, compare, differ, value_of

_LATENCIES = (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("itl_s", "ITL"), ("e2e_s", "End to end"))
_TOTALS = (
    ("output_tok_s", term("output tokens/s", "Tokens / s")),
    ("total_tok_s", term("all tokens/s", "Tokens / s")),
    ("duration_s", "duration, s"),
    ("cached_tokens", term("cached prompt tokens", "Cached")),
    ("preemptions", term("preemp&shy;tions", "Preemptions")),
    ("device_wait_share", term("device waits", "Device waits")),
    ("steps", term("steps", "Step")),
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
        metrics = [f"{name}.{statistic}" for statistic in STATISTICS]

        def shown(run: Run, metric: str, scale: float = scale) -> str:
            value = value_of(run.summary, metric)
            return number(None if value is None else value * scale)

        bodies.append(_metric_rows(f"{term(title, title)}, {unit}", metrics, runs, errors, shown))
    return metric_table(["latency", *([""] if len(runs) > 1 else []), *STATISTICS], bodies)


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


def sortable_table(heads: Iterable[tuple[str, str | None]], rows: Iterable[list[tuple[Any, str]]]) -> str:
    """A table that sorts by a column at a click on its head; the first column names the row.

    Args:
        heads: of each column what it says, as HTML, and which definition it tells.
        rows: of each cell the value by which it sorts, and its text, which is escaped here.
    """
    head = "".join(f'<th scope="col">{sorter(*one)}</th>' for one in heads)
    body = "".join(f"<tr>{''.join(_sortable_cell(*cell, at) for at, cell in enumerate(row))}</tr>" for row in rows)
    table = f'<table class="metrics sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _sortable_cell(value: Any, text: str, column: int) -> str:
    kind = "td" if column else 'th scope="row"'
    said = f' data-value="{escape(str(value))}"' if isinstance(value, (int, float)) else ""
    if column and isinstance(value, str):
        said = ' class="words"'
    return f"<{kind}{said}>{escape(text)}</{kind.split()[0]}>"


def key(run: Run) -> str:
    """A piece of the run's line, as the figures have it."""
    line = "solid" if run.style.dash == "solid" else "dashed"
    return f'<span class="key {run.world}" style="border-top: 3px {line} {run.style.full}"></span>'


def difference_table(runs: list[Run], told: Mapping[str, list[str]]) -> str:
    """What runs differ in besides their names: a row each of `told`, whose texts are escaped here."""
    head = "".join(f'<th scope="col">{key(run)}{run.text}</th>' for run in runs)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(text)}</td>" for text in texts)}</tr>'
        for name, texts in told.items()
    )
    return (
        f'<div class="scroll"><table class="facts"><thead><tr><th scope="col">differs</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _metric_rows(
    title: str | None, metrics: list[str], runs: list[Run], errors: Errors, shown: Callable[[Run, str], str]
) -> str:
    """A table body; its first column holds `title`, its next one the runs where there are several or no title."""
    rows = []
    for run in runs:
        cells = "".join(_value_cell(run, metric, shown(run, metric)) for metric in metrics)
        rows.append((f'<th scope="row">{key(run)}{run.text}</th>', "", cells))
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
    return f'<td data-metric="{metric}" data-run="{run.text}" data-value="{value}">{text}</td>'


def _error_cell(run: Run, row: Comparison) -> str:
    return (
        f'<td data-metric="{row.metric}" data-error-of="{run.text}" data-value="{row.error}">'
        f"{percent(row.error, signed=True)}</td>"
    )


def _facts_table(kind: str, runs: list[Run], columns: list[Mapping[str, Any]]) -> str:
    rows = []
    for name, values in _joined(columns).items():
        marked = ' class="differs"' if _differ(values) else ""
        cells = "".join(f"<td>{_fact(value)}</td>" for value in values)
        rows.append(f'<tr{marked}><th scope="row">{escape(name)}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{key(run)}{run.text}</th>' for run in runs)
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


def transforms_of(run: Run) -> str:
    """A run's transforms of its trace, each with its parameters; "not recorded" where the record does not say."""
    trace = run.facts.get("trace")
    log = trace.get("transforms") if isinstance(trace, dict) else None
    if not isinstance(log, list):
        return "not recorded"
    known = [entry for entry in log if isinstance(entry, dict) and {"transform", "parameters"} <= entry.keys()]
    return "; ".join(f"{plain(one['transform'])} ({_listed(one['parameters'])})" for one in known) or "none"


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
