"""Loss curves."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

# One colour per model, from the Okabe-Ito palette (told apart by colour-blind readers).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


def loss_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> bytes:
    """PNG of training loss over epochs, one line per model; logs: rows of schema.TRAINING_LOG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for number, (model, rows) in enumerate(logs.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        epochs = [row["epoch"] for row in rows]
        losses = [row["loss"] for row in rows]
        label = f"{model}, at the end {losses[-1]:.2f}" if rows else model
        axes.plot(epochs, losses, color=colour, marker="o", markersize=3, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss (nats per counselor token)")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    return image.getvalue()
