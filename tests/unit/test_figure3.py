import io

import matplotlib.image
import pytest

from milm_ray.errors import UserError
from milm_ray.evaluation import figure3
from milm_ray.evaluation.overlap import METRICS


def group(model, variant, mean, sampling="greedy", interval=True):
    bounds = {"low": mean * 0.9, "high": mean * 1.1} if interval else {"low": None, "high": None}
    return {
        "model": model,
        "variant": variant,
        "sampling": sampling,
        "rounds": 30,
        "dialogues": 4,
        "scores": {metric: {"mean": mean, **bounds} for metric in METRICS},
    }


def bars(png: bytes, colour: str) -> float:
    """The share of the picture's pixels that have a bar's colour."""
    pixels = matplotlib.image.imread(io.BytesIO(png))[:, :, :3]
    rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return float((abs(pixels - rgb).max(axis=2) < 0.01).mean())


def test_both_variants_are_drawn_and_the_better_has_more_bar():
    png = figure3.draw({"groups": [group("a", "base", 2.0), group("a", "adapter", 6.0)]})
    assert png.startswith(b"\x89PNG")
    base, adapter, dpo = (bars(png, colour) for _, _, colour in figure3.BARS)
    assert dpo == 0
    assert adapter > 2 * base > 0


def test_a_model_tuned_on_preferences_has_a_third_bar():
    tuned = [group("a", "base", 2.0), group("a", "adapter", 6.0), group("a", "dpo", 12.0)]
    png = figure3.draw({"groups": [*tuned, group("b", "base", 2.0), group("b", "adapter", 6.0)]})
    base, adapter, dpo = (bars(png, colour) for _, _, colour in figure3.BARS)
    # Twice as high, at half as many models.
    assert dpo == pytest.approx(adapter, rel=0.1)
    assert adapter > 2 * base > 0


def test_a_missing_variant_leaves_a_gap_and_one_dialogue_no_interval():
    png = figure3.draw(
        {"groups": [group("a", "adapter", 6.0, interval=False), group("b", "adapter", 0.0)]}
    )
    base, adapter, _ = (bars(png, colour) for _, _, colour in figure3.BARS)
    assert adapter > 0.02
    assert base < 0.002  # nothing but the legend's patch


def test_greedy_is_shown_unless_another_decoding_is_asked_for():
    groups = [group("a", "base", 1.0), group("a", "base", 1.0, "seed-1")]
    assert figure3._shown({"groups": groups}, None)["a", "base"]["sampling"] == "greedy"
    assert figure3._shown({"groups": groups}, "seed-1")["a", "base"]["sampling"] == "seed-1"
    assert figure3._shown({"groups": groups[1:]}, None)["a", "base"]["sampling"] == "seed-1"
    with pytest.raises(UserError, match="'beam'"):
        figure3.draw({"groups": groups}, sampling="beam")
    with pytest.raises(UserError, match="none"):
        figure3.draw({"groups": []})
