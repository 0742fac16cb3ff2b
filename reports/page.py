"""The report: one self-contained HTML page from run records."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from twinserve.reports.asked import Asked
from twinserve.reports.distributions import LATENCIES, latency_figure, step_figures
from twinserve.reports.drafts import acceptance_figure, drafting_runs, drafts_table
from twinserve.reports.finder import finder
from twinserve.reports.fleets import replica_figure, replica_table
from twinserve.reports.gantt import request_figure
from twinserve.reports.html import contents, drawn, html_page, section, side_by_side
from twinserve.reports.kv import kv_figure
from twinserve.reports.load import load_figure, rate_of
from twinserve.reports.replayed import Replayed, replayed
from twinserve.reports.residuals import residual_figure
from twinserve.reports.runs import Run, runs_of, same_trace
from twinserve.reports.tables import (
    Errors,
    difference_table,
    errors_of,
    facts_table,
    key,
    latency_table,
    settings_table,
    totals_table,
    transforms_of,
)
from twinserve.reports.terms import definitions
from twinserve.reports.text import count, duration, number, percent, plain, share_of_limit
from twinserve.reports.timelines import batch_figure
from twinserve.reports.waits import waits_tables
from twinserve.settings.files import refuse_existing, write_whole
from twinserve.traces.runs.compare import differing_settings, name_of, value_of
from twinserve.traces.runs.record import RunRecord

Watch = Callable[[str, int | None], AbstractContextManager[Any]]
"""What shows that a page is being made; see `write_report`."""

_NAMES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "itl_s": "ITL", "e2e_s": "end-to-end latency"}


def write_report(
    records: list[RunRecord], out: Path, *, asked: Asked | None = None, watch: Watch = lambda *_: nullcontext()
) -> None:
    """Write a page that shows runs to a person: what was asked and what came of it, numbers, batches, KV blocks,
    latencies, requests, settings. Each run is decided again from its record, and the page says whether that is exact.

    The page holds all that it needs and opens from a file. The same records give the same bytes.

    Args:
        records: one run, or several to set side by side; a simulation is compared with the first real run among them
            that replayed the same trace.
        out: the HTML file to write; its folder is made where there is none.
        asked: the objective by which the page judges the runs.
        watch: entered for each part of the work, told what it is in words and how many decisions it makes again, if
            it does; what it gives listens to them.

    Raises:
        InputError: there is no record, or `out` exists or cannot be written.
    """
    out = Path(out)
    refuse_existing(out)
    write_whole(out, _page(runs_of(records), asked, watch))


def _page(runs: list[Run], asked: Asked | None, watch: Watch) -> str:
    again = []
    for run in runs:
        with watch(f"deciding {run.label} again", sum(len(part.record.steps) for part in run.parts)) as listener:
            again.append(replayed(run, listener))
    runs = [replace(run, cached=found.cached) for run, found in zip(runs, again, strict=True)]
    with watch("drawing", None):
        sections = list(_sections(runs, asked, again))
    head = f"<header>\n{_header(runs, asked, again)}</header>\n{contents(title for title, _ in sections)}"
    return html_page(_title(runs), [head, *(section(title, content) for title, content in sections)])


def _sections(runs: list[Run], asked: Asked | None, again: list[Replayed]) -> Iterable[tuple[str, str]]:
    """The page below its head: titles, which are HTML, and what stands below them."""
    errors = errors_of(runs)
    yield "Summary", _summary(runs, errors, asked)
    yield "Load and goodput over time" if asked else "Load over time", f"{_handling()}{drawn(load_figure(runs, asked))}"
    latencies = (latency_figure(runs, metric, asked) for metric in LATENCIES)
    yield "Latency distributions", side_by_side(latencies)
    yield "Batch over time", drawn(batch_figure(runs))
    yield "KV blocks, prefix hits and preemptions", drawn(kv_figure(runs))
    if drafting := drafting_runs(runs):
        yield "Drafts", f"{drafts_table(drafting)}\n{drawn(acceptance_figure(drafting))}"
    for place, run in enumerate(runs):
        if run.replicas:
            whose = "" if len(runs) == 1 else f": {run.text}"
            figure = replica_figure(run, place)
            yield f"Replicas{whose}", f"{replica_table(run)}\n{drawn(figure)}"
    for run, found in zip(runs, again, strict=True):
        yield f"Why requests waited{'' if len(runs) == 1 else f': {run.text}'}", waits_tables(run, found.waits)
    groups = same_trace(runs)
    yield "Find requests", finder(runs, groups, asked)
    for place, group in enumerate(groups):
        whose = "" if len(groups) == 1 else f": {', '.join(run.text for run in group)}"
        figure = request_figure(group, place, [runs.index(run) for run in group])
        yield f"Requests over time{whose}", drawn(figure)
    figures = list(step_figures(runs))
    for place, group in enumerate(groups):
        sims = [run for run in group if run.world == "sim"]
        if group[0].world == "real" and sims and (residuals := residual_figure(group[0], sims, place)) is not None:
            figures.append(residuals)
    yield "Step durations", side_by_side(figures)
    yield "Settings and facts", _folded(runs)


# --- what was run, and what came of it ---


def _title(runs: list[Run]) -> str:
    names = [run.label for run in runs]
    if len(names) > 4:
        names = [*names[:3], f"{len(names) - 3} more"]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _header(runs: list[Run], asked: Asked | None, again: list[Replayed]) -> str:
    """The first screen, from what was asked to how the page is made again."""
    when = list(dict.fromkeys(filter(None, map(_written, runs))))
    versions = list(dict.fromkeys(str(v) for run in runs if (v := _versions(run).get("twinserve"))))
    made = [f"recorded {' to '.join(dict.fromkeys((min(when), max(when))))}"] if when else []
    made += [f"twinserve {', '.join(versions)}"] if versions else []
    lines = [f"<h1>{escape(_title(runs))}</h1>\n", f'<p class="note">{escape("; ".join(made))}</p>\n' if made else ""]
    lines.append(_verdict(runs, asked))
    for run, found in zip(runs, again, strict=True):
        lines.append(f'<p class="run">{_headline(run)} <span class="note replay">{escape(found.words)}</span></p>\n')
    lines.append(_remarks(runs, errors_of(runs)))
    lines.append(f'<p class="again note">Made by <code>{escape(_command(runs, asked))}</code></p>\n')
    return "".join(lines)


def _verdict(runs: list[Run], asked: Asked | None) -> str:
    """Whether each run keeps what was asked for, and by how much."""
    if asked is None:
        return (
            '<p class="asked">No objective was given, so nothing is judged: <code>--objective "p99 TTFT &lt;= 1 s and '
            'p99 TPOT &lt;= 50 ms"</code> adds a verdict, attainment and goodput.</p>\n'
        )
    verdicts = []
    for run in runs:
        missed, found = asked.missed_by(run), asked.attainment(run)
        word = '<strong class="misses">✗ misses</strong>' if missed else '<strong class="keeps">✓ keeps it</strong>'
        # What a limit on a metric misses is said with the metric.
        others = [what for what in missed if not asked.terms_s or "<=" not in what]
        details = [escape(", ".join(others))] if others else []
        for metric, limit_s in asked.terms_s.items():
            if (value := value_of(run.summary, metric)) is not None:
                details.append(f"{name_of(metric)} {duration(value)}, {share_of_limit(value / limit_s)}")
        details.append(
            f'<span data-metric="attainment.share" data-run="{run.text}" data-value="{found["share"]}">'
            f"{percent(found['share'])}</span> of requests within the limits, goodput "
            f'<span data-metric="attainment.goodput_req_s" data-run="{run.text}" data-value="{found["goodput_req_s"]}">'
            f"{number(found['goodput_req_s'])}</span> requests/s"
        )
        verdicts.append(f"<li>{key(run)}<b>{run.text}</b> {word} {'; '.join(details)}.</li>\n")
    return f'<p class="asked">Asked: <b>{escape(asked.text)}</b></p>\n<ul class="verdicts">\n{"".join(verdicts)}</ul>\n'


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
    if summary.get("retries"):
        counts.append(_counted(summary["retries"], "sent again"))
    return (
        f"{key(run)}<b>{run.text}</b>: {escape(_executor(run))}; trace {escape(_trace(run))}; {escape(rate_of(run))}; "
        f"{count(summary['requests'], 'request')}: {', '.join(counts)}."
    )


def _trace(run: Run) -> str:
    trace = run.facts.get("trace")
    path = trace.get("path") if isinstance(trace, dict) else None
    return str(path) if path else "unrecorded"


def _executor(run: Run) -> str:
    """What executed the steps, in words."""
    facts, device = run.facts, run.record.run.get("device")
    if run.world == "real":
        model = facts.get("model")
        name = model.get("name") if isinstance(model, dict) else model
        return f"served by {name or 'an unrecorded model'} on {device or 'an unrecorded device'}"
    name = _latency(run)
    text = f"simulated with latency model {name}" if name else "simulated with an unrecorded latency model"
    if run.fleet:
        return f"{text} on {count(run.num_replicas, 'replica')} behind {_router(run)}"
    return text if not device or (name and str(device).endswith(str(name))) else f"{text} on {device}"


def _latency(run: Run) -> str | None:
    """The names of a simulation's latency models; None where the record says none."""
    models = [run.facts.get("latency")]
    if isinstance(replicas := run.fleet.get("replicas"), list):
        models = [replica.get("latency") for replica in replicas if isinstance(replica, dict)]
    names = [str(model["name"]) for model in models if isinstance(model, dict) and model.get("name")]
    return " and ".join(dict.fromkeys(names)) or None


