import pickle

import pytest

from milm_ray.errors import UserError
from milm_ray.miti.summary import (
    MEASURES,
    Coding,
    CodingError,
    dialogue_values,
    spread,
    standing,
    summarise_group,
    summary_scores,
    table_rows,
    undefined_reasons,
)

# A 20-minute segment worked by hand with the manual's formulas.
COUNTS = {
    "gi": 5,
    "persuade": 2,
    "persuade_with_permission": 1,
    "question": 10,
    "simple_reflection": 6,
    "complex_reflection": 4,
    "affirm": 3,
    "seek": 2,
    "emphasize_autonomy": 1,
    "confront": 0,
}
GLOBALS = {
    "cultivating_change_talk": 4,
    "softening_sustain_talk": 3,
    "partnership": 4,
    "empathy": 4,
}


def test_a_hand_worked_segment():
    assert summary_scores(COUNTS, GLOBALS) == {
        "technical_global": 3.5,  # (4 + 3) / 2
        "relational_global": 4.0,  # (4 + 4) / 2
        "complex_reflection_ratio": 0.4,  # 4 / (6 + 4)
        "reflection_to_question": 1.0,  # (6 + 4) / 10
        "total_mia": 6,  # 2 + 3 + 1
        "total_mina": 2,  # 0 + 2: persuading with permission is not non-adherent
        "mia_ratio": 0.75,  # 6 / 8
    }


def test_counts_averaged_over_coders_are_taken():
    scores = summary_scores(
        {"simple_reflection": 2.5, "complex_reflection": 1.5, "question": 1}, {}
    )
    assert scores["complex_reflection_ratio"] == pytest.approx(0.375)
    assert scores["reflection_to_question"] == pytest.approx(4.0)


def test_undefined_ratios_are_none_with_a_reason():
    scores = summary_scores({}, {"partnership": 3, "empathy": None})
    assert scores == {m: 0 if m.startswith("total") else None for m in MEASURES}
    reasons = undefined_reasons(scores)
    assert reasons["reflection_to_question"] == "no question was coded"
    assert reasons["relational_global"] == "needs partnership and empathy"
    assert "total_mia" not in reasons


def test_no_reflection_but_questions_is_a_ratio_of_zero():
    scores = summary_scores({"question": 3}, GLOBALS)
    assert scores["reflection_to_question"] == 0
    assert scores["complex_reflection_ratio"] is None


@pytest.mark.parametrize(
    ("counts", "scores", "named"),
    [
        ({"reflection": 1}, {}, "unknown code 'reflection'"),
        ({"question": -1}, {}, "question is -1"),
        ({"question": "3"}, {}, "question is '3'"),
        ({"question": True}, {}, "question is True"),
        ({"question": None}, {}, "question is None"),
        ({"question": float("nan")}, {}, "question is nan"),
        ({}, {"empathy": 6}, "empathy is 6"),
        ({}, {"empathy": 0.5}, "empathy is 0.5"),
        ({}, {"spirit": 3}, "unknown global score 'spirit'"),
    ],
)
def test_impossible_codings_are_refused_by_name(counts, scores, named):
    with pytest.raises(CodingError, match=named) as caught:
        summary_scores(counts, scores)
    assert isinstance(caught.value, UserError)
    assert isinstance(caught.value, ValueError)


def test_every_fault_is_named_at_once_and_survives_a_process_boundary():
    with pytest.raises(CodingError) as caught:
        summary_scores({"reflection": 1, "gi": -2}, {"empathy": 9})
    again = pickle.loads(pickle.dumps(caught.value))
    for part in ("'reflection'", "gi is -2", "empathy is 9"):
        assert part in str(again)


@pytest.mark.parametrize(
    ("measure", "value", "expected"),
    [
        ("relational_global", 3.49, "below"),
        ("relational_global", 3.5, "fair"),
        ("relational_global", 4, "good"),
        ("technical_global", 3, "fair"),
        ("complex_reflection_ratio", 0.39, "below"),
        ("complex_reflection_ratio", 0.5, "good"),
        ("reflection_to_question", 1, "fair"),
        ("reflection_to_question", 2, "good"),
        ("total_mia", 10, None),
        ("reflection_to_question", None, None),
    ],
)
def test_thresholds_include_their_bound(measure, value, expected):
    assert standing(measure, value) == expected


