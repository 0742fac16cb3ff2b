"""The report: one self-contained HTML page from run records."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from twinserve.reports.distributions import LATENCIES, latency_figure, step_figures
from twinserve.reports.gantt import request_figure
from twinserve.reports.html import drawn, html_page, section, side_by_side
from twinserve.reports.runs import Run, runs_of, same_trace
from twinserve.reports.tables import (
    Errors,
    errors_of,
    facts_table,
    latency_table,
    settings_table,
    totals_table,
)
from twinserve.reports.text import count, percent
from twinserve.reports.timelines import batch_figure, kv_figure
from twinserve.settings.files import refuse_existing, write_whole
from twinserve.traces.runs.compare import differing_settings
from twinserve.traces.runs.record import RunRecord

_NAMES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "itl_s": "ITL", "e2e_s": "end-to-end latency"}

_DEFINITIONS = (
    ("TTFT", "time to first token: first token − arrival"),
    ("TPOT", "time per output token: (finish − first token) / (output tokens − 1), of answers longer than one token"),
    ("ITL", "inter-token latency: the gaps between successive tokens of a request"),
    ("End to end", "finish − arrival"),
    ("Tokens / s", "tokens of the finished requests / duration, which lasts from the first arrival to the last finish"),
    ("Device waits", "the share of the duration in which the device had work but stood idle, waiting for the host"),
    ("Error", "(simulated − real) / real"),
    ("Refused", "requests that could never be served: too long for the context or for the pool"),
    ("Shortened", "answers that ended with fewer tokens than they asked for, because of the context's length"),
    ("Capped", "requests whose prompt or answer was cut to a cap before the run"),
    ("Dropped", "requests of the trace that were not replayed"),
)


def write_report(records: list[RunRecord], out: Path) -> None:
    """Write a page that shows runs to a person: numbers, batches, KV blocks, latencies, requests, settings.

    The page holds all that it needs and opens from a file. The same records give the same bytes.

    Args:
        records: one run, or several to set side by side; a simulation is compared with the first real run among them
            that replayed the same trace.
        out: the HTML file to write; its folder is made where there is none.

    Raises:
        InputError: there is no record, or `out` exists or cannot be written.
    """
    out = Path(out)
    refuse_existing(out)
    write_whole(out, _page(runs_of(records)))


def _page(runs: list[Run]) -> str:
    return html_page(", ".join(run.name for run in runs), _sections(runs))


def _sections(runs: list[Run]) -> Iterable[str]:
    """The page from its first line to its last."""
    errors = errors_of(runs)
    yield f"<header>\n<h1>{''.join(_headline(run) for run in runs)}</h1>\n{_remarks(runs, errors)}</header>\n"
    yield section("Summary", _summary(runs, errors))
    latencies = (latency_figure(runs, metric) for metric in LATENCIES)
    yield section("Latency distributions", f"{_handling()}{side_by_side(latencies)}")
    yield section("Batch over time", drawn(batch_figure(runs)))
    yield section("KV blocks and preemptions", drawn(kv_figure(runs)))
    groups = same_trace(runs)
    for number, group in enumerate(groups):
        whose = "" if len(groups) == 1 else f": {', '.join(run.label for run in group)}"
        yield section(f"Requests over time{whose}", drawn(request_figure(group, number)))
    yield section("Step durations", side_by_side(step_figures(runs)))
    yield section("Settings and facts", _folded(runs))


# --- what was run ---


def _headline(run: Run) -> str:
    """What was run, on what, with what, and what became of the requests; every count is said, 0 too."""
    summary = run.summary
    counts = [f"{summary['finished']:,} finished"]
    counts += [
        _counted(summary.get(what, 0), what) for what in ("refused", "shortened", "capped", "dropped", "aborted")
    ]
    unfinished = summary["requests"] - summary["finished"] - summary["refused"] - summary["aborted"]
    if unfinished:
        counts.append(_counted(unfinished, "unfinished"))
    trace = run.facts.get("trace")
    path = trace.get("path") if isinstance(trace, dict) else None
    replayed = f"trace {escape(str(path))}" if path else "an unrecorded trace"
    return (
        f'<span class="run"><span class="key {run.world}" style="{_key(run)}"></span>'
        f'<strong class="{run.world}">{run.label}</strong> {escape(run.name)}: {escape(_executor(run))}; '
        f"{replayed}; {count(summary['requests'], 'request')}: {', '.join(counts)}.</span>"
    )


def _executor(run: Run) -> str:
    """What executed the steps, in words."""
    facts, device = run.facts, run.record.run.get("device")
    if run.world == "real":
        model = facts.get("model")
        name = model.get("name") if isinstance(model, dict) else model
        return f"served by {name or 'an unrecorded model'} on {device or 'an unrecorded device'}"
    latency = facts.get("latency")
    name = latency.get("name") if isinstance(latency, dict) else None
    text = f"simulated with latency model {name}" if name else "simulated with an unrecorded latency model"
    return text if not device or (name and str(device).endswith(str(name))) else f"{text} on {device}"


def _key(run: Run) -> str:
    """The run's line style, as the figures have it."""
    kind = "solid" if run.style.dash == "solid" else "dashed"
    return f"border-top: 3px {kind} {run.style.full}"


