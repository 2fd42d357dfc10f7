"""Agreement between coders, with intervals: ICC for scores, kappa and alpha for codes.

Intervals resample whole clusters (dialogues), since the utterances of a dialogue are coded by the
same people about the same client. Krippendorff's alpha is that of the `krippendorff` package; the
ICCs (Shrout and Fleiss 1979; McGraw and Wong 1996) and the kappas (Cohen 1960, 1968; Fleiss 1971)
are a few sums and are computed here, since a bootstrap asks for them thousands of times (a test
holds Cohen's against scikit-learn).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from milm_ray.errors import UserError

Level = Literal["nominal", "ordinal", "interval", "ratio"]
Statistic = Callable[[NDArray[np.int64]], float]
RESAMPLES = 1000


@dataclass(frozen=True)
class Agreement:
    """An agreement figure with a 95 % percentile interval.

    value is None when it is undefined (reason says why); low and high are None when fewer than
    half of the resamples define it. items are the rows that entered, clusters their dialogues.
    """

    value: float | None
    low: float | None
    high: float | None
    items: int
    clusters: int
    reason: str = ""


def icc(ratings: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Agreement]:
    """ICC(2,1) under "single" and ICC(2,k) under "average": two-way random, absolute agreement.

    ratings: dialogues × coders; a dialogue that any coder left out (NaN) is not used. The first
    is the reliability of one coder's score, the second that of the mean of all k.
    Raises UserError for fewer than two coders.
    """
    table = np.asarray(ratings, float)
    if table.ndim != 2 or table.shape[1] < 2:
        raise UserError("agreement needs at least two coders", "have the dialogues coded again")
    table = table[~np.isnan(table).any(axis=1)]
    every = np.arange(len(table))

    def single(rows: NDArray[np.int64]) -> float:
        return _icc(table[rows], 1)

    def average(rows: NDArray[np.int64]) -> float:
        return _icc(table[rows], table.shape[1])

    flat = "scores do not vary"
    return {
        "single": _with_interval(single, every, resamples, seed, flat),
        "average": _with_interval(average, every, resamples, seed, flat),
    }


def cohen_kappa(
    first: Sequence[Any],
    second: Sequence[Any],
    clusters: Sequence[Any],
    *,
    weights: Literal["linear", "quadratic"] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Agreement:
    """Cohen's kappa of two coders' labels of the same items; weighted for ordered labels."""
    _same_length(len(first), second=len(second), clusters=len(clusters))
    names = sorted({*first, *second}, key=lambda label: (str(type(label)), label))
    position = {name: i for i, name in enumerate(names)}
    a = np.array([position[label] for label in first], np.int64)
    b = np.array([position[label] for label in second], np.int64)

    places = np.arange(len(names))
    apart = np.abs(places[:, None] - places)
    cost = {None: (apart > 0).astype(float), "linear": apart, "quadratic": apart**2}[weights]

    def kappa(rows: NDArray[np.int64]) -> float:
        pairs = np.bincount(a[rows] * len(names) + b[rows], minlength=cost.size)
        seen = pairs.reshape(cost.shape)
        chance = np.outer(seen.sum(axis=1), seen.sum(axis=0)) / max(1, seen.sum())
        expected = (cost * chance).sum()
        return float(1 - (cost * seen).sum() / expected) if expected > 0 else np.nan

    return _with_interval(kappa, _codes(clusters), resamples, seed, "only one label occurs")


def fleiss_kappa(
    labels: Sequence[Sequence[Any]],
    clusters: Sequence[Any],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Agreement:
    """Fleiss' kappa: items × coders, every item labelled by the same number of coders (>= 2)."""
    _same_length(len(labels), clusters=len(clusters))
    coders = {len(row) for row in labels}
    if len(coders) > 1 or (coders and min(coders) < 2):
        raise UserError(
            f"Fleiss' kappa needs the same number of coders (at least 2) for every item, not "
            f"{', '.join(map(str, sorted(coders)))}",
            "use Krippendorff's alpha, which allows missing labels",
        )
    names = sorted({label for row in labels for label in row}, key=str)
    counts = np.array([[list(row).count(name) for name in names] for row in labels], float)
    return _with_interval(
        lambda rows: _fleiss(counts[rows]),
        _codes(clusters),
        resamples,
        seed,
        "only one label occurs",
    )


