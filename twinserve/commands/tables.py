"""Results as tables for a person."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from twinserve.planning.paired import PairedDifference
from twinserve.planning.upgrade import Change
from twinserve.reports.text import number
from twinserve.settings.errors import printable
from twinserve.sim.intervals import COVERAGE
from twinserve.traces.runs.compare import LATENCIES, STATISTICS, Comparison

if TYPE_CHECKING:
    from twinserve.traces.runs.waits import Waited

_LENGTHS = (*STATISTICS, "max", "total")
"""Statistics of the lengths of a trace."""
_NOTES = {
    "same_instant": "arrive at the instant of the one before",
    "repeated_prompt": "have the prompt of an earlier one",
    "private_prompt": "have prompts of which the length alone is known",
    "one_token_output": "have answers of one token",
    "arrival_not_said": "have no time in the file",
}
"""What readers note of requests, in words."""


def summary_table(summary: dict[str, Any]) -> None:
    """Print a run's summary; what was refused, shortened, capped or dropped comes first."""
    console = _console(100)
    counts = ("requests", "rejected", "finished", "refused", "aborted", "timed_out", "shortened", "capped", "dropped")
    said = (f"{summary[name]} {name.replace('_', ' ')}" for name in counts if name in summary)
    console.print(f"{summary['world']}: {', '.join(said)}")
    table = Table("ms", *STATISTICS)
    for name in LATENCIES:
        table.add_row(name.removesuffix("_s").upper(), *(_ms(summary[name][statistic]) for statistic in STATISTICS))
    console.print(table)
    if limits := summary.get("intervals"):
        spread = Table(f"{COVERAGE:.0%} limits, ms", *STATISTICS)
        for name in LATENCIES:
            pairs = (limits.get(f"{name}.{statistic}") for statistic in STATISTICS)
            spread.add_row(
                name.removesuffix("_s").upper(), *(_range(pair and [1e3 * limit for limit in pair]) for pair in pairs)
            )
        console.print(spread)
        console.print(f"{COVERAGE:.0%} limits of output tokens/s: {_range(limits.get('output_tok_s'))}")
    if found := summary.get("attainment"):
        share = "none came" if found["share"] is None else f"{found['share']:.2%} of requests"
        rates = (
            f"goodput {_number(found['goodput_req_s'])} requests/s, {_number(found['goodput_tok_s'])} output tokens/s"
        )
        console.print(f"{found['limits']}: {share}; {rates}")
    if found := summary.get("energy"):
        console.print(
            f"{_number(found['joules_per_output_token'])} J an output token, {_number(found['joules_per_request'])} J "
            f"a request; {_number(found['watts'])} W, all devices together ({found['basis']})"
        )
    if found := summary.get("speculation"):
        by_position = ", ".join(f"{share:.1%}" for share in found["acceptance_by_position"])
        console.print(
            f"{found['drafts']} rows with drafts gave {found['tokens_per_step']:.2f} tokens each; of "
            f"{found['draft_tokens']} drafted tokens {found['accepted_tokens']} were accepted "
            f"({found['acceptance_rate']:.1%}), {found['wasted_tokens']} wasted; by position {by_position}"
        )
    if found := summary.get("measured"):
        console.print("; ".join(f"{name} {_number(value)} s" for name, value in found.items()))
    if found := summary.get("judged"):
        console.print(f"judged by these: {found['requests']} requests that come within {found['duration_s']:.1f} s")
    parts = [
        f"{summary['cached_tokens']} of {summary['prompt_tokens']} prompt tokens cached",
        f"{summary['preemptions']} preemptions",
        f"{summary['steps']} steps",
        f"took {summary['wall_s']:.1f} s",
    ]
    if (waits := summary["device_wait_share"]) is not None:
        parts.insert(3, f"the device waited for the host {waits:.1%} of the time")
    if (output_tok_s := summary["output_tok_s"]) is not None:
        rates = f"{output_tok_s:.1f} output tokens/s, {summary['total_tok_s']:.1f} in all"
        parts.insert(0, f"{rates}, over {summary['duration_s']:.1f} s")
    console.print("; ".join(parts))


def description_table(model: str, rows: dict[str, Any]) -> None:
    """Print what a model is, a line a value."""
    table = Table(Column(), Column(), title=model, show_header=False)
    for name, value in rows.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    _console(100).print(table)


