"""Intervals and paired tests over rounds that are grouped in dialogues.

Rounds of one dialogue share a client, a topic and a history, so they are not independent.
Resampling whole dialogues (the cluster bootstrap; Field and Welsh 2007) and flipping the sign of
whole dialogues (a cluster permutation test) keep that dependence; treating rounds as independent
would make intervals too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from milm_ray.errors import UserError

_CELLS = 4_000_000  # weights held at one time, so that memory does not grow with the resamples
_EXACT = 14  # up to this many dialogues every sign pattern is tried


@dataclass(frozen=True)
class Interval:
    """A mean over rows with its percentile interval; low and high are None for one cluster."""

    mean: float
    low: float | None
    high: float | None
    rows: int
    clusters: int

    def row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PairedDifference:
    """Mean of second - first over paired rows, its interval, and the two-sided p value."""

    first: float
    second: float
    difference: Interval
    p: float | None
    exact: bool

    def row(self) -> dict[str, Any]:
        return asdict(self)


def bootstrap_mean(
    values: ArrayLike,
    clusters: Sequence[Any],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of `values` with a percentile interval from resampling whole clusters.

    values: one number per row; clusters: the row's cluster (dialogue id). The mean weighs rows
    alike, so a resample's mean is the ratio of two sums. Raises UserError when there is no row,
    the lengths differ, or a value is not finite.
    """
    data, index, count = _grouped(values, clusters)
    means = _bootstrap(data, index, count, resamples, seed)
    return _interval(data, means, count, level)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    clusters: Sequence[Any],
    *,
    resamples: int = 2000,
    permutations: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Whether `second` differs from `first` on the same rows (adapter against base).

    The p value is two-sided: how often the mean difference is at least as far from 0 when each
    cluster's differences keep or change their sign together at random. Every pattern is tried up
    to 14 clusters (exact); beyond, `permutations` random ones, the observed one counted in, so p
    is never 0. None for a single cluster. Raises UserError as `bootstrap_mean` does.
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    if a.shape != b.shape:
        raise UserError(
            f"{a.size} first values but {b.size} second ones", "pair the rows before comparing them"
        )
    data, index, count = _grouped(b - a, clusters)
    means = _bootstrap(data, index, count, resamples, seed)
    p, exact = _sign_flip(np.bincount(index, data, count).astype(float), permutations, seed)
    return PairedDifference(
        float(a.mean()), float(b.mean()), _interval(data, means, count, level), p, exact
    )


def _grouped(
    values: ArrayLike, clusters: Sequence[Any]
) -> tuple[NDArray[np.float64], NDArray[np.int64], int]:
    data = np.asarray(values, float)
    if data.ndim != 1 or len(data) != len(clusters):
        raise UserError(
            f"{data.size} values but {len(clusters)} cluster ids", "give one cluster id per value"
        )
    if not len(data):
        raise UserError("no values to average", "score at least one prediction first")
    if not np.isfinite(data).all():
        raise UserError(
            f"{int((~np.isfinite(data)).sum())} values are not finite numbers",
            "drop undefined values first and report how many there were",
        )
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    return data, index.astype(np.int64), len(names)


def _bootstrap(
    data: NDArray[np.float64], index: NDArray[np.int64], count: int, resamples: int, seed: int
) -> NDArray[np.float64]:
    """Means of `resamples` draws of `count` clusters with replacement."""
    rng = np.random.default_rng(seed)
    sums = np.bincount(index, data, count)
    sizes = np.bincount(index, minlength=count)
    step = max(1, _CELLS // count)
    means = []
    for at in range(0, resamples, step):
        draws = rng.multinomial(count, np.full(count, 1 / count), min(step, resamples - at))
        means.append((draws @ sums) / (draws @ sizes))
    return np.concatenate(means)


def _interval(
    data: NDArray[np.float64], means: NDArray[np.float64], count: int, level: float
) -> Interval:
    mean = float(data.mean())
    if count < 2:
        return Interval(mean, None, None, len(data), count)
    tail = 50 * (1 - level)
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(mean, float(low), float(high), len(data), count)


def _sign_flip(
    sums: NDArray[np.float64], permutations: int, seed: int
) -> tuple[float | None, bool]:
    """Two-sided p of sum(sums) under random signs of its terms."""
    count = len(sums)
    if count < 2:
        return None, False
    # Sums of the same terms in another order may differ in the last bits.
    observed = abs(sums.sum()) - 1e-9 * np.abs(sums).sum()
    if count <= _EXACT:
        patterns = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        return float((np.abs((1 - 2 * patterns) @ sums) >= observed).mean()), True
    rng = np.random.default_rng([seed, 1])
    step = max(1, _CELLS // count)
    hits = 0
    for at in range(0, permutations, step):
        signs = 1 - 2 * rng.integers(0, 2, (min(step, permutations - at), count), dtype=np.int8)
        hits += int((np.abs(signs @ sums) >= observed).sum())
    return (hits + 1) / (permutations + 1), False