def _counted(how_many: int, what: str) -> str:
    text = f"{how_many:,} {what}"
    return f"<mark>{text}</mark>" if how_many else text


def _remarks(runs: list[Run], errors: Errors) -> str:
    """What keeps runs from being compared at sight."""
    remarks = []
    if len(runs) > 1:
        names = differing_settings([run.record for run in runs])
        listed = escape(", ".join(names))
        differing = f"The runs differ in {count(len(names), 'setting')}: {listed}."
        remarks.append(differing if names else "The runs have equal settings.")
    if {run.world for run in runs} == {"real", "sim"} and not errors:
        remarks.append("No errors are given: the records do not say that these runs replayed the same trace.")
    return "".join(f'<p class="remark">{remark}</p>\n' for remark in remarks)


# --- content ---


def _summary(runs: list[Run], errors: Errors) -> str:
    caption = "Look at the distance from p50 to p99: it is what the unluckiest requests pay."
    if errors:
        caption = f"Look at the error rows, (simulated − real) / real: {_largest(errors)}."
    terms = "".join(f"<dt>{term}</dt><dd>{text}</dd>" for term, text in _DEFINITIONS)
    return (
        f'{latency_table(runs, errors)}\n{totals_table(runs, errors)}\n<p class="caption">{caption}</p>\n'
        f"<details><summary>What the numbers mean</summary><dl>{terms}</dl></details>\n"
    )


def _largest(errors: Errors) -> str:
    """The largest error among the latencies, in words."""
    found = [
        (abs(row.error), row, label)
        for label, rows in errors.items()
        for row in rows.values()
        if row.error is not None and row.metric.partition(".")[0] in _NAMES
    ]
    if not found:
        return "none of the latencies has one"
    _, row, label = max(found, key=lambda item: item[0])
    name, _, statistic = row.metric.partition(".")
    whose = f" ({label})" if len(errors) > 1 else ""
    return f"the largest among the latencies is {percent(row.error, signed=True)}, in {_NAMES[name]} {statistic}{whose}"


def _handling() -> str:
    text = "Drag across a figure to zoom in, double-click to zoom out; a click on a name in a legend hides it."
    return f'<p class="handling note">{text}</p>\n'


def _folded(runs: list[Run]) -> str:
    total = len({name for run in runs for name in run.settings})
    if len(runs) > 1:
        differing = len(differing_settings([run.record for run in runs]))
        said = f", {differing} differing" if differing else ", the same in all runs"
        hint = "Look for marked rows: there the runs differ."
    else:
        said, hint = "", "Look here for what it takes to run this again."
    parts = (
        (f"{count(total, 'setting')}{said}", settings_table(runs)),
        ("Facts: device, versions, trace and its transforms", facts_table(runs)),
    )
    folded = "".join(f"<details><summary>{title}</summary>\n{table}\n</details>\n" for title, table in parts)
    return f'{folded}<p class="caption">{hint}</p>\n'