def waits_table(title: str, waits: list[Waited]) -> None:
    """Print what the times of requests went into, the mean of each part, and whose prompts are to blame."""
    from twinserve.traces.runs.waits import CAUSES

    first = [one for one in waits if one.ttft_ns]
    table = Table("mean, seconds", "TTFT", "", "whole time", "", "what it is", title=title)
    for cause, meaning in CAUSES.items():
        cells: list[str] = []
        for parts in ([one.ttft_ns for one in first], [one.e2e_ns for one in waits]):
            part, total = sum(each[cause] for each in parts), sum(each.total() for each in parts)
            cells += [_number(part / len(parts) / 1e9), f"{part / total:.1%}"] if part else ["", ""]
        if any(cells):
            table.add_row(cause, *cells, meaning)
    console = _console(120)
    console.print(table)
    blamed = sum((one.culprits for one in waits), Counter())
    if blamed:
        worst = (f"{seq_id} ({_number(ns / 1e9)} s)" for seq_id, ns in blamed.most_common(3))
        console.print(f"the prompts that others waited for most: requests {', '.join(worst)}")


def class_table(found: dict[str, Any]) -> None:
    """Print what came of the requests of each class, and how even that is."""
    heads = ("TTFT mean", "p99", "p99.9", "max", "queue p99", "TPOT p99", "E2E p99")
    table = Table(found["by"], "requests", "served", *heads, "tokens", "computed again", "KV token-s")
    groups = list(found["classes"].items())
    if len(groups) > 1:
        groups.append(("all", found["all"]))
    for name, of in groups:
        ttft = [of["ttft"][statistic] for statistic in ("mean", "p99", "p99.9", "max")]
        seconds = [*ttft, *(of[metric]["p99"] for metric in ("queue", "tpot", "e2e"))]
        computed = of["prompt_tokens"] + of["output_tokens"], of["recomputed_tokens"], of["kv_token_s"]
        table.add_row(
            _plain(name), str(of["requests"]), str(of["served"]), *map(_number, seconds), *map(_number, computed)
        )
    console = _console(140)
    console.print(table)
    if limits := found["all"]["intervals"]:
        words = (f"{name.replace('.', ' ')} {_range(pair)} s" for name, pair in limits.items())
        console.print(f"95% by batch means, all: {'; '.join(words)}")
    if len(found["classes"]) > 1:
        even = ", ".join(f"{name} {_number(value)}" for name, value in found["fairness"].items())
        console.print(f"Jain's index between classes: {even}")


def comparison_table(comparisons: list[Comparison], heads: Sequence[str] = ("simulated", "real", "error")) -> None:
    """Print the metrics of two runs side by side, under what they are and what they differ by."""
    table = Table("metric", *(Column(_plain(head), overflow="fold") for head in heads))
    for row in comparisons:
        error = "" if row.error is None else f"{row.error:+.1%}"
        table.add_row(row.metric, _number(row.sim), _number(row.real), error)
    _console(100).print(table)


def paired_table(differences: list[PairedDifference]) -> None:
    """Print what two sides differ by, metric by metric."""
    table = Table("metric", "A", "B", "B - A", "95% of the mean B - A")
    for row in differences:
        limits = "-" if row.interval is None else " to ".join(map(_number, row.interval))
        table.add_row(row.metric, _number(row.a), _number(row.b), _number(row.difference), limits)
    _console(100).print(table)


def change_table(changes: list[Change]) -> None:
    """Print what each change of an upgrade moves, and by how much."""
    table = Table("change", "metric", "before", "after", "difference", "95% of the mean difference")
    for change in changes:
        for place, row in enumerate(change.moved):
            limits = "-" if row.interval is None else " to ".join(map(_number, row.interval))
            name = "" if place else change.name
            table.add_row(name, row.metric, _number(row.a), _number(row.b), _number(row.difference), limits)
        if not change.moved:
            table.add_row(change.name, "nothing moves", "", "", "", "")
    _console(140).print(table)


def case_table(heads: list[str], rows: list[list[str]]) -> None:
    """Print the cases of a sweep, or their capacities; one alone a line a value. Nothing is cut."""
    if len(rows) == 1:
        table = Table(show_header=False)
        for head, value in zip(heads, rows[0], strict=True):
            table.add_row(_plain(head), _plain(value))
    else:
        table = Table(*(Column(_plain(head), overflow="fold") for head in heads))
        for row in rows:
            table.add_row(*map(_plain, row))
    _console(160).print(table)


def residual_table(data: dict[str, Any]) -> None:
    """Print how well a latency model predicts shapes that were held out of its fit."""
    table = Table("steps", "part", "mean |error|", "p90 |error|", "bias", "shapes", "samples")
    for regime, residuals in data["residuals"].items():
        for part in ("host", "device"):
            found = residuals.get(part)
            errors = (f"{found[name]:.1%}" if found else "-" for name in ("mean_abs", "p90_abs", "bias"))
            table.add_row(regime, part, *errors, str(residuals["shapes"]), str(residuals["samples"]))
    _console(100).print(table)


