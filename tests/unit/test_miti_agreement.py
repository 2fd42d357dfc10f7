"""Agreement figures against examples published with their answers, and by hand."""

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from milm_ray.errors import UserError
from milm_ray.miti.agreement import cohen_kappa, fleiss_kappa, icc, krippendorff_alpha

# Shrout and Fleiss (1979), table 2: six targets, four judges. ICC(2,1) = .29, ICC(2,4) = .62.
SHROUT_FLEISS = [
    [9, 2, 5, 8],
    [6, 1, 3, 2],
    [8, 4, 6, 8],
    [7, 1, 2, 6],
    [10, 5, 6, 9],
    [6, 2, 4, 7],
]

# Fleiss (1971), table 1: 30 patients, six psychiatrists, five diagnoses. Kappa .430.
FLEISS = [
    *("444444", "222555", "233335", "555555", "222444", "113333", "333355", "113334"),
    *("114444", "555555", "144444", "124444", "222333", "144444", "224445", "333335"),
    *("111455", "111112", "224444", "133555", "555555", "244444", "224555", "114444"),
    *("144445", "222224", "111155", "224444", "133333", "555555"),
]

# Krippendorff's own example with missing data: four observers, twelve units.
# Alpha: nominal .743, ordinal .815, interval .849.
KRIPPENDORFF = [
    [1, 1, None, 1],
    [2, 2, 3, 2],
    [3, 3, 3, 3],
    [3, 3, 3, 3],
    [2, 2, 2, 2],
    [1, 2, 3, 4],
    [4, 4, 4, 4],
    [1, 1, 2, 1],
    [2, 2, 2, 2],
    [None, 5, 5, 5],
    [None, None, 1, 1],
    [None, None, 3, None],
]


def test_icc_of_shrout_and_fleiss():
    found = icc(SHROUT_FLEISS)
    assert round(found["single"].value, 2) == 0.29
    assert round(found["average"].value, 2) == 0.62
    assert (found["single"].items, found["single"].clusters) == (6, 6)


def test_intervals_of_icc_are_those_of_mcgraw_and_wong():
    """The example's bounds as R's psych package prints them, ICC2 and ICC2k."""
    found = icc(SHROUT_FLEISS)
    bounds = [(round(each.low, 3), round(each.high, 3)) for each in found.values()]
    assert bounds == [(0.019, 0.761), (0.071, 0.927)]


def test_icc_counts_a_constant_difference_between_coders_as_disagreement():
    scores = np.arange(1.0, 6.0)
    same = icc(np.column_stack([scores, scores]))
    shifted = icc(np.column_stack([scores, scores + 1]))
    assert same["single"].value == pytest.approx(1)
    # MSR 5, MSC 2.5, MSE 0: (5 - 0) / (5 + 0 + 2 * 2.5 / 5) = 5 / 6
    assert shifted["single"].value == pytest.approx(5 / 6)


def test_icc_leaves_out_dialogues_that_a_coder_skipped_and_names_what_is_undefined():
    table = [*SHROUT_FLEISS, [5, float("nan"), 5, 5]]
    assert icc(table)["single"].value == icc(SHROUT_FLEISS)["single"].value
    flat = icc([[3, 3], [3, 3], [3, 3]])["single"]
    assert (flat.value, flat.reason) == (None, "scores do not vary")
    chance = icc([[2, 2], [1, 2], [2, 1]])["average"]
    assert (chance.value, chance.reason) == (None, "dialogues differ no more than by chance")
    few = icc([[1, 2], [3, 4]])["single"]
    assert (few.value, few.reason, few.items) == (None, "too few dialogues", 2)
    with pytest.raises(UserError, match="two coders"):
        icc([[1], [2]])


def test_cohen_kappa_by_hand():
    """50 items: 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no. Observed .7, chance .5: kappa .4."""
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    found = cohen_kappa(first, second, range(50))
    assert found.value == pytest.approx(0.4)
    assert 0.1 < found.low < 0.4 < found.high < 0.7


@pytest.mark.parametrize("weights", [None, "linear", "quadratic"])
def test_cohen_kappa_is_that_of_scikit_learn(weights):
    rng = np.random.default_rng(3)
    for labels in (2, 5):
        first, second = rng.integers(0, labels, (2, 80)).tolist()
        ours = cohen_kappa(first, second, range(80), weights=weights, resamples=2)
        theirs = cohen_kappa_score(first, second, weights=weights)
        assert ours.value == pytest.approx(theirs, abs=1e-12)


def test_weighted_kappa_forgives_near_misses():
    first, second = [1, 2, 3, 4, 5, 1, 5], [2, 2, 3, 5, 5, 1, 4]
    plain = cohen_kappa(first, second, range(7), resamples=50)
    weighted = cohen_kappa(first, second, range(7), weights="quadratic", resamples=50)
    assert weighted.value > plain.value + 0.2


def test_fleiss_kappa_of_fleiss():
    assert round(fleiss_kappa(FLEISS, range(30)).value, 3) == 0.430


def test_fleiss_kappa_by_hand():
    """Three coders, four items; P = (1 + 1 + 1/3 + 1/3) / 4, chance (7/12)^2 + (5/12)^2."""
    labels = [["q", "q", "q"], ["r", "r", "r"], ["q", "q", "r"], ["q", "q", "r"]]
    observed, chance = (1 + 1 + 1 / 3 + 1 / 3) / 4, (7 / 12) ** 2 + (5 / 12) ** 2
    expected = (observed - chance) / (1 - chance)
    assert fleiss_kappa(labels, range(4)).value == pytest.approx(expected)


def test_krippendorffs_example():
    clusters = range(12)
    assert round(krippendorff_alpha(KRIPPENDORFF, clusters).value, 3) == 0.743
    ordinal = krippendorff_alpha(KRIPPENDORFF, clusters, level="ordinal")
    assert round(ordinal.value, 3) == 0.815
    interval = krippendorff_alpha(KRIPPENDORFF, clusters, level="interval")
    assert round(interval.value, 3) == 0.849
    assert interval.items == 11  # the last unit has one label


def test_one_label_only_is_undefined_not_perfect():
    for found in (
        cohen_kappa(["q", "q"], ["q", "q"], [0, 1]),
        fleiss_kappa([["q", "q"], ["q", "q"]], [0, 1]),
        krippendorff_alpha([["q", "q"], ["q", "q"]], [0, 1]),
    ):
        assert (found.value, found.reason) == (None, "only one label occurs")
    for labels in ([["q", None]], []):
        alpha = krippendorff_alpha(labels, [0] * len(labels))
        assert alpha.reason == "no item was coded by two coders"


def test_utterances_of_one_dialogue_stay_together_in_the_interval():
    """Two dialogues, one coded alike and one not: whole ones are drawn, so the interval is wide."""
    first = ["q", "r"] * 50
    second = ["q", "r"] * 25 + ["r", "q"] * 25
    together = cohen_kappa(first, second, [0] * 50 + [1] * 50, resamples=200)
    apart = cohen_kappa(first, second, range(100), resamples=200)
    assert (together.low, together.high) == (-1, 1)
    assert apart.high - apart.low < 1
    assert cohen_kappa(first, second, [0] * 100).low is None


def test_unequal_input_is_refused():
    with pytest.raises(UserError, match="2 items but 1 second"):
        cohen_kappa(["q", "r"], ["q"], [0, 0])
    with pytest.raises(UserError, match="Krippendorff"):
        fleiss_kappa([["q", "r"], ["q"]], [0, 1])
