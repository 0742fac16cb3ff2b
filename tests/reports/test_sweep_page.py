"""The page of a sweep: its table, its figures, and the front of what nothing beats."""

import json
import re

from hypothesis import given
from hypothesis import strategies as st

from twinserve.reports.sweep import Axis, Estimate, PageCase, Tried, pareto_front, sweep_page, swept_fields

COST, TTFT = Axis("cost", "cost of 1M tokens"), Axis("ttft", "p99 TTFT, s", 1.0)


def case(name, cost, ttft, keeps=None, interval=None):
    values = {"cost": Estimate(cost), "ttft": Estimate(ttft, interval)}
    return PageCase({"composition": name}, values, keeps, {"misses": "nothing" if keeps else "p99 TTFT <= 1 s"})


CASES = [case("mixed", 0.2, 0.5, True, (0.4, 0.6)), case("<other>", 0.1, 3.0, False), case("worse", 0.3, 0.9, True)]


def page(cases=CASES):
    return sweep_page("Sweep of a <plan>", ["Latency: a roofline."], cases, {"block_size": 16}, COST, [TTFT])


def figure_of(text):
    return json.loads(re.search(r'data-plot="pareto-0">(.*?)</script>', text)[1])


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_the_front_holds_what_nothing_beats_and_stands_for_the_rest(points):
    front = pareto_front(points)
    for index in front:
        x, y = points[index]
        assert not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
    for x, y in points:
        assert any(points[index][0] <= x and points[index][1] <= y for index in front)
    assert len({points[index] for index in front}) == len(front)
    assert [points[index] for index in front] == sorted(points[index] for index in front)


def test_cases_stand_in_the_table_as_text():
    text = page()
    cells = (
        '<th scope="row">mixed</th>',
        '<th scope="row">&lt;other&gt;</th>',
        '<td class="words">p99 TTFT &lt;= 1 s</td>',
    )
    for cell in (*cells, '<td data-value="0.5">0.5000 ± 0.1</td>'):
        assert cell in text
    assert "Sweep of a &lt;plan&gt;" in text and "Latency: a roofline." in text and "1 field that all" in text


def test_the_figure_draws_every_case_the_limit_and_the_front():
    figure = figure_of(page())
    kept, missed, front = figure["data"]
    assert (kept["x"], kept["y"]) == ([0.2, 0.3], [0.5, 0.9])
    assert (missed["x"], missed["y"], missed["text"]) == ([0.1], [3.0], ["composition &lt;other&gt;"])
    assert (front["x"], front["y"]) == ([0.1, 0.2], [3.0, 0.5])
    assert figure["layout"]["shapes"][0]["y0"] == 1.0


def test_what_is_not_known_is_not_drawn_and_said():
    text = page([*CASES, case("none", None, None)])
    assert "Not drawn: 1 of 4 cases" in text
    assert "Nothing to draw" in page([case("none", None, 1.0), case("one", 2.0, 1.0)])
    assert "What costs what" not in page([case("alone", 2.0, 1.0)]), "there is nothing to compare it with"


def figure(text, name):
    return json.loads(re.search(rf'data-plot="{name}"[^>]*>(.*?)</script>', text)[1])


def test_a_swept_number_is_an_axis_with_a_line_for_each_choice_of_the_others():
    cases = [
        PageCase(
            {"block_size": block, "rate": rate}, {"cost": Estimate(1 / rate), "ttft": Estimate(rate * block)}, rate < 3
        )
        for block in (16, 32)
        for rate in (1.0, 2.0, 4.0)
    ]
    assert swept_fields(cases) == ["rate", "block_size"]
    text = page(cases)
    drawn = figure(text, "field-0-0")
    assert drawn["layout"]["xaxis"]["title"]["text"] == "rate, requests/s"
    assert "The dashed line is the limit, 1.000 s." in text
    assert [(line["name"], line["x"], line["y"]) for line in drawn["data"]] == [
        ("block_size 16", [1, 2, 4], [16, 32, 64]),
        ("block_size 32", [1, 2, 4], [32, 64, 128]),
    ]
    assert [symbol.endswith("-open") for symbol in drawn["data"][0]["marker"]["symbol"]] == [False, False, True]
    assert drawn["layout"]["shapes"][0]["y0"] == 1.0
    assert "4 of 6 cases keep the objective. " in text.replace("</p>\n", " ")
    assert "The cheapest of them: block_size 16, rate 2.0, cost of 1M tokens 0.5000." in text


def test_names_are_no_axis_and_one_value_is_none():
    assert swept_fields(CASES) == []
    assert swept_fields([PageCase({"rate": 1.0}, {}), PageCase({"rate": 1.0}, {})]) == []


def test_a_capacity_is_drawn_on_the_curve_that_the_search_found():
    tried = [Tried(rate, {"ttft": Estimate(ttft)}, ttft <= 1) for rate, ttft in ((2, 0.4), (3, 2.5), (2.5, 0.9))]
    found = PageCase(
        {}, {"rate, requests/s": Estimate(2.5), "ttft": Estimate(0.9)}, True, {}, tried, "rate, requests/s"
    )
    drawn = figure(page([found]), "search-0")
    (line,) = drawn["data"]
    assert (line["x"], line["y"]) == ([2, 2.5, 3], [0.4, 0.9, 2.5])
    limit, capacity = drawn["layout"]["shapes"]
    assert (limit["y0"], capacity["x0"]) == (1.0, 2.5)
    assert drawn["layout"]["xaxis"]["title"]["text"] == "rate, requests/s"


def test_no_axis_and_no_interval_goes_below_nothing():
    text = page([case("wide", 0.2, 0.5, True, (-0.7, 1.7)), case("other", 0.1, 3.0, False, (2.0, 4.0))])
    kept, missed, _ = figure_of(text)["data"]
    assert kept["error_y"]["arrayminus"] == [0.5] and kept["error_y"]["array"] == [1.2]
    assert figure_of(text)["layout"]["xaxis"]["range"][0] == 0


def test_a_logarithmic_axis_has_round_numbers_in_full():
    axis = figure_of(page([case("low", 0.1, 0.03), case("high", 0.2, 1500.0)]))["layout"]["yaxis"]
    assert axis["type"] == "log" and {"0.1", "1", "1,000"} <= set(axis["ticktext"])
    near = figure_of(page([case("low", 0.1, 3.0), case("high", 0.2, 150.0)]))["layout"]["yaxis"]
    assert [text for text, value in zip(near["ticktext"], near["tickvals"], strict=True) if 3 <= value <= 150] == [
        *("5", "10", "20", "50", "100")
    ]


def test_equal_arguments_give_equal_pages():
    assert page() == page()