def krippendorff_alpha(
    labels: Sequence[Sequence[Any]],
    clusters: Sequence[Any],
    *,
    level: Level = "nominal",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Agreement:
    """Krippendorff's alpha: items × coders, None where a coder gave no label.

    Labels are numbers for level ordinal, interval and ratio, anything that compares equal for
    nominal. An item with fewer than two labels does not count.
    """
    _same_length(len(labels), clusters=len(clusters))
    if level == "nominal":
        names = {label for row in labels for label in row if label is not None}
        number = {name: float(i) for i, name in enumerate(sorted(names, key=str))}
        values = [[np.nan if v is None else number[v] for v in row] for row in labels]
    else:
        values = [[np.nan if v is None else float(v) for v in row] for row in labels]
    table = np.array(values, float).reshape(len(labels), -1)
    paired = (~np.isnan(table)).sum(axis=1) >= 2
    table = table[paired]
    domain = np.unique(table[~np.isnan(table)])

    def alpha(rows: NDArray[np.int64]) -> float:
        import krippendorff

        picked = table[rows]
        if len(np.unique(picked[~np.isnan(picked)])) < 2:
            return np.nan
        return float(
            krippendorff.alpha(
                reliability_data=picked.T, value_domain=domain, level_of_measurement=level
            )
        )

    kept = [cluster for cluster, keep in zip(clusters, paired, strict=True) if keep]
    return _with_interval(alpha, _codes(kept), resamples, seed, "only one label occurs")


def _icc(table: NDArray[np.float64], k: int) -> float:
    """ICC(2,k) from the mean squares of a two-way layout; k is 1 or the number of coders."""
    n, coders = table.shape
    if n < 2:
        return np.nan
    grand = table.mean()
    rows = coders * ((table.mean(axis=1) - grand) ** 2).sum() / (n - 1)
    columns = n * ((table.mean(axis=0) - grand) ** 2).sum() / (coders - 1)
    total = ((table - grand) ** 2).sum()
    error = (total - rows * (n - 1) - columns * (coders - 1)) / ((n - 1) * (coders - 1))
    if total <= 1e-12:
        return np.nan
    if k == 1:
        below = rows + (coders - 1) * error + coders * (columns - error) / n
    else:
        below = rows + (columns - error) / n
    return float((rows - error) / below) if abs(below) > 1e-12 else np.nan


def _fleiss(counts: NDArray[np.float64]) -> float:
    """Fleiss' kappa from items × labels, the number of coders who gave each."""
    if not counts.size:
        return np.nan
    coders = counts[0].sum()
    observed = ((counts**2).sum(axis=1) - coders).mean() / (coders * (coders - 1))
    chance = ((counts.sum(axis=0) / counts.sum()) ** 2).sum()
    return float((observed - chance) / (1 - chance)) if chance < 1 else np.nan


def _codes(clusters: Sequence[Any]) -> NDArray[np.int64]:
    position: dict[Any, int] = {}
    return np.array([position.setdefault(c, len(position)) for c in clusters], np.int64)


def _same_length(items: int, **others: int) -> None:
    for name, length in others.items():
        if length != items:
            raise UserError(f"{items} items but {length} {name}", "give one entry per item to each")


def _with_interval(
    statistic: Statistic, clusters: NDArray[np.int64], resamples: int, seed: int, reason: str
) -> Agreement:
    """The statistic on all rows, and its percentiles when whole clusters are resampled."""
    count = int(clusters.max()) + 1 if len(clusters) else 0
    value = statistic(np.arange(len(clusters))) if count else np.nan
    if np.isnan(value):
        why = reason if count else "no item was coded by two coders"
        return Agreement(None, None, None, len(clusters), count, why)
    members = [np.flatnonzero(clusters == c) for c in range(count)]
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, count, (resamples if count > 1 else 0, count))
    found = np.array([statistic(np.concatenate([members[c] for c in draw])) for draw in draws])
    found = found[~np.isnan(found)]
    if count < 2 or len(found) < resamples / 2:
        return Agreement(value, None, None, len(clusters), count)
    low, high = np.percentile(found, [2.5, 97.5])
    return Agreement(value, float(low), float(high), len(clusters), count)
