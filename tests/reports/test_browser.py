"""The page in a browser: all is drawn, nothing is fetched, nothing overflows, nothing complains."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from twinserve.reports.page import write_report
from twinserve.reports.sweep import Axis, Estimate, PageCase, sweep_page
from twinserve.settings.build_core import Settings

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


@pytest.fixture
def open_file(browser):
    """Open a page from its file, without a network: `open_file(width, path)`."""
    contexts = []

    def open_it(width: int, out: Path) -> Opened:
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
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
def open_page(open_file, tmp_path):
    """Write a report and open it: `open_page(width, record, ...)`."""

    def open_it(width: int, *records) -> Opened:
        out = tmp_path / f"{width}.html"
        write_report(list(records), out)
        return open_file(width, out)

    return open_it


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("several", [False, True], ids=["one run", "sim and real"])
def test_everything_is_drawn_and_fits_and_nothing_is_fetched(open_page, sim, real, width, several):
    opened = open_page(width, sim, real) if several else open_page(width, sim)
    drawn = opened.page.evaluate(DRAWN)
    assert drawn.keys() == {
        *(f"cdf-{name}" for name in ("ttft", "tpot", "itl", "e2e")),
        *("load", "batch", "kv", "requests-0", "steps-prompt", "steps-decode"),
        *(["residuals-0"] if several else []),
    }
    for name, figure in drawn.items():
        assert figure["marks"] >= figure["traces"] > 0, (name, figure)
        assert figure["right"] <= width, (name, figure)
        assert len(figure["titles"]) >= 2 and all(figure["titles"]), (name, figure)
    assert opened.said == []
    assert opened.asked == [opened.page.url]
    opened.page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width


def test_text_is_dark_on_white_and_large_enough_to_read(open_page, sim):
    page = open_page(1280, sim).page
    for text in (page.locator("h1"), page.locator("td").first, page.locator("figcaption").first):
        assert text.is_visible()
        style = text.evaluate("text => [getComputedStyle(text).color, getComputedStyle(text).fontSize]")
        assert all(int(part) < 60 for part in re.findall(r"\d+", style[0])[:3]), style
        assert float(style[1].removesuffix("px")) >= 14
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_settings_are_folded_until_they_are_asked_for(open_page, sim):
    page = open_page(1280, sim).page
    setting = page.get_by_text("max_num_batched_tokens")
    assert not setting.is_visible()
    page.get_by_text(f"{len(Settings.model_fields)} settings").click()
    assert setting.is_visible()


def test_figures_follow_the_window(open_page, sim):
    page = open_page(1280, sim).page
    page.set_viewport_size({"width": 420, "height": 900})
    until(page, "document.documentElement.scrollWidth <= 420")


def test_hovering_tells_the_value(open_page, sim):
    opened = open_page(1280, sim)
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
