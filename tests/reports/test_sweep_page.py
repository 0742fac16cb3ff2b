"""The page of a sweep: its table, its figures, and the front of what nothing beats."""

import json
import re

from hypothesis import given
from hypothesis import strategies as st

from twinserve.reports.sweep import Axis, Estimate, PageCase, pareto_front, sweep_page

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
    for cell in ('<th scope="row">mixed</th>', '<th scope="row">&lt;other&gt;</th>', '<td data-value="0.5">0.5000 ± 0.1000</td>', "<td>p99 TTFT &lt;= 1 s</td>"):
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
    assert "Nothing to draw" in page([case("none", None, 1.0)])


def test_equal_arguments_give_equal_pages():
    assert page() == page()
