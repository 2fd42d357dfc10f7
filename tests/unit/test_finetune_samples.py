"""Dialogues as training samples: what carries loss, and what happens over the cutoff."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milm_ray.errors import UserError
from milm_ray.finetune.samples import hold_out, tokenise
from milm_ray.models.chat_format import IGNORE_INDEX

MODELS = Path(__file__).resolve().parents[2] / "milm_ray/samples/models"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODELS / "tiny-llama3")


def row(rounds=3, name="d"):
    turns = []
    for number in range(rounds):
        turns.append({"role": "client", "content": f"第{number}次，我又没忍住，抽了一根烟。"})
        turns.append({"role": "counselor", "content": f"您数得清楚，第{number}次也看在眼里。"})
    return {"dialogue_id": name, "turns": turns}


def spoken(sample, tokenizer):
    return tokenizer.decode([label for label in sample.labels if label != IGNORE_INDEX])


def test_a_dialogue_carries_loss_on_every_counselor_turn(tokenizer):
    (sample,) = tokenise([row()], tokenizer, "llama3", 1024).samples
    expected = "".join(f"您数得清楚，第{n}次也看在眼里。<|eot_id|>" for n in range(3))
    assert spoken(sample, tokenizer) == expected
    assert sample.label_tokens == sum(label != IGNORE_INDEX for label in sample.labels)


def test_a_round_carries_loss_on_its_last_turn_and_sees_its_history(tokenizer):
    found = tokenise([row()], tokenizer, "llama3", 1024, unit="round")
    whole = tokenise([row()], tokenizer, "llama3", 1024).samples[0]
    assert [sample.name for sample in found.samples] == ["d#1", "d#2", "d#3"]
    for number, sample in enumerate(found.samples):
        assert spoken(sample, tokenizer) == f"您数得清楚，第{number}次也看在眼里。<|eot_id|>"
        assert sample.input_ids == whole.input_ids[: len(sample.input_ids)]


def test_over_the_cutoff_the_oldest_rounds_go_and_are_counted(tokenizer):
    whole = tokenise([row()], tokenizer, "llama3", 1024)
    cutoff = whole.tokens - 1
    found = tokenise([row(), row(1, "short")], tokenizer, "llama3", cutoff)
    text = tokenizer.decode(found.samples[0].input_ids)
    assert "第0次" not in text
    assert "第2次也看在眼里" in text
    assert found.counts()["shortened"] == 1
    assert found.counts()["rounds_dropped"] == 1
    assert found.cut == ", over the cutoff: 1 lost their oldest rounds (1 in all)"
    assert whole.cut == ""
    assert len(found.samples[0].input_ids) <= cutoff


def test_a_round_longer_than_the_cutoff_is_left_out_by_name(tokenizer):
    long = row(1, "long")
    long["turns"][1]["content"] *= 20
    found = tokenise([row(1, "short"), long], tokenizer, "llama3", 100)
    assert [sample.name for sample in found.samples] == ["short"]
    assert found.too_long == ["long"]
    assert found.cut == ", over the cutoff: 1 left out, too long in one round"
    with pytest.raises(UserError, match="no training sample is left"):
        tokenise([long], tokenizer, "llama3", 100)


@given(st.integers(2, 40), st.floats(0.01, 0.9), st.integers(0, 3))
def test_held_out_dialogues_share_no_source_with_those_trained_on(count, share, seed):
    rows = [
        {"dialogue_id": f"{source}-{copy}", "source_dialogue_id": f"{source}"}
        for source in range(count)
        for copy in range(1 + source % 3)
    ]
    if max(1, round(share * count)) == count:
        with pytest.raises(UserError, match="leaves none to train on"):
            hold_out(rows, share, seed)
        return
    kept, held = hold_out(rows, share, seed)
    assert len(kept) + len(held) == len(rows)
    sources = {row["source_dialogue_id"] for row in held}
    assert len(sources) == max(1, round(share * count))
    assert not sources & {row["source_dialogue_id"] for row in kept}
    # What is held out does not hang on the order of the table.
    assert {row["dialogue_id"] for row in hold_out(rows[::-1], share, seed)[1]} == {
        row["dialogue_id"] for row in held
    }


def test_another_seed_holds_out_others():
    rows = [{"dialogue_id": str(number)} for number in range(40)]
    assert hold_out(rows, 0.2, 1) != hold_out(rows, 0.2, 2)
    assert hold_out(rows, 0.0, 1) == (rows, [])
