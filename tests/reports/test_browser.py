"""The page in a browser: all is drawn, nothing is fetched, nothing overflows, nothing complains."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from twinserve.commands.records import _asked
from twinserve.reports.page import write_report
from twinserve.reports.sweep import Axis, Estimate, PageCase, sweep_page
from twinserve.settings.build_core import Settings
from twinserve.traces.runs.compare import METRICS, value_of

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="none of chromium, chromium-browser and google-chrome is on the PATH"
)

WIDTHS = (1280, 420)

DRAWN = """() => Object.fromEntries([...document.querySelectorAll(".plot")].map(plot => [plot.id, {
  traces: plot.data.length,
  marks: [...plot.querySelectorAll(".scatterlayer .trace path, .barlayer .trace path")]
    .filter(path => { const box = path.getBoundingClientRect(); return box.width + box.height > 1; }).length,
  right: Math.max(...[...plot.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().right)),
  titles: [...plot.querySelectorAll(".xtitle, .ytitle")].map(text => text.textContent),
}]))"""


@dataclass
class Opened:
    """A page in the browser, what it said on the console and what it asked for."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


def until(page: Any, condition: str) -> None:
    """Wait for a condition; `wait_for_function` would evaluate it in the page, whose policy forbids that."""
    for _ in range(900):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"still not so after 90 s: {condition}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield launched
        launched.close()


@contextmanager
def opening(browser: Any) -> Iterator[Callable[..., Opened]]:
    """What opens a page from its file, without a network, until all of them are closed."""
    contexts = []

    def open_it(width: int, out: Path, **options: Any) -> Opened:
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **options)
        context.set_default_timeout(90_000)
        contexts.append(context)
        opened = Opened(context.new_page())
        opened.page.on("console", lambda message: opened.said.append(message.text))
        opened.page.on("pageerror", lambda error: opened.said.append(str(error)))
        opened.page.on("request", lambda request: opened.asked.append(request.url))
        opened.page.goto(out.as_uri())
        until(opened.page, "document.documentElement.dataset.ready === 'yes'")
        return opened

    yield open_it
    for context in contexts:
        context.close()


@pytest.fixture
def open_file(browser):
    """Open a page from its file: `open_file(width, path)`."""
    with opening(browser) as open_it:
        yield open_it


@pytest.fixture(scope="module")
def opened(browser, sim, tmp_path_factory) -> Iterator[Opened]:
    """The page of `sim`, for tests that leave it as they find it."""
    out = tmp_path_factory.mktemp("page") / "page.html"
    write_report([sim], out, asked=_asked("90% of requests with TTFT <= 300 ms"))
    with opening(browser) as open_it:
        yield open_it(1280, out)


@pytest.fixture
def open_page(open_file, tmp_path):
    """Write a report and open it: `open_page(width, record, ...)`."""

    def open_it(width: int, *records, asked=None, **options: Any) -> Opened:
        out = tmp_path / f"{width}.html"
        write_report(list(records), out, asked=asked)
        return open_file(width, out, **options)

    return open_it


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("several", [False, True], ids=["one run with drafts", "sim and real"])
def test_everything_is_drawn_and_fits_and_nothing_is_fetched(open_page, drafted, sim, real, width, several):
    opened = open_page(width, sim, real) if several else open_page(width, drafted)
    drawn = opened.page.evaluate(DRAWN)
    assert drawn.keys() == {
        *(f"cdf-{name}" for name in ("ttft", "tpot", "itl", "e2e")),
        *("load", "batch", "kv", "requests-0", "steps-prompt", "steps-decode"),
        *(["residuals-0"] if several else ["acceptance"]),
    }
    for name, figure in drawn.items():
        assert figure["marks"] >= figure["traces"] > 0, (name, figure)
        assert figure["right"] <= width, (name, figure)
        assert len(figure["titles"]) >= 2 and all(figure["titles"]), (name, figure)
    assert opened.said == []
    assert opened.asked == [opened.page.url]
    opened.page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width


def test_text_is_dark_on_white_and_large_enough_to_read(opened):
    page = opened.page
    for text in (page.locator("h1"), page.locator("td").first, page.locator("figcaption").first):
        assert text.is_visible()
        style = text.evaluate("text => [getComputedStyle(text).color, getComputedStyle(text).fontSize]")
        assert all(int(part) < 60 for part in re.findall(r"\d+", style[0])[:3]), style
        assert float(style[1].removesuffix("px")) >= 14
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_settings_are_folded_until_they_are_asked_for(opened):
    page = opened.page
    setting = page.get_by_text("max_num_batched_tokens", exact=True)
    assert not setting.is_visible()
    for is_seen in (True, False):
        page.get_by_text(f"{len(Settings.model_fields)} settings").click()
        assert setting.is_visible() == is_seen


