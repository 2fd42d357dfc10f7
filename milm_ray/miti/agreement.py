"""Agreement between coders, with intervals: ICC for scores, kappa and alpha for codes.

The figures are those of libraries: ICCs with their intervals of `pingouin`, kappas of
`statsmodels`, alpha of the `krippendorff` package. What those leave open is done here: the
intervals of kappa and alpha resample whole clusters (dialogues), since the utterances of a dialogue
are coded by the same people about the same client, and an undefined figure has a reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from milm_ray.errors import UserError

Level = Literal["nominal", "ordinal", "interval", "ratio"]
Statistic = Callable[[NDArray[np.int64]], float]  # the figure of the clusters drawn
RESAMPLES = 1000
_LEAST_SCORES = 5  # pingouin's ICC takes no fewer
_HUGE = 1e6


@dataclass(frozen=True)
class Agreement:
    """An agreement figure with a 95 % interval.

    value is None when it is undefined (reason says why); low and high are None when no interval
    can be given: of an ICC without error or far below zero, of a kappa or alpha that fewer than
    half of the resamples define. items are the rows that entered, clusters their dialogues.
    """

    value: float | None
    low: float | None
    high: float | None
    items: int
    clusters: int
    reason: str = ""


def icc(ratings: ArrayLike) -> dict[str, Agreement]:
    """ICC(2,1) under "single" and ICC(2,k) under "average": two-way random, absolute agreement.

    ratings: dialogues × coders; a dialogue that any coder left out (NaN) is not used. The first
    is the reliability of one coder's score, the second that of the mean of all k (Shrout and
    Fleiss 1979; ICC(A,1) and ICC(A,k) in McGraw and Wong 1996). Their intervals are analytic, from
    F distributions (McGraw and Wong 1996, table 7): they allow for other coders as well as other
    dialogues, which a resample of dialogues would not, and take scores as normal.
    Raises UserError for fewer than two coders.
    """
    table = np.asarray(ratings, float)
    if table.ndim != 2 or table.shape[1] < 2:
        raise UserError("agreement needs at least two coders", "have the dialogues coded again")
    table = table[~np.isnan(table).any(axis=1)]
    n = len(table)
    reason = ""
    if n < 2 or table.size < _LEAST_SCORES:
        reason = "too few dialogues"
    elif np.ptp(table) == 0:
        reason = "scores do not vary"
    if reason:
        undefined = Agreement(None, None, None, n, n, reason)
        return {"single": undefined, "average": undefined}
    import pandas as pd
    import pingouin

    pingouin.options["round.column.CI95"] = None  # else two digits
    dialogue, coder = np.indices(table.shape)
    long = pd.DataFrame(
        {"dialogue": dialogue.ravel(), "coder": coder.ravel(), "score": table.ravel()}
    )
    with np.errstate(all="ignore"):  # no error variance: an infinite F
        found = pingouin.intraclass_corr(long, "dialogue", "coder", "score").set_index("Type")
    return {
        "single": _analytic(found.loc["ICC(A,1)"], n),
        "average": _analytic(found.loc["ICC(A,k)"], n),
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
    """Cohen's kappa of two coders' labels of the same items (1960).

    weights: for ordered labels, how disagreement grows with the distance of two (1968).
    """
    _same_length(len(first), second=len(second), clusters=len(clusters))
    names = sorted({*first, *second}, key=lambda label: (str(type(label)), label))
    position = {name: i for i, name in enumerate(names)}
    a = np.array([position[label] for label in first], np.int64)
    b = np.array([position[label] for label in second], np.int64)

    groups = _codes(clusters)
    # How often each pair of labels occurs in each cluster: a resample is a weighted sum of these.
    pairs = np.zeros((groups.max(initial=-1) + 1, len(names) ** 2))
    np.add.at(pairs, (groups, a * len(names) + b), 1)

    def kappa(drawn: NDArray[np.int64]) -> float:
        from statsmodels.stats.inter_rater import cohens_kappa

        seen = (np.bincount(drawn, minlength=len(pairs)) @ pairs).reshape(len(names), -1)
        if ((seen.sum(axis=0) + seen.sum(axis=1)) > 0).sum() < 2:
            return np.nan
        return float(cohens_kappa(seen, wt=weights, return_results=False))

    return _with_interval(kappa, groups, resamples, seed, "only one label occurs")


def fleiss_kappa(
    labels: Sequence[Sequence[Any]],
    clusters: Sequence[Any],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Agreement:
    """Fleiss' kappa (1971): items × coders, each item labelled by equally many of them (>= 2)."""
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
    groups = _codes(clusters)
    members = _members(groups)

    def kappa(drawn: NDArray[np.int64]) -> float:
        from statsmodels.stats import inter_rater

        picked = counts[np.concatenate([members[c] for c in drawn])]
        if picked.any(axis=0).sum() < 2:
            return np.nan
        return float(inter_rater.fleiss_kappa(picked))

    return _with_interval(kappa, groups, resamples, seed, "only one label occurs")


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
    table = np.array(values, float).reshape(len(labels), len(labels[0]) if labels else 0)
    paired = (~np.isnan(table)).sum(axis=1) >= 2
    table = table[paired]
    domain = np.unique(table[~np.isnan(table)])

    groups = _codes(list(itertools.compress(clusters, paired)))
    members = _members(groups)

    def alpha(drawn: NDArray[np.int64]) -> float:
        import krippendorff

        picked = table[np.concatenate([members[c] for c in drawn])]
        if len(np.unique(picked[~np.isnan(picked)])) < 2:
            return np.nan
        return float(
            krippendorff.alpha(
                reliability_data=picked.T, value_domain=domain, level_of_measurement=level
            )
        )

    return _with_interval(alpha, groups, resamples, seed, "only one label occurs")