def trace_table(statistics: dict[str, Any]) -> None:
    """Print what a trace holds, and what was handled."""
    console = _console(100)
    facts = statistics["trace"]
    sessions = f" in {statistics['sessions']} sessions" if statistics["sessions"] else ""
    span = f"over {statistics['span_s']:.1f} s"
    if "arrival_not_said" in facts["notes"]:
        span = "at times that the file does not say"
    console.print(f"{facts['format']}: {statistics['requests']} requests{sessions} {span}")
    lengths = Table("tokens", *_LENGTHS)
    for name in ("prompt_tokens", "output_tokens"):
        lengths.add_row(name, *(_number(statistics[name][s]) for s in _LENGTHS))
    console.print(lengths)
    arrivals = Table("arrivals", "")
    arrivals.add_row("requests a second", _number(statistics["rate"]))
    arrivals.add_row("coefficient of variation of gaps", _number(statistics["gap_cv"]))
    for window, ratio in statistics["peak_to_mean"].items():
        arrivals.add_row(f"peak to mean, {window}", _number(ratio))
    console.print(arrivals)
    reuse = Table("cache without end, block of", "prompt tokens hit", "hit ratio")
    for size, hits in statistics["reuse"].items():
        reuse.add_row(size, str(hits["hit_tokens"]), f"{hits['hit_ratio']:.2%}")
    console.print(reuse)
    handled = Table("of these", "", "requests")
    for what in ("dropped", "clipped", "repaired"):
        for reason, count in facts["handled"][what].items():
            handled.add_row(what, reason, str(count))
    for reason, count in facts["notes"].items():
        if count:
            handled.add_row("noted", _NOTES[reason], str(count))
    for entry in facts["transforms"]:
        for reason, count in entry["changed"].items():
            handled.add_row(f"{entry['transform']} {entry['parameters']}", reason, str(count))
    if handled.rows:
        console.print(handled)


def verify_table(report: dict[str, Any]) -> None:
    """Print how a model as the engine runs it compares with transformers, and whether that is rounding."""
    console = _console(100)
    console.print(
        f"{report['model']}: {report['dtype']}, weights {report['quantization']}, KV {report['kv_cache_dtype']}, "
        f"{report['execution']}, attention {report['attention']}, on {report['device']}, "
        f"against transformers {report['transformers']} in float32"
    )
    first, exact = report["first_difference"], report["beside"] is None
    where = first and (
        f"prompt {first['prompt']}, token {first['position']}: {first['ours']}, "
        f"transformers has {first['theirs']}, {_number(first['margin'])} above it"
    )
    table = Table("what", "found")
    table.add_row("greedy sequences equal", f"{report['equal']} of {report['sequences']}, {report['tokens']} tokens")
    table.add_row("first difference", where or "none")
    table.add_row("near ties", str(report["near_ties"]))
    table.add_row("prompts in chunks", str(report["chunked_prompts"]))
    table.add_row("prompt tokens cached", str(report["cached_tokens"]))
    for name, ours, theirs in (
        ("largest log-probability difference", "log_prob_difference", "transformers_difference"),
        ("mean log-probability difference", "mean_difference", "transformers_mean"),
    ):
        beside = "" if exact else f", transformers in {report['beside']} {_number(report[theirs])}"
        table.add_row(name, _number(report[ours]) + beside)
    perplexities = f"{report['perplexity']:.6g}, transformers {report['reference_perplexity']:.6g}"
    table.add_row(f"perplexity of {report['text_tokens']} tokens", perplexities)
    console.print(table)
    near = "rounding explains what differs" if exact else "as near to float32 as transformers is"
    far = "differs by more than rounding explains" if exact else "further from float32 than transformers is"
    console.print(f"agrees: {near}" if report["agrees"] else far)


def _console(width: int) -> Console:
    """Where tables go: no text is markup, and what is no terminal has so many columns, unless COLUMNS says how many."""
    is_known = Console().is_terminal or "COLUMNS" in os.environ
    return Console(width=None if is_known else width, markup=False, emoji=False, highlight=False)


def _plain(text: str) -> Text:
    """A text of a file or of a person, as it is; what would move the cursor is shown as its escape."""
    return Text(printable(text))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _ms(seconds: float | None) -> str:
    """A time in milliseconds."""
    return "-" if seconds is None else number(1e3 * seconds)


def _range(limits: Sequence[float] | None) -> str:
    return "-" if limits is None else " to ".join(f"{limit:.3g}" for limit in limits)


def top_table(url: str, rows: list[tuple[str, str]]) -> Table:
    """What a server's metrics page says, to be shown again and again."""
    table = Table(Column(_plain(url)), "")
    for row in rows:
        table.add_row(*map(_plain, row))
    return table
