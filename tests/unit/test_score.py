import json

import pyarrow as pa
import pytest

from milm_ray import schema
from milm_ray.errors import UserError
from milm_ray.evaluation.overlap import score_pair
from milm_ray.evaluation.score import (
    SCORES,
    distinct_n,
    diversity,
    score_predictions,
    summarise,
)

OUTPUTS = {
    ("d1", 0): "听起来你已经想过很多次要早点睡。",
    ("d1", 1): "是什么让你这周想试一试？",
    ("d2", 0): "你为了孩子的健康，愿意先从自己改起。",
    ("d3", 0): "少看手机这件事，你自己觉得有几分把握？",
}


def rounds() -> pa.Table:
    rows = [
        {
            "dialogue_id": dialogue,
            "round_index": index,
            "topic": "睡眠" if dialogue == "d1" else "运动",
            "instruction": "",
            "input": "……",
            "output": output,
            "history": [],
        }
        for (dialogue, index), output in OUTPUTS.items()
    ]
    return pa.Table.from_pylist(rows, schema=schema.ROUNDS)


def prediction(key, text, variant="base", sampling="greedy", model="m", finish="stop"):
    return {
        "dialogue_id": key[0],
        "round_index": key[1],
        "model": model,
        "variant": variant,
        "sampling": sampling,
        "text": text,
        "finish_reason": finish,
    }


def table(rows) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=schema.PREDICTIONS)


def base_and_adapter() -> list[dict]:
    return [
        row
        for key, output in OUTPUTS.items()
        for row in (
            prediction(key, "建议你多休息。"),
            prediction(key, output[: len(output) // 2] + "。", "adapter"),
        )
    ]


def test_each_prediction_is_scored_against_its_own_round():
    scored = score_predictions(table(base_and_adapter()), rounds())
    assert scored.schema == SCORES
    for row, source in zip(scored.to_pylist(), base_and_adapter(), strict=True):
        reference = OUTPUTS[row["dialogue_id"], row["round_index"]]
        expected = score_pair(reference, source["text"])
        assert {m: row[m] for m in expected} == expected
        assert row["reference_chars"] == len(reference)
        assert row["variant"] == source["variant"]
    assert set(scored["topic"].to_pylist()) == {"睡眠", "运动"}


def test_empty_and_null_predictions_score_zero_and_stay_in_the_mean():
    rows = [prediction(("d1", 0), " \n"), prediction(("d2", 0), None)]
    rows.append(prediction(("d3", 0), OUTPUTS["d3", 0], finish="length"))
    scored = score_predictions(table(rows), rounds())
    assert scored["empty"].to_pylist() == [True, True, False]
    group = summarise(scored)["groups"][0]
    assert (group["rounds"], group["dialogues"]) == (3, 3)
    assert (group["empty"], group["truncated"]) == (2, 1)
    assert group["scores"]["bleu_4"]["mean"] == pytest.approx(100 / 3)


def test_adapter_is_compared_with_base_on_the_rounds_that_both_answered():
    rows = [r for r in base_and_adapter() if (r["variant"], r["dialogue_id"]) != ("base", "d3")]
    summary = summarise(score_predictions(table(rows), rounds()))
    (difference,) = summary["differences"]
    assert (difference["rounds"], difference["dialogues"]) == (3, 2)
    found = difference["scores"]["rouge_l"]
    assert found["difference"] == pytest.approx(found["adapter"] - found["base"])
    assert found["low"] <= found["difference"] <= found["high"]
    assert found["p"] == pytest.approx(2 / 4)  # two dialogues: only both signs alike reach it
    assert [g["rounds"] for g in summary["groups"]] == [4, 3]  # adapter, base


def test_a_dpo_adapter_is_compared_with_the_adapter_it_was_tuned_from():
    rows = base_and_adapter()
    rows += [prediction(key, output, "dpo") for key, output in OUTPUTS.items() if key[0] != "d3"]
    summary = summarise(score_predictions(table(rows), rounds()))
    adapter, dpo = summary["differences"]
    assert (adapter["variant"], adapter["rounds"]) == ("adapter", 4)
    assert (dpo["variant"], dpo["rounds"], dpo["dialogues"]) == ("dpo", 3, 2)
    found = dpo["scores"]["bleu_4"]
    assert found["dpo"] == 100
    assert found["adapter"] < 100
    assert found["difference"] == pytest.approx(100 - found["adapter"])


def test_seeds_are_pooled_by_round():
    key = ("d1", 0)
    rows = [prediction(key, "听起来你累了。", sampling="greedy")]
    rows += [
        prediction(key, OUTPUTS[key], sampling="seed-1"),
        prediction(key, "", sampling="seed-2"),
    ]
    rows += [prediction(("d2", 0), "好。", sampling="seed-1")]
    summary = summarise(score_predictions(table(rows), rounds()))
    pooled = next(g for g in summary["groups"] if g["sampling"] == "sampled")
    assert (pooled["seeds"], pooled["rounds"], pooled["empty"]) == (2, 1, 1)
    assert pooled["scores"]["bleu_4"]["mean"] == pytest.approx(50)
    assert pooled["seed_sd"]["bleu_4"] > 0
    samplings = [g["sampling"] for g in summary["groups"]]
    assert samplings == ["greedy", "sampled", "seed-1", "seed-2"]


def test_breakdowns_add_up_to_the_groups():
    summary = summarise(score_predictions(table(base_and_adapter()), rounds()))
    for part in ("by_round", "by_topic"):
        base = [row for row in summary[part] if row["variant"] == "base"]
        total = sum(row["rounds"] for row in base)
        assert total == 4
        weighted = sum(row["rounds"] * row["rouge_1"] for row in base) / total
        group = next(g for g in summary["groups"] if g["variant"] == "base")
        assert weighted == pytest.approx(group["scores"]["rouge_1"]["mean"])


def test_the_summary_is_json():
    summary = summarise(score_predictions(table(base_and_adapter()), rounds()))
    assert json.loads(json.dumps(summary)) == summary


def test_predictions_of_another_split_are_refused():
    with pytest.raises(UserError, match="round 7 of dialogue d1"):
        score_predictions(table([prediction(("d1", 7), "好。")]), rounds())


def test_double_rows_are_refused():
    twice = table([prediction(("d1", 0), "好。")] * 2)
    with pytest.raises(UserError, match="dialogue_id d1, round_index 0"):
        summarise(score_predictions(twice, rounds()))
    with pytest.raises(UserError, match="among the test rounds twice"):
        score_predictions(twice, pa.concat_tables([rounds(), rounds()]))
    with pytest.raises(UserError, match="no scores"):
        summarise(SCORES.empty_table())


def test_distinct_n_by_hand():
    assert distinct_n(["我想睡觉", "我想睡觉"], 1) == pytest.approx(3 / 6)
    assert distinct_n(["我想睡觉", "我想睡觉"], 2) == pytest.approx(2 / 4)
    assert distinct_n(["", " "], 1) is None
    rows = diversity(table([prediction(("d1", 0), "我想睡觉"), prediction(("d2", 0), None)]))
    assert rows[0]["distinct_1"] == 1.0