def _analytic(row: Any, dialogues: int) -> Agreement:
    """One of pingouin's ICCs; no interval where its bounds are infinite or out of order.

    Where dialogues differ less than the coders' errors alone would make them, the variance that
    an ICC is a share of can be estimated at zero or below: the quotient is then huge or above 1.
    """
    value = float(row["ICC"])
    if not -_HUGE < value <= 1 + 1e-9:
        why = "dialogues differ no more than by chance"
        return Agreement(None, None, None, dialogues, dialogues, why)
    low, high = (float(bound) for bound in row["CI95"])
    if not (np.isfinite([low, high]).all() and low <= value <= high):
        return Agreement(value, None, None, dialogues, dialogues)
    return Agreement(value, low, high, dialogues, dialogues)


def _codes(clusters: Sequence[Any]) -> NDArray[np.int64]:
    position: dict[Any, int] = {}
    return np.array([position.setdefault(c, len(position)) for c in clusters], np.int64)


def _members(clusters: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The rows of each cluster."""
    return [np.flatnonzero(clusters == c) for c in range(clusters.max(initial=-1) + 1)]


def _same_length(items: int, **others: int) -> None:
    for name, length in others.items():
        if length != items:
            raise UserError(f"{items} items but {length} {name}", "give one entry per item to each")


def _with_interval(
    statistic: Statistic, clusters: NDArray[np.int64], resamples: int, seed: int, reason: str
) -> Agreement:
    """The statistic on all clusters, and its percentiles when these are resampled."""
    count = int(clusters.max(initial=-1)) + 1
    value = statistic(np.arange(count)) if count else np.nan
    if np.isnan(value):
        why = reason if count else "no item was coded by two coders"
        return Agreement(None, None, None, len(clusters), count, why)
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, count, (resamples if count > 1 else 0, count))
    found = np.array([statistic(draw) for draw in draws])
    found = found[~np.isnan(found)]
    if count < 2 or len(found) < resamples / 2:
        return Agreement(value, None, None, len(clusters), count)
    low, high = np.percentile(found, [2.5, 97.5])
    return Agreement(value, float(low), float(high), len(clusters), count)
