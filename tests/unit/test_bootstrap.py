import numpy as np
import pytest

from milm_ray.errors import UserError
from milm_ray.evaluation.intervals import bootstrap_mean, paired_difference


def test_interval_of_two_equal_clusters_is_known_exactly():
    """Clusters with means 0 and 10: a resample's mean is 0, 5 or 10 with chances 1/4, 1/2, 1/4."""
    result = bootstrap_mean([0, 0, 10, 10], ["a", "a", "b", "b"], resamples=4000)
    assert (result.mean, result.low, result.high) == (5, 0, 10)
    assert (result.rows, result.clusters) == (4, 2)
    half = bootstrap_mean([0, 0, 10, 10], ["a", "a", "b", "b"], resamples=4000, level=0.4)
    assert (half.low, half.high) == (5, 5)


def test_the_mean_weighs_rows_not_dialogues():
    result = bootstrap_mean([1, 1, 1, 5], ["a", "a", "a", "b"])
    assert result.mean == 2
    assert (result.low, result.high) == (1, 5)


def test_repeated_rows_of_a_dialogue_do_not_narrow_the_interval():
    rng = np.random.default_rng(3)
    values = rng.normal(size=40)
    once = bootstrap_mean(values, range(40), seed=7)
    tenfold = bootstrap_mean(np.repeat(values, 10), np.repeat(range(40), 10), seed=7)
    assert tenfold.low == pytest.approx(once.low)
    assert tenfold.high == pytest.approx(once.high)
    as_if_independent = bootstrap_mean(np.repeat(values, 10), range(400), seed=7)
    assert once.high - once.low > 2 * (as_if_independent.high - as_if_independent.low)


def test_coverage_of_a_known_mean():
    """200 studies of 30 dialogues with a shared effect: about 95 in 100 intervals hold the mean."""
    rng = np.random.default_rng(11)
    hits = 0
    for i in range(200):
        effect = rng.normal(size=(30, 1))
        values = (effect + rng.normal(size=(30, 6))).ravel()
        result = bootstrap_mean(values, np.repeat(range(30), 6), resamples=500, seed=i)
        hits += result.low <= 0 <= result.high
    assert 0.88 <= hits / 200 <= 0.98


def test_same_seed_same_interval_whatever_the_block_size(monkeypatch):
    values, clusters = np.arange(60.0), np.repeat(range(20), 3)
    whole = bootstrap_mean(values, clusters, seed=5)
    assert whole == bootstrap_mean(values, clusters, seed=5)
    assert whole != bootstrap_mean(values, clusters, seed=6)
    monkeypatch.setattr("milm_ray.evaluation.intervals._CELLS", 100)
    assert bootstrap_mean(values, clusters, seed=5) == whole


def test_one_dialogue_has_a_mean_but_no_interval():
    result = bootstrap_mean([1, 2, 3], ["a", "a", "a"])
    assert (result.mean, result.low, result.high) == (2, None, None)
    paired = paired_difference([1, 2], [2, 4], ["a", "a"])
    assert paired.p is None


def test_exact_p_of_three_dialogues_by_hand():
    """Sums 1, 2, 3: of the 8 sign patterns only all-plus and all-minus reach |6|."""
    result = paired_difference([0, 0, 0], [1, 2, 3], ["a", "b", "c"])
    assert result.exact
    assert result.p == pytest.approx(2 / 8)
    assert (result.first, result.second, result.difference.mean) == (0, 2, 2)
    # |2|: + - + (2), its mirror, and the patterns that reach more: 3 pairs of 8.
    mixed = paired_difference([0, 2, 0], [1, 0, 3], ["a", "b", "c"])
    assert mixed.p == pytest.approx(6 / 8)


def test_no_difference_has_p_one():
    assert paired_difference([3, 3, 4], [3, 3, 4], ["a", "b", "c"]).p == 1
    many = paired_difference(np.ones(30), np.ones(30), range(30))
    assert (many.p, many.exact) == (1, False)


def test_random_permutations_agree_with_the_exact_p(monkeypatch):
    rng = np.random.default_rng(2)
    base = rng.normal(size=12)
    adapter = base + rng.normal(0.4, 1, size=12)
    exact = paired_difference(base, adapter, range(12))
    monkeypatch.setattr("milm_ray.evaluation.intervals._EXACT", 2)
    sampled = paired_difference(base, adapter, range(12), permutations=20_000)
    assert exact.exact
    assert not sampled.exact
    assert sampled.p == pytest.approx(exact.p, abs=0.015)


def test_a_clear_gain_is_significant_and_p_is_never_zero():
    base = np.tile([1.0, 2.0], 20)
    result = paired_difference(base, base + 5, np.repeat(range(20), 2), permutations=999)
    assert result.p == pytest.approx(1 / 1000)
    assert result.difference.low == result.difference.high == 5


def test_p_is_right_under_the_null():
    """With no effect but strong dialogue effects, about 5 in 100 tests reach p <= .05."""
    rng = np.random.default_rng(4)
    hits = 0
    for i in range(300):
        effect = rng.normal(size=(10, 1))
        differences = (effect + 0.3 * rng.normal(size=(10, 5))).ravel()
        result = paired_difference(
            np.zeros(50), differences, np.repeat(range(10), 5), resamples=100, seed=i
        )
        hits += result.p <= 0.05
    assert 0.02 <= hits / 300 <= 0.09


@pytest.mark.parametrize(
    ("values", "clusters", "named"),
    [
        ([], [], "no values"),
        ([1, 2], ["a"], "2 values but 1 cluster ids"),
        ([1, float("nan")], ["a", "b"], "1 values are not finite"),
    ],
)
def test_unusable_values_are_refused(values, clusters, named):
    with pytest.raises(UserError, match=named):
        bootstrap_mean(values, clusters)
    with pytest.raises(UserError, match="pair the rows"):
        paired_difference([1, 2], [1], ["a", "b"])