def test_figures_follow_the_window(opened):
    page = opened.page
    for width in (420, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        until(page, f"document.documentElement.scrollWidth <= {width}")
    until(page, "document.querySelector('#kv svg').getBoundingClientRect().width > 800")


def test_hovering_tells_the_value(opened):
    area = opened.page.locator("#cdf-ttft .nsewdrag").first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    label = opened.page.locator("#cdf-ttft .hovertext").first
    for share in range(10, 100, 5):
        opened.page.mouse.move(box["x"] + box["width"] * share / 100, box["y"] + box["height"] / 2)
        opened.page.wait_for_timeout(100)
        if label.is_visible():
            break
    assert re.search(r"\d% within \d+\S* ms", label.text_content())
    assert opened.said == []


RANGES = """() => Object.fromEntries([...document.querySelectorAll(".plot")].map(
  plot => [plot.id, plot._fullLayout.xaxis.range.map(Number)]))"""


def wait_for_range(page: Any, name: str, low: float, high: float) -> None:
    """Until the x axis of a figure shows about so much."""
    span = f"document.getElementById('{name}')._fullLayout.xaxis.range"
    until(page, f"Math.abs({span}[0] - {low}) < 1e-6 && Math.abs({span}[1] - {high}) < 1e-6")


def test_zoom_goes_together_is_drawn_finer_and_is_undone(open_page, sim):
    rows, span = sim.steps, max(row["end_ns"] for row in sim.steps) + 1_000_000
    times = ("decided_ns", "start_ns", "end_ns")
    steps = [row | {name: row[name] + span * turn for name in times} for turn in range(12) for row in rows]
    opened = open_page(1280, replace(sim, steps=steps))
    page = opened.page
    points = "document.getElementById('kv')._fullData[2].x"
    before = page.evaluate(f"[{points}.length, {points}[1] - {points}[0]]")
    page.evaluate("Plotly.relayout('batch', {'xaxis.range': [1, 2]})")
    for name in ("kv", "load", "requests-0"):
        wait_for_range(page, name, 1, 2)
    ranges = page.evaluate(RANGES)
    assert ranges["cdf-ttft"] != [1, 2]
    after = page.evaluate(f"[{points}.length, {points}[1] - {points}[0], {points}[0], {points}.at(-1)]")
    assert after[1] < before[1] / 5 and after[2] <= 1 and after[3] >= 2 - after[1]
    page.evaluate("Plotly.relayout('kv', {'xaxis.autorange': true})")
    until(page, "document.getElementById('batch')._fullLayout.xaxis.range[1] > 5")
    assert page.evaluate(f"{points}.length") == before[0]
    assert opened.said == []


def test_the_keyboard_zooms_and_the_toolbar_is_out_of_its_way(opened):
    page = opened.page
    assert page.evaluate("[...document.querySelectorAll('.modebar-btn')].every(button => button.tabIndex < 0)")
    low, high = page.evaluate(RANGES)["batch"]
    page.locator("#batch").focus()
    page.keyboard.press("+")
    quarter = (high - low) / 4
    wait_for_range(page, "kv", low + quarter, high - quarter)
    page.keyboard.press("0")
    wait_for_range(page, "kv", low, high)
    for plot in page.locator(".plot").all():
        label = plot.get_attribute("aria-label")
        assert plot.get_attribute("role") == "img" and label and len(label) > 10, label


def test_any_request_is_found_sorted_and_drawn(open_page, sim, real):
    opened = open_page(1280, real, sim)
    page = opened.page
    rows = {row["id"]: row for row in real.requests}
    cells = page.locator(".finder tbody tr")
    first = cells.first.locator("td").first
    longest = max(rows.values(), key=lambda row: row["first_token_ns"] - row["arrival_ns"])
    assert first.inner_text() == str(longest["id"])
    assert page.locator(".finder output").inner_text() == "80 of 80 requests, the first 20 shown"
    page.locator(".finder input").fill("17")
    assert cells.count() == 1
    for name, end in (("ttft", "first_token_ns"), ("e2e", "finish_ns"), ("wait", "first_scheduled_ns")):
        said = cells.first.locator(f'td[data-column="{name}"]').inner_text()
        assert said == f"{round((rows[17][end] - rows[17]['arrival_ns']) / 1e3) / 1e3:,.3f}"
    page.locator(".finder input").fill("preemptions >= 1, ttft > 100")
    expected = [
        row for row in rows.values() if row["preemptions"] and row["first_token_ns"] - row["arrival_ns"] > 100_000_000
    ]
    assert page.locator(".finder output").inner_text().startswith(f"{len(expected)} of 80 requests")
    page.locator(".finder input").fill("nonsense ~ 3")
    assert "is not understood" in page.locator(".finder output").inner_text()
    page.locator(".finder input").fill("")
    page.locator('.finder th[data-column="prompt"] button').click()
    assert first.inner_text() == str(min(rows.values(), key=lambda row: row["prompt_tokens"])["id"])
    page.locator(".finder input").fill("3")
    first.locator("button").click()
    until(page, "document.getElementById('requests-0').layout.yaxis.ticktext.includes('<b>▸ 3</b>')")
    bars = page.evaluate("document.getElementById('requests-0').data.filter(trace => trace.type === 'bar').slice(0, 3)")
    place = page.evaluate("document.getElementById('requests-0').layout.yaxis.ticktext.indexOf('<b>▸ 3</b>')")
    total = sum(bar["x"][place] for bar in bars)
    assert total == pytest.approx((rows[3]["finish_ns"] - rows[3]["arrival_ns"]) / 1e9, abs=2e-6)
    assert opened.said == []


def test_numbers_on_the_page_are_the_records(opened, sim):
    page = opened.page
    cells = "[...document.querySelectorAll('[data-metric]')].map(cell => [cell.dataset.metric, cell.dataset.value])"
    shown = dict(page.evaluate(cells))
    for metric in METRICS:
        assert shown[metric] == str(value_of(sim.run["summary"], metric))
    kept = sum(row["first_token_ns"] - row["arrival_ns"] <= 300_000_000 for row in sim.requests)
    assert float(shown["attainment.share"]) == kept / 80
    curve = page.evaluate("(({x, y}) => [[...x], [...y]])(document.getElementById('cdf-ttft')._fullData[0])")
    waits_ms = sorted((row["first_token_ns"] - row["arrival_ns"]) / 1e6 for row in sim.requests)
    scale = 1.0 if "(ms" in page.evaluate("document.getElementById('cdf-ttft').layout.xaxis.title.text") else 1e3
    assert curve[0][-1] * scale == pytest.approx(waits_ms[-1]) and curve[0][0] * scale == pytest.approx(waits_ms[0])
    lines = dict(
        page.evaluate("document.getElementById('kv')._fullData.map(line => [line.name, [[...line.x], [...line.y]]])")
    )
    (at, held), (same, stored) = (lines[name] for name in ("held", "cached"))
    assert set(zip(at, held, strict=True)) >= {(row["start_ns"] / 1e9, row["used_blocks"]) for row in sim.steps}
    assert at == same and all(used <= known <= 90 for used, known in zip(held, stored, strict=True))
    assert held[-1] == 0 < stored[-1]
    share = sim.run["summary"]["cached_tokens"] / sim.run["summary"]["prompt_tokens"]
    assert f"first scheduled: {share:.1%}" in page.locator("#figure-kv figcaption").inner_text()


def test_a_reader_who_prefers_dark_gets_it_and_paper_is_white(open_page, sim):
    opened = open_page(1280, sim, color_scheme="dark")
    page = opened.page
    dark = "getComputedStyle(document.body).backgroundColor"
    paper = "document.getElementById('kv')._fullLayout.paper_bgcolor"
    assert page.evaluate(dark) == "rgb(20, 24, 29)" and page.evaluate(paper) == "#14181d"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    until(page, f"{paper} === '#ffffff'")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    until(page, f"{paper} === '#14181d'")
    page.emulate_media(color_scheme="light")
    until(page, f"{paper} === '#ffffff'")
    page.emulate_media(media="print")
    assert not page.locator(".finder").is_visible() and page.locator("h1").is_visible()
    assert opened.said == []


def test_a_definition_is_told_to_who_comes_to_its_word(opened):
    page = opened.page
    word = page.locator(".term", has_text="TTFT").first
    tip = "term => getComputedStyle(term, '::after').content"
    assert word.evaluate(tip) == "none"
    word.hover()
    assert "time to first token" in word.evaluate(tip)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_of_a_sweep_is_drawn_and_fits_and_nothing_is_fetched(open_file, tmp_path, width):
    cost, ttft = Axis("cost of 1M tokens", "cost of 1M tokens"), Axis("p99 TTFT, s", "p99 TTFT, s", 1.0)
    values = [(0.1, 3.0), (0.2, 0.5), (0.3, 0.9)]
    cases = [
        PageCase(
            {"max_num_seqs": number},
            {"cost of 1M tokens": Estimate(x), "p99 TTFT, s": Estimate(y, (y - 0.1, y + 0.1))},
            y <= 1,
        )
        for number, (x, y) in enumerate(values)
    ]
    out = tmp_path / "sweep.html"
    out.write_text(sweep_page("Sweep", ["Price: 2.5 a GPU-hour."], cases, {"block_size": 16}, cost, [ttft]))
    opened = open_file(width, out)
    drawn = opened.page.evaluate(DRAWN)["pareto-0"]
    assert drawn["traces"] == 3 and drawn["marks"] >= 4 and drawn["right"] <= width
    assert opened.said == [] and opened.asked == [opened.page.url]
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    column = "[...document.querySelectorAll('.sortable tbody tr')].map(row => row.cells[2].dataset.value)"
    head = opened.page.locator(".sortable th button", has_text="p99 TTFT")
    head.click()
    assert opened.page.evaluate(column) == ["0.5", "0.9", "3.0"]
    head.click()
    assert opened.page.evaluate(column) == ["3.0", "0.9", "0.5"]
