"""Figure 3: base model against MI-LLM on BLEU-4 and ROUGE, one panel per metric.

The paper's figure shows bars; ours adds the 95 % interval by dialogue of each, and a third bar
where a model was tuned further on preferences.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from milm_ray.errors import UserError
from milm_ray.evaluation.overlap import METRICS

TITLES = {"bleu_4": "BLEU-4", "rouge_1": "ROUGE-1", "rouge_2": "ROUGE-2", "rouge_l": "ROUGE-L"}
# Okabe and Ito's colours, told apart in print and with colour-blind eyes.
BARS = (
    ("base", "Base model", "#999999"),
    ("adapter", "MI-LLM", "#0072B2"),
    ("dpo", "MI-LLM after DPO", "#E69F00"),
)
_GROUP_WIDTH = 0.76


def draw(summary: Mapping[str, Any], *, sampling: str | None = None) -> bytes:
    """Grouped bars of a `score.summarise` result, as PNG bytes.

    sampling: the decoding to show; by default greedy, else the first there is. A model without
    one of the variants lacks its bar. Raises UserError when nothing was scored that way.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    shown = _shown(summary, sampling)
    models = sorted({model for model, _ in shown})
    below_panels = 0.05  # room for the caption
    engine = ConstrainedLayoutEngine(rect=(0, below_panels, 1, 1 - below_panels))
    figure = Figure(figsize=(10, 3.6), dpi=150, layout=engine)
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(METRICS))
    for panel, metric in zip(panels, METRICS, strict=True):
        tallest = _bars(panel, shown, models, metric)
        panel.set_title(TITLES[metric], fontsize=11)
        panel.set_xticks(range(len(models)), models, fontsize=8, rotation=20, ha="right")
        panel.set_ylim(0, max(1.0, tallest) * 1.15)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(axis="y", labelsize=8)
    panels[0].set_ylabel("score (0 to 100)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.text(0.995, 0.005, _caption(shown), ha="right", va="bottom", fontsize=7, color="#555555")
    sink = io.BytesIO()
    canvas.print_png(sink)
    return sink.getvalue()


def _shown(summary: Mapping[str, Any], sampling: str | None) -> dict[tuple[str, str], Any]:
    """The groups to draw by (model, variant)."""
    there = sorted({group["sampling"] for group in summary["groups"]})
    if sampling is None:
        sampling = "greedy" if "greedy" in there or not there else there[0]
    shown = {
        (group["model"], group["variant"]): group
        for group in summary["groups"]
        if group["sampling"] == sampling
    }
    if not shown:
        raise UserError(
            f"no scores with sampling {sampling!r} to draw",
            f"samplings there are: {', '.join(there) or 'none'}",
        )
    return shown


def _bars(
    panel: Any, shown: Mapping[tuple[str, str], Any], models: list[str], metric: str
) -> float:
    """Draw one metric's bars with their values; returns the height of the tallest mark."""
    tallest = 0.0
    # Base and MI-LLM have their places and their words in the legend even where one is missing.
    drawn = [bar for bar in BARS if bar[0] != "dpo" or any(v == "dpo" for _, v in shown)]
    width = _GROUP_WIDTH / len(drawn)
    for number, (variant, label, colour) in enumerate(drawn):
        offset = (number - (len(drawn) - 1) / 2) * width
        places = [i for i, model in enumerate(models) if (model, variant) in shown]
        scores = [shown[models[i], variant]["scores"][metric] for i in places]
        means = [score["mean"] for score in scores]
        # One dialogue alone has a mean and no interval.
        below = [s["mean"] - s["low"] if s["low"] is not None else 0 for s in scores]
        above = [s["high"] - s["mean"] if s["high"] is not None else 0 for s in scores]
        x = [i + offset for i in places]
        panel.bar(x, means, width, color=colour, label=label)
        panel.errorbar(x, means, yerr=[below, above], fmt="none", ecolor="#222222", capsize=2, lw=1)
        for place, mean, top in zip(x, means, above, strict=True):
            panel.annotate(
                f"{mean:.1f}",
                (place, mean + top),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
            tallest = max(tallest, mean + top)
    return tallest


def _caption(shown: Mapping[tuple[str, str], Any]) -> str:
    rounds = {group["rounds"] for group in shown.values()}
    dialogues = {group["dialogues"] for group in shown.values()}
    sampling = next(iter(shown.values()))["sampling"]
    return (
        f"{_span(rounds)} rounds of {_span(dialogues)} dialogues, decoding: {sampling}; "
        "bars: means, lines: 95 % intervals by dialogue"
    )


def _span(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"
