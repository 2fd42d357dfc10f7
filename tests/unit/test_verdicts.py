"""The judge's scores: strict parsing, both scales, intervals, rankings."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from milm_ray.dataset.quality import DIMENSIONS, MAXIMA, parse_verdict, ranking, summarise, totals
from milm_ray.llm.exchange import Unusable

GOOD = {
    "comprehensiveness": 2,
    "professionalism": 3,
    "authenticity": 1,
    "safety": 0,
    "reason": "一句话",
}


def test_a_verdict_is_read_as_it_stands() -> None:
    assert parse_verdict(json.dumps(GOOD)) == GOOD


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"professionalism": 4}, "score_out_of_range"),
        ({"safety": 2}, "score_out_of_range"),
        ({"comprehensiveness": -1}, "score_out_of_range"),
        ({"authenticity": 2.0}, "score_missing"),
        ({"authenticity": "2"}, "score_missing"),
        ({"safety": True}, "score_missing"),
        ({"safety": None}, "score_missing"),
    ],
)
def test_a_score_off_its_range_or_not_an_integer_leaves_the_dialogue_unscored(
    change: dict[str, object], reason: str
) -> None:
    with pytest.raises(Unusable) as caught:
        parse_verdict(json.dumps({**GOOD, **change}))
    assert caught.value.reason == reason


@pytest.mark.parametrize("text", ["很好", "", json.dumps([GOOD]), json.dumps(GOOD)[:-5]])
def test_what_is_not_json_is_unscored(text: str) -> None:
    with pytest.raises(Unusable):
        parse_verdict(text)


@given(st.text(max_size=60))
def test_no_text_makes_the_parser_fail_in_another_way(text: str) -> None:
    try:
        verdict = parse_verdict(text)
    except Unusable:
        return
    assert all(0 <= verdict[name] <= MAXIMA[name] for name in DIMENSIONS)


def test_the_best_verdict_is_all_of_each_scale() -> None:
    best = totals(np.array([list(MAXIMA.values())], dtype=float))
    assert {name: float(values[0]) for name, values in best.items()} == {
        "fraction": 1.0,
        "turn": 9.0,
        "dialogue": 10.0,
    }


def row(scores: tuple[int, int, int, int] | None) -> dict[str, object]:
    if scores is None:
        return {**dict.fromkeys(DIMENSIONS), "status": "unscored"}
    return {**dict(zip(DIMENSIONS, scores, strict=True)), "status": "scored"}


def test_unscored_dialogues_count_but_never_as_low_ones() -> None:
    summary = summarise([row((2, 3, 3, 1)), row(None), row(None)], seed=1)
    assert (summary["n"], summary["unscored"]) == (1, 2)
    assert summary["totals"]["turn"]["mean"] == 9
    assert summarise([row(None)], seed=1)["totals"] is None


def test_means_and_intervals() -> None:
    rows = [row((1, 0, 3, 1)), row((2, 3, 3, 1)), row((1, 2, 3, 0)), row((0, 1, 3, 1))]
    cells = summarise(rows, seed=3)["dimensions"]
    assert cells["professionalism"]["mean"] == 1.5
    assert cells["professionalism"]["fraction"] == 0.5
    low, high = cells["professionalism"]["interval"]
    assert 0 <= low < 1.5 < high <= 3
    assert cells["authenticity"]["interval"] == [3, 3]
    assert summarise(rows, seed=3) == summarise(rows, seed=3)


def test_a_ranking_can_change_with_the_scale() -> None:
    # Professionalism weighs more on the dialogue scale, safety more by fractions.
    summaries = {
        "skilled": summarise([row((1, 3, 2, 0))], seed=0),
        "safe": summarise([row((1, 1, 3, 1))], seed=0),
        "unscored": summarise([row(None)], seed=0),
    }
    assert ranking(summaries, "fraction") == ["safe", "skilled"]
    assert ranking(summaries, "turn") == ["safe", "skilled"]  # 6 and 6: by name
    assert ranking(summaries, "dialogue") == ["skilled", "safe"]
