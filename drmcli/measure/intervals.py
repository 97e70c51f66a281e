"""Means and ratios with intervals clustered by prompt.

Intervals are analytic rather than a bootstrap: the cluster-robust (sandwich) standard error of a ratio sum(w x) / sum(w), in the form
of Wilson's interval. It needs no random numbers, costs one pass, stays inside [0, 100] and holds its coverage for few
prompts and near 100 %, where a percentile bootstrap is too narrow and a symmetric interval leaves the range.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from drmcli.errors import InputError

Interval = tuple[float, float]
NAN = float("nan")
Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval, in the unit of the values."""

    value: float
    ci95: Interval
    n: int
    n_clusters: int
    n_skipped: int
    """Values that are NaN."""


@dataclass(frozen=True)
class Difference:
    """A paired difference a - b: in percent points for accuracies, else in the unit of the values."""

    value: float
    ci95: Interval
    p_value: float
    """Two-sided, of no difference. Rounded to 0 below about 1e-15."""
    a: float
    b: float
    """Each side's own value on the rows that both have."""
    n: int
    """Rows (pairs, for accuracies) in the denominator."""
    n_clusters: int
    n_skipped: int
    """Rows that one of the two lacks."""


def mean_ci(values: np.ndarray, cluster: np.ndarray | None = None) -> Mean:
    """Mean of the values [N] with a 95 % interval clustered by `cluster` [N]; None: every value is a cluster of its
    own.

    NaN values are left out and counted. The interval is NaN for a single value, and a point where clusters do not
    differ.
    """
    values, cluster, kept = _rows(values, cluster)
    ratio = ratio_of(values[kept], np.ones(int(kept.sum())), cluster[kept])
    return Mean(ratio.value, mean_interval(ratio), ratio.n, ratio.n_clusters, int((~kept).sum()))


def paired_ci(a: np.ndarray, b: np.ndarray, cluster: np.ndarray | None = None) -> Difference:
    """Mean of a - b [N], row by row, with a clustered 95 % interval and p-value: judge scores before and after, say."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape:
        raise InputError(
            f"paired values: shapes {a.shape} and {b.shape} differ", hint="give the same rows on both sides"
        )
    difference, cluster, kept = _rows(a - b, cluster)
    ratio = ratio_of(difference[kept], np.ones(int(kept.sum())), cluster[kept])
    mean_a, mean_b = (float(side[kept].mean()) if kept.any() else NAN for side in (a, b))
    interval, n_skipped = mean_interval(ratio), int((~kept).sum())
    return Difference(ratio.value, interval, p_value_of(ratio), mean_a, mean_b, ratio.n, ratio.n_clusters, n_skipped)


@dataclass(frozen=True)
class Ratio:
    """sum(w x) / sum(w) and its cluster-robust standard error."""

    value: float
    se: float
    """NaN for a single cluster; exactly 0 where clusters do not differ."""
    n: int
    n_clusters: int

    @property
    def critical(self) -> float:
        """97.5 % point of Student's t with one degree of freedom fewer than clusters; NaN for a single one."""
        return NAN if self.n_clusters < 2 else t_quantile(self.n_clusters - 1)


def ratio_of(values: np.ndarray, weight: np.ndarray, cluster: np.ndarray) -> Ratio:
    """Linearised ratio estimator: se^2 = G/(G-1) sum_g (sum_i in g of w_i (x_i - ratio))^2 / (sum w)^2 over G clusters.

    With a single cluster its rows are taken as independent, the only reading that gives an interval; it is too narrow
    where they are not.
    """
    used = weight > 0
    values, weight = values[used], weight[used]
    n, total = len(values), weight.sum()
    if n == 0:
        return Ratio(NAN, NAN, 0, 0)
    value = float((weight * values).sum() / total)
    names, group = np.unique(cluster[used], return_inverse=True)
    n_clusters = len(names)
    if n_clusters == 1:
        group, n_clusters = np.arange(n), n
    if n_clusters == 1:
        return Ratio(value, NAN, n, 1)
    residual = np.bincount(group, weight * (values - value))
    se = math.sqrt(n_clusters / (n_clusters - 1) * float((residual**2).sum())) / total
    rounding = 1e-12 * float(np.abs(values).max())
    return Ratio(value, 0.0 if se <= rounding else float(se), n, n_clusters)


def proportion_ci(ratio: Ratio) -> Interval:
    """95 % interval of a proportion in [0, 1]: Wilson's, with the effective sample size p (1 - p) / se^2 and Student's
    t.

    Where no prompt differs from another (0 % and 100 % among them) the standard error is 0 and says nothing: the bound
    is then Wilson's for an event not seen in G prompts, z^2 / (G + z^2), on either side.
    """
    if ratio.n == 0:
        return NAN, NAN
    p = ratio.value
    if not ratio.se > 0:
        slack = unseen_rate(ratio.n_clusters)
        return max(p - slack, 0.0), min(p + slack, 1.0)
    n, z = p * (1 - p) / ratio.se**2, ratio.critical
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def unseen_rate(n: int) -> float:
    """Wilson's 95 % bound on the rate of what was not seen in n trials; 1 for none."""
    return Z95**2 / (n + Z95**2)


def mean_interval(ratio: Ratio) -> Interval:
    if not math.isfinite(ratio.se):
        return NAN, NAN
    return ratio.value - ratio.critical * ratio.se, ratio.value + ratio.critical * ratio.se


def p_value_of(ratio: Ratio) -> float:
    """Two-sided p-value of a ratio of 0 by Student's t; by the sign test where all clusters show the same value."""
    if math.isnan(ratio.value):
        return NAN
    if ratio.value == 0:
        return 1.0
    if not ratio.se > 0:
        return 2.0 ** (1 - ratio.n_clusters)
    return max(0.0, 1 - t_inside(abs(ratio.value) / ratio.se, ratio.n_clusters - 1))


def t_inside(t: float, df: int) -> float:
    """P(|T| <= t) for Student's t, df >= 1 (Abramowitz and Stegun 26.7.3, 26.7.4); the normal one beyond 2000."""
    if df > 2000:
        return 2 * NormalDist().cdf(t) - 1
    theta = math.atan(t / math.sqrt(df))
    cos2 = math.cos(theta) ** 2
    if df % 2:
        k = np.arange(1, (df - 1) // 2)
        series = math.cos(theta) * (1 + np.cumprod(2 * k / (2 * k + 1) * cos2).sum()) if df > 1 else 0.0
        return float(2 / math.pi * (theta + math.sin(theta) * series))
    k = np.arange(1, df // 2)
    return float(math.sin(theta) * (1 + np.cumprod((2 * k - 1) / (2 * k) * cos2).sum()))


@functools.cache
def t_quantile(df: int) -> float:
    """97.5 % point of Student's t: 12.706 for 1 degree of freedom, 2.042 for 30, 1.960 for many."""
    low, high = 0.0, 13.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if t_inside(middle, df) < 0.95 else (low, middle)
    return low


def _rows(values: np.ndarray, cluster: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(values float [N], cluster [N], not NaN bool [N])."""
    values = np.asarray(values, dtype=float)
    cluster = np.arange(len(values)) if cluster is None else np.asarray(cluster)
    if values.ndim != 1 or values.shape != cluster.shape:
        raise InputError(
            f"values and clusters: shapes {values.shape} and {cluster.shape} differ", hint="give one cluster a value"
        )
    return values, cluster, ~np.isnan(values)
