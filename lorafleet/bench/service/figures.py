"""Numbers made of what callers saw: quantiles, slopes, and how well times tell two kinds apart. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Verdict(NamedTuple):
    """A figure beside what was wanted of it."""

    scenario: str
    figure: str
    found: float
    wanted: str
    met: bool


class Area(NamedTuple):
    """The area under a receiver operating characteristic, with a 95 % interval."""

    area: float
    low: float
    high: float


def quantile(values: Sequence[float], q: float) -> float:
    """The least of the values that at least a share q of them does not exceed; NaN of none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the least-squares line through the points; NaN of fewer than two."""
    if len(xs) < 2:
        return math.nan
    x, y = np.asarray(xs, float), np.asarray(ys, float)
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum())


def roc_area(positive: Sequence[float], negative: Sequence[float]) -> Area:
    """The chance that a positive's score is above a negative's, ties counting half (Mann and Whitney 1947).

    The interval is Hanley and McNeil's (1982, "The meaning and use of the area under a receiver operating
    characteristic (ROC) curve"): area ± 1.96 standard errors.
    """
    n, m = len(positive), len(negative)
    if not n or not m:
        return Area(math.nan, math.nan, math.nan)
    order = np.sort(np.asarray(negative, float))
    scores = np.asarray(positive, float)
    below, upto = np.searchsorted(order, scores, "left"), np.searchsorted(order, scores, "right")
    area = float((below + upto).sum() / (2 * n * m))
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (area * (1 - area) + (n - 1) * (q1 - area**2) + (m - 1) * (q2 - area**2)) / (n * m)
    error = 1.96 * math.sqrt(max(0.0, variance))
    return Area(area, area - error, area + error)
