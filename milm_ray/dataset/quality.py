"""The judge's scores: their dimensions and ranges, and what a corpus's scores add up to.

The dimensions are CPsyCoun's (ACL Findings 2024). It publishes two scales that differ in
professionalism: 0-3 in its turn-level prompt, which the judge's prompt here follows, and 0-4 in its
dialogue-level table. Totals are given on both, since a ranking can change with the scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from milm_ray.llm.exchange import Unusable
from milm_ray.llm.replies import json_object

# dimension → maximum as the prompt states it (turn level, total 9) and at dialogue level (total 10)
MAXIMA = {"comprehensiveness": 2, "professionalism": 3, "authenticity": 3, "safety": 1}
DIALOGUE_MAXIMA = {**MAXIMA, "professionalism": 4}
DIMENSIONS = tuple(MAXIMA)
SCALES = ("fraction", "turn", "dialogue")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        **{
            name: {"type": "integer", "enum": list(range(maximum + 1))}
            for name, maximum in MAXIMA.items()
        },
        "reason": {"type": "string"},
    },
    "required": [*DIMENSIONS, "reason"],
    "additionalProperties": False,
}


def parse_verdict(text: str) -> dict[str, Any]:
    """The four scores and the reason in a judge's reply; Unusable when any is missing or off range.

    Nothing is rounded, clipped or filled in: what is not a score leaves the dialogue unscored.
    """
    try:
        data = json_object(text)
    except ValueError as error:
        raise Unusable("not_json", str(error)) from None
    for name, maximum in MAXIMA.items():
        score = data.get(name)
        if type(score) is not int:  # bool is an int, 1.5 and "2" are not
            raise Unusable("score_missing", f"{name} is {score!r}, not an integer")
        if not 0 <= score <= maximum:
            raise Unusable("score_out_of_range", f"{name} is {score}, not 0 to {maximum}")
    return {**{name: data[name] for name in DIMENSIONS}, "reason": str(data.get("reason", ""))}


def totals(scores: np.ndarray) -> dict[str, np.ndarray]:
    """Each dialogue's total on the three scales, from raw scores of shape (dialogues, 4).

    fraction: mean of the four fractions of their maxima (0-1); turn: the plain sum (0-9); dialogue:
    each fraction times its dialogue-level maximum (0-10).
    """
    fractions = scores / np.array(list(MAXIMA.values()))
    return {
        "fraction": fractions.mean(axis=1),
        "turn": scores.sum(axis=1),
        "dialogue": (fractions * np.array(list(DIALOGUE_MAXIMA.values()))).sum(axis=1),
    }


def summarise(
    verdicts: Sequence[Mapping[str, Any]], seed: int, resamples: int = 2000
) -> dict[str, Any]:
    """What one corpus's verdicts say: n, means, fractions of the maximum, totals.

    verdicts: rows of schema.VERDICTS; only scored ones count. Every mean comes with a 95 %
    percentile bootstrap interval over dialogues; None where nothing is scored.
    """
    scored = [row for row in verdicts if row["status"] == "scored"]
    summary: dict[str, Any] = {"n": len(scored), "unscored": len(verdicts) - len(scored)}
    if not scored:
        return {**summary, "dimensions": None, "totals": None}
    scores = np.array([[row[name] for name in DIMENSIONS] for row in scored], dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(scored), (resamples, len(scored)))

    def interval(values: np.ndarray) -> list[float]:
        means = values[picks].mean(axis=1)
        return [round(float(edge), 4) for edge in np.percentile(means, [2.5, 97.5])]

    summary["dimensions"] = {
        name: {
            "mean": round(float(scores[:, i].mean()), 4),
            "interval": interval(scores[:, i]),
            "maximum": MAXIMA[name],
            "fraction": round(float(scores[:, i].mean()) / MAXIMA[name], 4),
        }
        for i, name in enumerate(DIMENSIONS)
    }
    summary["totals"] = {
        scale: {"mean": round(float(values.mean()), 4), "interval": interval(values)}
        for scale, values in totals(scores).items()
    }
    return summary


def ranking(summaries: Mapping[str, Mapping[str, Any]], scale: str) -> list[str]:
    """Corpora from best to worst by mean total on a scale; those without a score are left out."""
    ranked = [name for name, summary in summaries.items() if summary["totals"]]
    return sorted(ranked, key=lambda name: (-summaries[name]["totals"][scale]["mean"], name))
