"""Two groups of coded dialogues against each other: difference, effect sizes, intervals, p.

With about ten dialogues a group the figures are wide, and an interval says so better than a p
value alone does. Nothing here corrects for the number of variables compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from milm_ray.miti.summary import RATIOS, Coding, CodingError, dialogue_values, ratio_parts

Values = NDArray[np.float64]
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % percentile interval; None where it is undefined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """One variable in two groups; differences are second - first.

    hedges_g is the standardised mean difference with the small-sample correction (Hedges 1981);
    cliffs_delta is P(second > first) - P(second < first), which needs no normal distribution
    (Cliff 1993); p is of a two-sided permutation test of the means. pooled: a ratio of summed
    counts, which has an interval and neither effect sizes nor p.
    """

    variable: str
    first_n: int
    second_n: int
    difference: Estimate
    hedges_g: Estimate
    cliffs_delta: Estimate
    p: float | None
    pooled: bool = False


def compare(
    first: Sequence[Coding],
    second: Sequence[Coding],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Comparison]:
    """Every count, global score and summary score of two groups, by dialogue.

    Coders of a dialogue are averaged first, and a variable is compared over the dialogues where
    it is defined; with fewer than two in a group there is no interval and no p. Raises
    CodingError when one group was coded by people and the other automatically.
    """
    a, b = dialogue_values(first), dialogue_values(second)
    _same_way(first, second)
    return [_compare(name, a[name], b[name], resamples, seed) for name in a]


def compare_pooled(
    first: Sequence[Coding],
    second: Sequence[Coding],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Comparison]:
    """The ratios of summed counts in two groups, where a dialogue weighs by what it holds.

    A mean of ratios gives a dialogue with one reflection the weight of one with forty. Intervals
    resample dialogues. There is no p: a permutation that hands dialogues with many counts to a
    group that has few makes the ratio look steadier than it is. Ratios outside the coders' scope
    are left out. Raises CodingError as `compare` does.
    """
    _same_way(first, second)
    found = []
    for ratio in RATIOS:
        x, y = ratio_parts(first, ratio), ratio_parts(second, ratio)
        if x is None or y is None:
            continue
        rng = np.random.default_rng(seed)
        enough = min(len(x), len(y)) >= 2
        drawn = _pooled_draws(y, resamples, rng) - _pooled_draws(x, resamples, rng)
        value = float(_pooled(y.sum(axis=0)) - _pooled(x.sum(axis=0)))
        nothing = Estimate(None, None, None)
        found.append(
            Comparison(
                ratio,
                len(x),
                len(y),
                _estimate(value, drawn if enough else None),
                nothing,
                nothing,
                None,
                pooled=True,
            )
        )
    return found


def pooled_ratio(
    codings: Sequence[Coding], ratio: str, *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """A group's ratio of summed counts, with its interval by dialogue."""
    parts = ratio_parts(codings, ratio)
    if parts is None:
        return Estimate(None, None, None)
    drawn = _pooled_draws(parts, resamples, np.random.default_rng(seed))
    return _estimate(float(_pooled(parts.sum(axis=0))), drawn if len(parts) >= 2 else None)


def _same_way(first: Sequence[Coding], second: Sequence[Coding]) -> None:
    if first[0].automatic != second[0].automatic:
        raise CodingError(
            "one group was coded by people and the other automatically",
            "compare groups that were coded in the same way",
        )


def _pooled(sums: Values) -> Values:
    """Upper over lower part, the last axis; NaN where the lower is 0."""
    lower = np.where(sums[..., 1] > 0, sums[..., 1], np.nan)
    return sums[..., 0] / lower


def _pooled_draws(parts: Values, resamples: int, rng: np.random.Generator) -> Values:
    return _pooled(parts[rng.integers(0, len(parts), (resamples, len(parts)))].sum(axis=1))


def _estimate(value: float, drawn: Values | None) -> Estimate:
    """A value with the percentiles of its resamples, if most of them define it."""
    if np.isnan(value):
        return Estimate(None, None, None)
    kept = drawn[~np.isnan(drawn)] if drawn is not None else np.array([])
    if drawn is None or len(kept) < len(drawn) / 2:
        return Estimate(value, None, None)
    low, high = np.percentile(kept, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def _compare(
    variable: str,
    first: Sequence[float | None],
    second: Sequence[float | None],
    resamples: int,
    seed: int,
) -> Comparison:
    x = np.array([v for v in first if v is not None], float)
    y = np.array([v for v in second if v is not None], float)
    rng = np.random.default_rng(seed)
    enough = min(len(x), len(y)) >= 2
    xs = x[rng.integers(0, len(x), (resamples, len(x)))] if enough else None
    ys = y[rng.integers(0, len(y), (resamples, len(y)))] if enough else None

    def estimate(statistic: Callable[[Values, Values], Values]) -> Estimate:
        if not len(x) or not len(y):
            return Estimate(None, None, None)
        value = float(statistic(x[None], y[None])[0])
        return _estimate(value, None if xs is None or ys is None else statistic(xs, ys))

    return Comparison(
        variable,
        len(x),
        len(y),
        estimate(_difference),
        estimate(_hedges_g),
        estimate(_cliffs_delta),
        _permutation_p(x, y, resamples, rng) if enough else None,
    )


def _difference(x: Values, y: Values) -> Values:
    return y.mean(axis=1) - x.mean(axis=1)


def _hedges_g(x: Values, y: Values) -> Values:
    """NaN where neither group varies or one has a single value."""
    n, m = x.shape[1], y.shape[1]
    if min(n, m) < 2:
        return np.full(len(x), np.nan)
    freedom = n + m - 2
    pooled = ((n - 1) * x.var(axis=1, ddof=1) + (m - 1) * y.var(axis=1, ddof=1)) / freedom
    spread = np.sqrt(np.where(pooled > 1e-12, pooled, np.nan))
    return (1 - 3 / (4 * freedom - 1)) * _difference(x, y) / spread


def _cliffs_delta(x: Values, y: Values) -> Values:
    return np.sign(y[:, :, None] - x[:, None, :]).mean(axis=(1, 2))


def _permutation_p(x: Values, y: Values, permutations: int, rng: np.random.Generator) -> float:
    """How often a random split of all values differs in its means at least as much."""
    everything = np.concatenate([x, y])
    shuffled = rng.permuted(np.tile(everything, (permutations, 1)), axis=1)
    found = np.abs(_difference(shuffled[:, : len(x)], shuffled[:, len(x) :]))
    observed = abs(y.mean() - x.mean())
    # The same values summed in another order may differ in the last bits.
    slack = 1e-9 * max(1.0, float(np.abs(everything).max()))
    return float(((found >= observed - slack).sum() + 1) / (permutations + 1))
