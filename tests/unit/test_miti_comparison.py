import numpy as np
import pytest

from milm_ray.miti.comparison import compare, compare_pooled, pooled_ratio
from milm_ray.miti.summary import Coding, CodingError


def group(name, questions, **options):
    return [
        Coding(f"{name}-{i}", "x", name, {"question": q}, **options)
        for i, q in enumerate(questions)
    ]


def compared(first, second, variable="question", **options):
    found = compare(group("a", first), group("b", second), **options)
    return next(c for c in found if c.variable == variable)


def test_effect_sizes_by_hand():
    """Means 2 and 5, both with variance 1: d = 3, corrected by 1 - 3 / (4 * 4 - 1) = .8."""
    found = compared([1, 2, 3], [4, 5, 6])
    assert found.difference.value == 3
    assert found.hedges_g.value == pytest.approx(3 * 0.8)
    assert found.cliffs_delta.value == 1
    assert (found.first_n, found.second_n) == (3, 3)


def test_cliffs_delta_counts_ties_as_neither():
    """Of the pairs (1,1) (1,3) (2,1) (2,3) two are larger, one smaller, one equal."""
    assert compared([1, 2], [1, 3]).cliffs_delta.value == pytest.approx(1 / 4)


def test_permutation_p_is_near_the_exact_one():
    """Of the 20 ways to split 1…6 in threes only two part them so far: p = .1."""
    assert compared([1, 2, 3], [4, 5, 6], resamples=20_000).p == pytest.approx(0.1, abs=0.01)
    assert compared([1, 2, 3], [1, 2, 3]).p == 1


def test_intervals_hold_the_estimate_and_follow_the_seed():
    rng = np.random.default_rng(1)
    first, second = rng.normal(5, 1, 12).clip(0), rng.normal(6, 1, 12).clip(0)
    found = compared(first, second)
    for estimate in (found.difference, found.hedges_g, found.cliffs_delta):
        assert estimate.low < estimate.value < estimate.high
    assert found == compared(first, second)
    assert found.difference.low != compared(first, second, seed=1).difference.low


def test_what_is_undefined_stays_so():
    ratio = compared([1, 2], [0, 0], "reflection_to_question")
    assert (ratio.first_n, ratio.second_n) == (2, 0)
    assert ratio.difference.value is ratio.p is None
    flat = compared([2, 2], [2, 2])
    assert (flat.difference.value, flat.hedges_g.value, flat.cliffs_delta.value) == (0, None, 0)
    single = compared([1], [3])
    assert (single.difference.value, single.difference.low, single.p) == (2, None, None)


def test_people_are_not_compared_with_a_model():
    with pytest.raises(CodingError, match="automatically"):
        compare(group("a", [1, 2]), group("b", [1, 2], automatic=True))


REFLECTIONS = ("complex_reflection", "simple_reflection")


def reflecting(name, pairs, **options):
    """Codings with (complex, simple) reflections."""
    return [
        Coding(
            f"{name}-{i}", "x", name, {"complex_reflection": c, "simple_reflection": s}, **options
        )
        for i, (c, s) in enumerate(pairs)
    ]


def test_pooled_ratios_weigh_dialogues_by_what_they_hold():
    """Means of ratios 1/2 and 1/2; pooled 1/11 and 10/11, a difference of 9/11."""
    low, high = reflecting("a", [(1, 0), (0, 10)]), reflecting("b", [(0, 1), (10, 0)])
    by_name = {c.variable: c for c in compare_pooled(low, high)}
    found = by_name["complex_reflection_ratio"]
    assert found.difference.value == pytest.approx(9 / 11)
    assert found.difference.low < 9 / 11 < found.difference.high
    assert found.pooled
    assert found.hedges_g.value is found.cliffs_delta.value is found.p is None
    assert (found.first_n, found.second_n) == (2, 2)
    assert by_name["reflection_to_question"].difference.value is None  # nobody asked a question
    plain = {c.variable: c for c in compare(low, high)}["complex_reflection_ratio"]
    assert plain.difference.value == 0


def test_a_pooled_ratio_has_an_interval_and_no_value_outside_the_coders_scope():
    codings = reflecting("a", [(1, 1), (4, 0), (0, 3)])
    found = pooled_ratio(codings, "complex_reflection_ratio")
    assert found.value == pytest.approx(5 / 9)
    assert 0 <= found.low < found.value < found.high <= 1
    scope = ("simple_reflection", "complex_reflection")
    narrow = reflecting("a", [(1, 1), (4, 0)], scope=scope)
    assert pooled_ratio(narrow, "reflection_to_question").value is None
    assert [c.variable for c in compare_pooled(narrow, narrow)] == ["complex_reflection_ratio"]
    assert pooled_ratio(codings[:1], "complex_reflection_ratio").low is None
