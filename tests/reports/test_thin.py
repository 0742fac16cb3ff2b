"""Thinning keeps to its number of points and loses no extreme."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinserve.reports.thin import thin_cloud, thin_curve, thin_line

values = st.lists(st.integers(-50, 50), max_size=300)


def rising(gaps: list[int]) -> np.ndarray:
    return np.cumsum(np.abs(np.array(gaps, dtype=np.int64)))


@given(values, st.integers(1, 20), st.data())
def test_a_line_keeps_its_ends_and_the_extremes_of_every_stretch(gaps, buckets, data):
    x = rising(gaps)
    y = np.array(data.draw(st.lists(st.integers(-9, 9), min_size=len(x), max_size=len(x))), dtype=np.int64)
    kept = thin_line(x, y, buckets)
    assert len(kept) <= 4 * buckets or len(x) == 0
    assert kept.tolist() == sorted(set(kept.tolist()))
    if len(x) == 0:
        return
    assert kept[0] == 0 and kept[-1] == len(x) - 1
    if len(x) > 4 * buckets:
        edges = np.searchsorted(x, np.linspace(x[0], x[-1], buckets + 1)[1:-1])
        for stretch in np.split(np.arange(len(x)), edges):
            if len(stretch):
                shown = y[np.intersect1d(kept, stretch)]
                assert (shown.min(), shown.max()) == (y[stretch].min(), y[stretch].max())


@given(values, st.integers(32, 64), st.data())
def test_a_cloud_keeps_its_number_and_its_extremes(xs, most, data):
    x = np.array(xs, dtype=np.int64)
    y = np.array(data.draw(st.lists(st.integers(-9, 9), min_size=len(x), max_size=len(x))), dtype=np.int64)
    kept = thin_cloud(x, y, most)
    assert len(kept) == min(len(x), most)
    assert len(set(kept.tolist())) == len(kept)
    if len(x):
        for column in (x, y):
            assert (column[kept].min(), column[kept].max()) == (column.min(), column.max())


@given(values, st.integers(4, 40))
def test_a_curve_keeps_its_ends(gaps, most):
    x = rising(gaps)
    ranks = np.arange(1, len(x) + 1)
    kept = thin_curve(x, ranks, most)
    assert len(kept) <= max(most, 0)
    if len(x):
        assert (x[kept[0]], x[kept[-1]]) == (x[0], x[-1])


@pytest.mark.parametrize("thin", [thin_line, thin_cloud])
def test_few_points_are_all_kept(thin):
    x = np.arange(2000)
    assert thin(x, x).tolist() == x.tolist()