def _router(run: Run) -> str:
    router = run.fleet.get("router")
    if not isinstance(router, dict):
        return "none"
    others = ", ".join(f"{name} {plain(value)}" for name, value in router.items() if name != "name")
    return f"{plain(router.get('name'))}{f' ({others})' if others else ''}"


def _written(run: Run) -> str | None:
    """The date of the record's run.json, in UTC."""
    try:
        seconds = (run.record.path / "run.json").stat().st_mtime
    except (OSError, ValueError):
        return None
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _versions(run: Run) -> dict[str, Any]:
    versions = run.record.run.get("versions")
    return versions if isinstance(versions, dict) else {}


def _command(runs: list[Run], asked: Asked | None) -> str:
    """What writes this page again."""
    objective = ["--objective", asked.text] if asked else []
    return shlex.join(["twinserve", "report", *(str(run.record.path) for run in runs), *objective])


def _counted(how_many: int, what: str) -> str:
    text = f"{how_many:,} {what}"
    return f"<mark>{text}</mark>" if how_many else text


def _remarks(runs: list[Run], errors: Errors) -> str:
    """What the runs differ in, and what keeps them from being compared at sight."""
    parts = []
    if len(runs) > 1:
        told = differences(runs)
        said = f"The runs differ in {', '.join(told)}." if told else "The runs have equal settings, facts and loads."
        parts.append(f'<p class="remark">{escape(said)}</p>\n{difference_table(runs, told) if told else ""}')
    if {run.world for run in runs} == {"real", "sim"} and not errors:
        said = "No errors are given: the records do not say that these runs replayed the same trace."
        parts.append(f'<p class="remark">{said}</p>\n')
    return "".join(parts)