def test_mean_of_ratios_and_pooled_ratio_are_both_given():
    """MIA/(MIA+MINA): 1/2 and 9/10 have the mean .7; pooled it is 10/12."""
    group = [
        Coding("a", "x", "g", {"affirm": 1, "confront": 1, "question": 4}, rounds=4),
        Coding("b", "x", "g", {"affirm": 9, "confront": 1}, rounds=0),
    ]
    summary = summarise_group(group)
    assert summary.measures["mia_ratio"].mean == pytest.approx(0.7)
    assert summary.pooled["mia_ratio"] == pytest.approx(10 / 12)
    assert summary.measures["reflection_to_question"].n == 1
    assert summary.measures["complex_reflection_ratio"] == spread([])
    assert summary.counts["affirm"].mean == 5
    assert summary.per_round["affirm"].n == 1
    assert summary.per_round["question"].mean == 1.0


def test_coders_of_a_dialogue_are_averaged_before_dialogues_are():
    group = [
        Coding("a", "x", "g", {"question": 2}, {"empathy": 3, "partnership": 3}),
        Coding("a", "y", "g", {"question": 4}, {"empathy": 4, "partnership": 3}),
        Coding("b", "x", "g", {"question": 9}, {"empathy": 5, "partnership": 5}),
    ]
    summary = summarise_group(group)
    assert (summary.dialogues, summary.codings) == (2, 3)
    assert summary.counts["question"].mean == 6  # of 3 and 9, not of 2, 4 and 9
    assert summary.measures["relational_global"].mean == pytest.approx((3.25 + 5) / 2)


def test_quartiles_interpolate():
    result = spread([1, 2, 3, 4, None])
    assert (result.n, result.q1, result.median, result.q3) == (4, 1.75, 2.5, 3.25)
    assert result.sd == pytest.approx(1.2909944487)


@pytest.mark.parametrize(
    ("second", "named"),
    [
        (Coding("b", "x", "other", {}), "several groups"),
        (Coding("b", "llm", "g", {}, automatic=True), "mixes people's and automatic"),
        (Coding("a", "x", "g", {}), "coded twice: x on a"),
    ],
)
def test_codings_that_do_not_belong_together_are_refused(second, named):
    with pytest.raises(CodingError, match=named):
        summarise_group([Coding("a", "x", "g", {}), second])
    with pytest.raises(CodingError, match="no codings"):
        summarise_group([])


def test_the_table_marks_automatic_codings_and_gives_the_standing_of_means():
    people = [Coding("a", "x", "real", COUNTS, GLOBALS, rounds=10)]
    model = [Coding("a", "llm", "real", {"question": 1}, automatic=True)]
    rows = table_rows([summarise_group(people), summarise_group(model)])
    assert {(r["coder"], r["group"]) for r in rows} == {("human", "real"), ("automatic", "real")}
    by_name = {(r["coder"], r["kind"], r["variable"]): r for r in rows}
    relational = by_name["human", "summary score", "relational_global"]
    assert (relational["mean"], relational["standing"], relational["n"]) == (4.0, "good", 1)
    assert by_name["human", "summary score", "mia_ratio"]["pooled"] == 0.75
    assert by_name["human", "count per round", "question"]["mean"] == 1.0
    undefined = by_name["automatic", "summary score", "relational_global"]
    assert (undefined["n"], undefined["mean"], undefined["standing"]) == (0, None, None)


def test_values_of_dialogues_are_coders_means():
    group = [Coding("a", "x", "g", {"question": 2}), Coding("a", "y", "g", {"question": 5})]
    values = dialogue_values(group)
    assert values["question"] == [3.5]
    assert values["reflection_to_question"] == [0]
    assert values["relational_global"] == [None]


def test_a_ratio_over_less_than_half_an_expected_code_is_undefined_for_a_model_only():
    counts = {"question": 0.4, "simple_reflection": 0.4, "complex_reflection": 0.2}
    expected = Coding("d", "m", "g", counts, automatic=True).scores()
    assert expected["reflection_to_question"] is None
    assert expected["complex_reflection_ratio"] == pytest.approx(1 / 3)
    people = Coding("d", "p", "g", counts).scores()  # the mean of several coders
    assert people["reflection_to_question"] == pytest.approx(1.5)
