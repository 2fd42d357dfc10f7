"""Loss curves."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

# One colour per model, from the Okabe-Ito palette (told apart by colour-blind readers).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


def loss_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> bytes:
    """PNG of training loss over epochs, one line per model, dashed for dialogues held out.

    logs: rows of schema.TRAINING_LOG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for number, (model, rows) in enumerate(logs.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        epochs = [row["epoch"] for row in rows]
        losses = [row["loss"] for row in rows]
        label = f"{model}, at the end {losses[-1]:.2f}" if rows else model
        axes.plot(epochs, losses, color=colour, marker="o", markersize=3, label=label)
        held = [row for row in rows if row["eval_loss"] is not None]
        if held:
            axes.plot(
                [row["epoch"] for row in held],
                [row["eval_loss"] for row in held],
                color=colour,
                linestyle="--",
                marker="s",
                markersize=4,
                label=f"{model}, held out, at the end {held[-1]['eval_loss']:.2f}",
            )
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss (nats per counselor token)")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _png(figure)


def preference_curves(rows: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """PNG of one preference tuning: loss, and the rewards of both replies, over epochs.

    rows: schema.PREFERENCE_LOG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    losses, rewards = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    for axes, name, label, colour in (
        (losses, "loss", "loss", _COLOURS[0]),
        (rewards, "chosen_reward", "chosen", _COLOURS[2]),
        (rewards, "rejected_reward", "rejected", _COLOURS[1]),
    ):
        values = [row[name] for row in rows]
        axes.plot(epochs, values, color=colour, marker="o", markersize=3, label=label)
    losses.set_ylabel("loss (nats per pair)")
    rewards.set_ylabel("reward (beta times the log ratio)")
    rewards.legend(frameon=False)
    for axes in (losses, rewards):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return _png(figure)


def _png(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    return image.getvalue()
