"""The page says what the records say, fetches nothing, and is the same whenever the records are."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from twinserve.commands.records import _asked
from twinserve.reports.page import write_report
from twinserve.reports.text import duration, number, percent
from twinserve.settings.errors import InputError
from twinserve.traces.runs.compare import METRICS, compare, value_of
from twinserve.traces.runs.record import RunRecord


class Page(HTMLParser):
    """What a browser would find in a page.

    Attributes:
        cells: the attributes and the text of every cell of the summary's tables.
        visible: all text that is neither script nor style, one space between words.
        fetched: addresses that a browser would fetch by itself.
        marked: the names of the rows that are marked as differing.
        figures: plotly's figure by its id.
        packed: what is packed for the script: "requests", and of figures the detail by their ids.
    """

    def __init__(self, text: str):
        super().__init__()
        self.text = text
        self.cells: list[tuple[dict[str, str], str]] = []
        self.fetched: list[str] = []
        self.marked: list[str] = []
        self.figures: dict[str, Any] = {}
        self.packed: dict[str, Any] = {}
        self._open: list[tuple[str, dict[str, str]]] = []
        self._words: list[str] = []
        self.feed(text)
        self.visible = " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag, attrs):
        found = {name: value or "" for name, value in attrs}
        self.fetched += [
            value
            for name, value in found.items()
            if name in ("src", "href", "srcset", "data", "action") and not value.startswith("#")
        ]
        if tag not in ("meta", "link", "br", "img", "input"):
            self._open.append((tag, found))
        if "data-metric" in found:
            self.cells.append((found, ""))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if not self._open:
            return
        tag, attributes = self._open[-1]
        if tag in ("script", "style"):
            if "data-plot" in attributes:
                self.figures[attributes["data-plot"]] = json.loads(data)
            elif attributes.get("type") == "text/plain":
                value = json.loads(gzip.decompress(base64.b64decode(data)))
                self.packed[attributes.get("data-detail", "requests")] = value
            return
        self._words.append(data)
        if "data-metric" in attributes:
            self.cells[-1] = (attributes, data)
        if tag == "th" and any(found.get("class") == "differs" for _, found in self._open):
            self.marked.append(data)

    def value(self, metric: str, **where: str) -> tuple[str, str]:
        """The exact value and the text of the only cell of a metric; `run` or `error_of` tells whose."""
        wanted = {"data-metric": metric} | {f"data-{name.replace('_', '-')}": label for name, label in where.items()}
        (found,) = [(cell["data-value"], text) for cell, text in self.cells if cell.items() >= wanted.items()]
        return found


@pytest.fixture
def page(tmp_path):
    """Write a report and read it: `page(record, ...)`."""

    def write(*records: RunRecord) -> Page:
        out = tmp_path / f"page-{len(list(tmp_path.glob('page-*')))}.html"
        write_report(list(records), out)
        return Page(out.read_text(encoding="utf-8"))

    return write


def with_run(record: RunRecord, **values: Any) -> RunRecord:
    """The record with other values in its run.json."""
    return replace(record, run=record.run | values)


# --- numbers ---


def test_every_metric_of_the_summary_is_in_the_page(page, sim):
    shown = page(sim)
    for metric in METRICS:
        value = value_of(sim.run["summary"], metric)
        exact, text = shown.value(metric, run="sim")
        assert exact == str(value)
        texts = {number(value), number(value * 1e3), percent(value)}
        assert text in texts or text.startswith(f"{number(value)} (")


def test_what_came_of_drafts_is_on_the_page_as_it_is_in_the_record_and_only_where_there_were_any(page, drafted, sim):
    found = drafted.run["summary"]["speculation"]
    shown = page(drafted, sim)
    for name, value in found.items():
        if name != "acceptance_by_position":
            exact, text = shown.value(f"speculation.{name}", run="drafted")
            assert exact == str(value) and text in (number(value), percent(value))
    assert found["wasted_tokens"] == found["draft_tokens"] - found["accepted_tokens"] > 100
    (line,) = shown.figures["acceptance"]["data"]
    assert line["x"] == [1, 2, 3, 4] and line["y"] == [100 * share for share in found["acceptance_by_position"]]
    assert all(percent(share) in shown.visible for share in found["acceptance_by_position"])
    alone = page(sim)
    assert "acceptance" not in alone.figures and not [cell for cell, _ in alone.cells if "spec" in cell["data-metric"]]


def test_units_are_said_and_apply_to_the_whole_row(page, make_record):
    record = make_record(max_num_seqs=1)
    ttft, tpot = (record.run["summary"][name] for name in ("ttft_s", "tpot_s"))
    assert tpot["p99"] < 1 <= ttft["p99"]
    shown = page(record)
    assert "TTFT , s" in shown.visible and "TPOT , ms" in shown.visible
    assert shown.value("ttft_s.p50", run="sim")[1] == number(ttft["p50"])
    assert shown.value("tpot_s.p50", run="sim")[1] == number(tpot["p50"] * 1e3)


def test_cached_tokens_are_a_share_of_the_prompts(page, sim):
    summary = sim.run["summary"]
    share = summary["cached_tokens"] / summary["prompt_tokens"]
    assert page(sim).value("cached_tokens", run="sim")[1].endswith(f"({share:.1%})")


def test_the_devices_waits_are_a_share_in_percent_and_explained(page, make_record):
    record = make_record(pipeline_depth=0)
    share = record.run["summary"]["device_wait_share"]
    assert share > 0.01
    shown = page(record)
    assert shown.value("device_wait_share", run="sim") == (str(share), f"{share:.1%}")
    assert "Device waits the share of the duration in which the device had work but stood idle" in shown.visible


def test_a_summary_older_than_the_devices_waits_is_shown_and_compared_without_them(page, sim, real):
    summary = {name: value for name, value in real.run["summary"].items() if name != "device_wait_share"}
    shown = page(sim, with_run(real, summary=summary))
    assert shown.value("device_wait_share", run="real") == ("None", "–")
    assert shown.value("device_wait_share", error_of="sim") == ("None", "–")
    assert shown.value("steps", error_of="sim")[0] != "None"


def test_a_simulation_beside_its_real_run_has_the_errors_of_compare(page, sim, real):
    shown = page(sim, real)
    rows = compare(sim, real)
    for row in rows:
        assert shown.value(row.metric, error_of="sim") == (str(row.error), percent(row.error, signed=True))
        assert shown.value(row.metric, run="sim")[0] == str(row.sim)
        assert shown.value(row.metric, run="real")[0] == str(row.real)
    latencies = [row.error for row in rows if "." in row.metric and row.error is not None]
    assert percent(max(latencies, key=abs), signed=True) + ", in" in shown.visible


def test_errors_are_against_the_first_real_run_of_the_trace(page, make_record, sim, real):
    again = replace(real, run=real.run | {"summary": sim.run["summary"]})
    shown = page(real, again, sim)
    assert shown.value("duration_s", error_of="sim")[0] == str(compare(sim, real)[METRICS.index("duration_s")].error)
    assert {cell["data-run"] for cell, _ in shown.cells if "data-run" in cell} == {"real (1)", "real (2)", "sim"}


def test_runs_of_other_traces_are_not_compared_and_that_is_said(page, sim, real):
    other = with_run(sim, facts=sim.run["facts"] | {"trace": sim.run["facts"]["trace"] | {"sha256": "00"}})
    shown = page(other, real)
    assert not [cell for cell, _ in shown.cells if "data-error-of" in cell]
    assert "No errors are given" in shown.visible
    assert {"requests-0", "requests-1"} <= shown.figures.keys()


def test_a_number_that_is_not_defined_is_a_dash(page, make_record):
    record = make_record(max_model_len=1)
    assert record.run["summary"]["finished"] == 0
    shown = page(record)
    assert shown.value("ttft_s.p50", run="sim") == ("None", "–")
    assert "Nothing to draw" in shown.visible
    assert not any(name.startswith("cdf") for name in shown.figures)


# --- the first line ---


def test_the_first_line_says_what_was_simulated_and_that_nothing_was_left_out(page, sim):
    said = page(sim).visible
    assert said.startswith("sim – twinserve report sim recorded ")
    assert "sim : simulated with latency model a line; trace chat.jsonl; " in said
    assert " requests/s; 80 requests: 80 finished, 0 refused, 0 shortened, 0 capped, 0 dropped, 0 aborted. " in said
    assert f"Replays exactly: {len(sim.steps):,} of {len(sim.steps):,} decisions made again." in said


def test_the_first_line_counts_what_was_refused_shortened_dropped_and_aborted(page, make_record):
    record = make_record(max_model_len=100, dropped=7)
    summary = record.run["summary"] | {"aborted": 2, "finished": record.run["summary"]["finished"] - 3}
    assert summary["refused"] and summary["shortened"]
    shown = page(with_run(record, summary=summary))
    finished, refused, shortened = (summary[name] for name in ("finished", "refused", "shortened"))
    expected = (
        f"80 requests: {finished} finished, {refused} refused , {shortened} shortened , 0 capped, "
        "7 dropped , 2 aborted , 1 unfinished ."
    )
    assert expected in shown.visible


def test_the_first_line_of_a_real_run_names_model_and_device(page, real):
    assert "real : served by tiny on a card; trace chat.jsonl; " in page(real).visible
    facts = real.run["facts"] | {"model": {"name": "big", "num_layers": 2}}
    assert "served by big on a card" in page(with_run(real, facts=facts)).visible


def test_what_is_not_recorded_is_said(page, sim, real):
    assert "simulated with an unrecorded latency model; trace unrecorded" in page(with_run(sim, facts={})).visible
    assert (
        "served by an unrecorded model on an unrecorded device" in page(with_run(real, facts={}, device=None)).visible
    )


def test_the_first_screen_judges_by_what_was_asked(tmp_path, sim, real):
    p99 = max(record.run["summary"]["ttft_s"]["p99"] for record in (sim, real))
    text = f"p99 TTFT <= {p99 * 2e3:.0f} ms and p99 E2E <= 1 ms"
    write_report([sim, real], tmp_path / "page.html", asked=_asked(text))
    shown = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    head = shown.visible.partition("Summary")[0]
    assert f"Asked: {_asked(text).text}" in head and head.count("✗ misses") == 2
    for record in (sim, real):
        summary = record.run["summary"]
        for metric, limit in (("ttft_s", round(p99 * 2e3) / 1e3), ("e2e_s", 0.001)):
            value = summary[metric]["p99"]
            used = f"{value / limit:.0%} of" if metric == "ttft_s" else f"{value / limit:,.0f} times"
            assert f"{duration(value)}, {used} its limit" in head
        assert shown.value("attainment.share", run=record.path.name) == ("0.0", "0.0%")
    write_report([sim], tmp_path / "kept.html", asked=_asked(f"p99 TTFT <= {p99 * 2e3:.0f} ms"))
    assert "✓ keeps it" in (tmp_path / "kept.html").read_text(encoding="utf-8")


def test_without_an_objective_nothing_is_judged_and_that_is_said(page, sim):
    said = page(sim).visible
    assert "No objective was given" in said and "✓" not in said and "✗" not in said


def test_the_first_screen_says_when_and_how_the_page_is_made_again(tmp_path, sim):
    os.utime(sim.path / "run.json", (86_400 * 365, 86_400 * 365))
    write_report([sim], tmp_path / "page.html", asked=_asked("p99 TTFT <= 1 s"))
    said = Page((tmp_path / "page.html").read_text(encoding="utf-8")).visible
    assert "recorded 1971-01-01 00:00 UTC; twinserve 0.1.0" in said
    assert f"Made by twinserve report {sim.path} --objective 'p99 TTFT <= 1 s'" in said


def test_a_record_that_does_not_replay_is_said_not_to(page, sim):
    steps = [row | {"digest": "0" * 16} if row["decision"] == 7 else row for row in sim.steps]
    assert (
        "Does not replay: differs after 7 decisions, decision 7: digest is " in page(replace(sim, steps=steps)).visible
    )
    by_hand = with_run(sim, settings=sim.run["settings"] | {"scheduling_policy": "by hand: Mine"})
    assert "Not replayed: " in page(by_hand).visible


# --- settings and facts ---


def test_settings_that_differ_are_marked_and_named_at_the_top(page, make_record, sim):
    shown = page(sim, make_record("other", max_num_seqs=12, composition="prefill-first"))
    assert "The runs differ in load, composition, max_num_seqs." in shown.visible
    assert "composition mixed prefill-first max_num_seqs 16 12" in shown.visible
    assert shown.marked[:2] == ["composition", "max_num_seqs"]


def test_equal_settings_are_said_to_be_equal_and_nothing_is_marked(page, sim):
    shown = page(sim, sim)
    assert "The runs have equal settings, facts and loads." in shown.visible
    assert shown.marked == []


def test_facts_hold_the_trace_with_its_transforms_and_what_they_changed(page, sim):
    visible = page(sim).visible
    assert "limit (num_requests 80): requests_dropped 7" in visible
    assert "trace.sha256 " + "5e" * 32 in visible
    assert "latency.identity 4f" in visible
    assert f"versions.python {sim.run['versions']['python']}" in visible


# --- the page itself ---


def test_the_same_records_give_the_same_bytes(tmp_path, sim, real):
    for name in ("first.html", "second.html"):
        write_report([sim, real], tmp_path / name)
    assert (tmp_path / "first.html").read_bytes() == (tmp_path / "second.html").read_bytes()


def test_real_runs_come_first_whatever_the_order(page, sim, real):
    assert page(sim, real).text == page(real, sim).text


def test_nothing_is_fetched(page, sim, real):
    shown = page(sim, real)
    assert shown.fetched == []
    style = re.search("<style>(.*?)</style>", shown.text, re.DOTALL)
    assert style and not re.search(r"url\(|@import|http", style[1])
    assert "default-src 'none'" in shown.text


def test_plotly_is_inlined_once(page, sim, real):
    from plotly.offline import get_plotlyjs

    assert page(sim, real).text.count(get_plotlyjs()) == 1


def test_whatever_comes_from_a_record_is_escaped(page, tmp_path, sim):
    evil = "</script><script>alert('x')</script><img src=x onerror=\"alert(1)\">&lt;"
    trace = sim.run["facts"]["trace"] | {
        "path": evil,
        "transforms": [{"transform": evil, "parameters": {evil: evil}, "changed": {evil: evil}}, evil],
    }
    facts = {"trace": trace, "latency": {"name": evil}, evil: {evil: [evil]}}
    record = with_run(
        sim, facts=facts, settings={evil: evil, "num_gpu_blocks": evil}, device=evil, versions={evil: evil}
    )
    shown = page(replace(record, path=tmp_path / evil.replace("/", "")), sim)
    assert "<img" not in shown.text.replace(plotly_text(), "")
    assert shown.fetched == []
    assert "alert('x')" not in shown.text
    assert shown.visible.count(evil) > 10


def plotly_text() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def test_every_figure_and_table_has_a_caption_of_one_sentence(page, sim, real):
    text = page(sim, real).text
    captions = re.findall(r'class="caption">(.*?)(?: <span class="note">|</)', text)
    explained = text.count("<h2>Why requests waited") - text.count("Not known: the run is not decided again exactly.")
    assert len(captions) == text.count("<figure id") + 2 + explained and explained > 0
    for caption in captions:
        assert re.fullmatch(r"Look [^.]*(\d\.\d[^.]*)*\.", caption), caption


def test_every_axis_has_a_title_with_its_unit(page, sim, real):
    for name, figure in page(sim, real).figures.items():
        axes = {key: axis for key, axis in figure["layout"].items() if key.startswith(("xaxis", "yaxis"))}
        titles = {key: axis.get("title", {}).get("text", "") for key, axis in axes.items()}
        if name == "kv":
            assert titles.pop("yaxis5") == "" and axes["yaxis5"]["ticktext"] == ["real", "sim"]
        units = re.compile(r"\((s|ms|%|requests/s)(, logarithmic)?\)$|tokens|requests|request|blocks")
        assert all(units.search(title) for title in titles.values()), (name, titles)


def test_real_and_sim_keep_their_colours_and_lines_in_every_figure(page, sim, real):
    traces = [trace for figure in page(sim, real).figures.values() for trace in figure["data"]]
    lines = {
        (trace["name"], trace["line"]["color"], trace["line"]["dash"])
        for trace in traces
        if trace.get("name") in ("real", "sim") and trace["mode"] == "lines"
    }
    assert sorted(name for name, *_ in lines) == ["real", "sim"]
    assert len({color for _, color, _ in lines}) == len({dash for *_, dash in lines}) == 2


def test_a_long_record_gives_a_page_little_longer_than_a_short_one(page, sim):
    long = replace(sim, steps=sim.steps * 40)
    short_page, long_page = page(sim), page(long)
    assert len(long.steps) > 10_000
    assert len(long_page.text) < len(short_page.text) + 300_000
    assert "Thinned: " in long_page.visible and "Thinned: " not in short_page.visible


def test_steps_without_decisions_leave_a_page_that_says_so(page, sim):
    bare = [{key: row[key] for key in ("start_ns", "end_ns", "count", "decided_ns")} for row in sim.steps]
    shown = page(replace(sim, steps=bare))
    assert "Nothing to draw: no record here holds what this figure shows." in shown.visible
    assert {"cdf-ttft", "requests-0"} <= shown.figures.keys()


# --- refusals ---


def test_an_existing_file_is_refused_and_left_as_it_is(tmp_path, sim):
    out = tmp_path / "report.html"
    out.write_text("mine")
    with pytest.raises(InputError, match="report.html: exists already, expected a new name"):
        write_report([sim], out)
    assert out.read_text() == "mine"


def test_a_link_that_leads_nowhere_is_refused(tmp_path, sim):
    out = tmp_path / "report.html"
    out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="exists already"):
        write_report([sim], out)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, sim):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="report.html: cannot be written: "):
        write_report([sim], tmp_path / "file" / "report.html")


def test_nothing_half_written_stays(tmp_path, sim, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    folder = tmp_path / "pages"
    with pytest.raises(InputError, match="No space left"):
        write_report([sim], folder / "report.html")
    assert list(folder.iterdir()) == []


def test_a_page_of_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected at least one run record"):
        write_report([], tmp_path / "report.html")
