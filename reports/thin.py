"""Thinning: fewer points of a long series that still show its lowest and highest values.

Each function returns the indices of the points to keep, in rising order, and keeps all where there are few enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

BUCKETS = 500
"""Stretches into which a long line is cut; each keeps up to four points."""

LINE_POINTS = 4 * BUCKETS
"""The most points that a line is drawn with."""

CLOUD_POINTS = 2000
"""The most points that a scatter is drawn with."""

CURVE_POINTS = 800
"""The most points that a cumulative distribution is drawn with."""


FINE_BINS, GROUPS = 3000, 300
"""Stretches of time that a long line keeps the lowest, mean and highest value of, and those that are drawn at once."""


@dataclass(frozen=True)
class Bins:
    """A line that holds each value until the next, in equal stretches of time.

    Attributes:
        begin_s, width_s: of the first, and of each.
        low, mean, high: of each, the mean weighted by time.
    """

    begin_s: float
    width_s: float
    low: np.ndarray
    mean: np.ndarray
    high: np.ndarray

    def grouped(self, groups: int = GROUPS) -> Bins:
        """At most so many stretches, each of them several of these together."""
        size = -(-len(self.low) // groups)
        starts = np.arange(0, len(self.low), size)
        counts = np.diff(np.append(starts, len(self.low)))
        return Bins(
            self.begin_s,
            self.width_s * size,
            np.minimum.reduceat(self.low, starts),
            np.add.reduceat(self.mean, starts) / counts,
            np.maximum.reduceat(self.high, starts),
        )

    @property
    def starts_s(self) -> np.ndarray:
        """When each begins."""
        return self.begin_s + self.width_s * np.arange(len(self.low))


def binned(x: np.ndarray, y: np.ndarray, begin: float, end: float, bins: int = FINE_BINS) -> Bins:
    """A step line in equal stretches from `begin` to `end`; before its first point it is 0.

    Args:
        x: rising, not necessarily strictly.
        y: as many values; each holds until the next x.
    """
    edges = np.linspace(begin, end, bins + 1)
    at = np.searchsorted(x, edges[:-1], "right") - 1
    held = np.where(at >= 0, y[np.maximum(at, 0)], 0)
    inside = (x > begin) & (x < end)
    times, values = np.concatenate([edges[:-1], x[inside]]), np.concatenate([held, y[inside]])
    order = np.argsort(times, kind="stable")
    times, values = times[order], values[order]
    starts = np.flatnonzero(order < bins)
    # A value that is replaced at once, by another at the same time, is none that the line had.
    lasts = np.diff(np.append(times, end))
    low, high = np.where(lasts > 0, values, np.inf), np.where(lasts > 0, values, -np.inf)
    return Bins(
        float(edges[0]),
        float(edges[1] - edges[0]),
        np.minimum.reduceat(low, starts).astype(np.int64),
        np.add.reduceat(values * lasts, starts) / np.add.reduceat(lasts, starts),
        np.maximum.reduceat(high, starts).astype(np.int64),
    )


def thin_line(x: np.ndarray, y: np.ndarray, buckets: int = BUCKETS) -> np.ndarray:
    """At most `4 * buckets` points of a line: the first, lowest, highest and last of each equal stretch of x.

    Drawn no wider than `buckets` pixels the thinned line covers the pixels of the whole one (M4: Jugel et al., "M4: A
    Visualization-Oriented Time Series Data Aggregation", VLDB 2014).

    Args:
        x: rising, not necessarily strictly.
        y: as many values.
    """
    if len(x) <= 4 * buckets:
        return np.arange(len(x))
    edges = np.searchsorted(x, np.linspace(x[0], x[-1], buckets + 1)[1:-1])
    kept: set[int] = set()
    for begin, end in pairwise([0, *edges.tolist(), len(x)]):
        if begin < end:
            values = y[begin:end]
            kept |= {begin, begin + int(values.argmin()), begin + int(values.argmax()), end - 1}
    return np.array(sorted(kept))


def thin_cloud(x: np.ndarray, y: np.ndarray, most: int = CLOUD_POINTS) -> np.ndarray:
    """At most `most` points of a scatter: the extremes of y along x, and an even choice of the others.

    A quarter of the points, or less, are the first, lowest, highest and last of equal stretches of x.
    """
    if len(x) <= most:
        return np.arange(len(x))
    order = np.lexsort((y, x))
    extremes = order[thin_line(x[order], y[order], most // 16)]
    others = np.setdiff1d(np.arange(len(x)), extremes)
    evenly = np.linspace(0, len(others) - 1, most - len(extremes)).astype(np.int64)
    return np.union1d(extremes, others[evenly])


def thin_curve(values: np.ndarray, ranks: np.ndarray, most: int = CURVE_POINTS) -> np.ndarray:
    """At most `most` points of a cumulative distribution, its first and last among them.

    Half of them are even in rank, so that the steep part keeps its shape, half in value, so that the tail does.

    Args:
        values: sorted.
        ranks: rising with them.
    """
    if len(values) <= most:
        return np.arange(len(values))
    even = (np.searchsorted(axis, np.linspace(axis[0], axis[-1], most // 2)) for axis in (values, ranks))
    return np.union1d(*even)
