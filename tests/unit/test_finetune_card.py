"""Model cards: what was done, and what the base's licence asks of whoever hands an adapter on."""

from __future__ import annotations

import pytest

from milm_ray.config import FinetuneSection
from milm_ray.finetune.card import model_card, preference_card
from milm_ray.models import registry

COUNTS = {
    "samples": 1990,
    "tokens": 1_500_000,
    "label_tokens": 600_000,
    "shortened": 0,
    "rounds_dropped": 0,
    "too_long": 0,
    "steps": 747,
    "final_loss": 1.25,
}


@pytest.mark.parametrize("name", ["baichuan2", "glm4", "llama3"])
def test_licence_duties_are_on_both_cards(name):
    base = registry.get(name)
    sft = model_card(base, base.hub_id, FinetuneSection(), COUNTS, seed=42)
    counts = {"pairs": 400, "tokens": 9, "steps": 3, "final_loss": 0.5, "final_accuracy": 0.9}
    dpo = preference_card(base, base.hub_id, FinetuneSection(), counts, ["judge-1"])
    for card in (sft, dpo):
        assert f"base_model: {base.hub_id}" in card
        assert f"> {base.notice}" in card
        assert base.licence in card
        title = next(line for line in card.splitlines() if line.startswith("# "))
        assert title.startswith(f"# {base.adapter_prefix or name}-mi")
    assert "judge-1, automatically" in dpo
    assert "No person judged" in dpo


def test_a_held_out_loss_is_on_the_card_where_there_is_one():
    base = registry.get("llama3")
    assert "held out" not in model_card(base, "x", FinetuneSection(), COUNTS, seed=1)
    counts = {**COUNTS, "final_eval_loss": 1.5, "eval_samples": 199}
    card = model_card(base, "x", FinetuneSection(), counts, seed=1)
    assert "| held out | loss 1.5000 at the end, on 199 dialogues |" in card


def test_what_the_cutoff_took_is_on_the_card():
    base = registry.get("llama3")
    assert "over the cutoff" not in model_card(base, "x", FinetuneSection(), COUNTS, seed=1)
    counts = {**COUNTS, "shortened": 12, "rounds_dropped": 1034, "too_long": 3}
    card = model_card(base, "x", FinetuneSection(), counts, seed=1)
    assert "| 12 lost their oldest rounds (1,034 in all), 3 left out |" in card