def differences(runs: list[Run]) -> dict[str, list[str]]:
    """What the runs differ in, each as text by run: where and what they ran, their load, and every setting."""
    every: dict[str, list[str]] = {
        "world": [run.world for run in runs],
        "trace": [_trace(run) for run in runs],
        "content of the trace": [_sha256(run)[:12] for run in runs],
        "transforms": [transforms_of(run) for run in runs],
        "load": [rate_of(run) for run in runs],
        "latency": [_latency(run) or "–" for run in runs],
        "replicas": [str(run.num_replicas) for run in runs],
        "router": [_router(run) if run.fleet else "none" for run in runs],
        "outages": ["; ".join(_outages(run)) or "none" for run in runs],
        "device": [plain(run.record.run.get("device")) for run in runs],
    }
    if every["content of the trace"].count("") or len(set(every["content of the trace"])) == 1:
        del every["content of the trace"]
    if len({run.world for run in runs}) > 1:
        del every["device"], every["latency"]
    found = {name: texts for name, texts in every.items() if len(set(texts)) > 1}
    for name in differing_settings([run.record for run in runs]):
        found[name] = [plain(run.settings[name]) if name in run.settings else "not recorded" for run in runs]
    return found


def _sha256(run: Run) -> str:
    trace = run.facts.get("trace")
    return str(trace.get("sha256", "")) if isinstance(trace, dict) else ""


def _outages(run: Run) -> list[str]:
    return [f"{one}:{begin:g}:{'' if end is None else f'{end:g}'}" for one, begin, end in run.outages]


# --- content ---


def _summary(runs: list[Run], errors: Errors, asked: Asked | None) -> str:
    caption = "Look at the distance from p50 to p99: it is what the unluckiest requests pay."
    if errors:
        caption = f"Look at the error rows, (simulated − real) / real: {_largest(errors)}."
    drawn_by = "".join(map(_energy, runs))
    return (
        f'{latency_table(runs, errors)}\n{totals_table(runs, errors)}\n{drawn_by}<p class="caption">{caption}</p>\n'
        f"{definitions()}"
    )


def _energy(run: Run) -> str:
    """What a run's devices draw, in a line; nothing where its summary does not say it."""
    found = run.summary.get("energy")
    if not found:
        return ""
    return (
        f'<p class="energy">{key(run)}<b>{run.text}</b>: {number(found["joules_per_output_token"])} J an output token, '
        f"{number(found['joules_per_request'])} J a request; {number(found['watts'])} W, all devices together "
        f"({escape(found['basis'])}).</p>\n"
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
    whose = f" ({escape(label)})" if len(errors) > 1 else ""
    return f"the largest among the latencies is {percent(row.error, signed=True)}, in {_NAMES[name]} {statistic}{whose}"


def _handling() -> str:
    text = (
        "Drag across a figure to zoom in, double-click to zoom out; figures over time go together. "
        "By keyboard: arrows, + and −, 0. A click on a name in a legend hides it."
    )
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
