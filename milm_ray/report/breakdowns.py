"""Scores by round and by topic, and how varied the replies are: what one mean hides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from milm_ray.report.blocks import Column, Table

_SHOWN = ("bleu_4", "rouge_l")
_NAMES = {"bleu_4": "BLEU-4", "rouge_l": "ROUGE-L"}
SIDES = {"base": "Base", "adapter": "MI-LLM", "dpo": "MI-LLM, DPO"}
Rows = Sequence[Mapping[str, Any]]


def sides_of(variants: Iterable[str]) -> list[str]:
    """The variants to show: base and MI-LLM always, DPO where it is among `variants`."""
    there = set(variants)
    return [side for side in SIDES if side != "dpo" or side in there]


def tables(
    summary: Mapping[str, Any], order: Callable[[str], Any], label: Callable[[str], str]
) -> list[Table]:
    """The three tables, for greedy decoding; a table without rows is left out."""
    found = [
        _breakdown(
            summary["by_round"],
            "round_index",
            "scores_by_round",
            "Scores by the round's place in its dialogue",
            "Round",
            order,
            label,
        ),
        _breakdown(
            summary["by_topic"],
            "topic",
            "scores_by_topic",
            "Scores by the dialogue's topic",
            "Topic",
            order,
            label,
        ),
        _diversity(summary.get("diversity", ()), order, label),
    ]
    return [table for table in found if table.rows]


def _breakdown(
    rows: Rows,
    column: str,
    name: str,
    caption: str,
    head: str,
    order: Callable[[str], Any],
    label: Callable[[str], str],
) -> Table:
    shown = sides_of(row["variant"] for row in rows)
    cells: dict[tuple[str, Any], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["sampling"] == "greedy":
            cells.setdefault((row["model"], row[column]), {})[row["variant"]] = row
    listed = [
        [
            label(model),
            "none given" if value == "" else value,
            max(side["rounds"] for side in sides.values()),
            *(sides.get(variant, {}).get(metric) for metric in _SHOWN for variant in shown),
        ]
        for (model, value), sides in sorted(
            cells.items(), key=lambda item: (order(item[0][0]), item[0][1])
        )
    ]
    return Table(
        name,
        f"{caption}, percent, decoding: greedy",
        [
            Column("Model"),
            Column(head),
            Column("Rounds", numeric=True),
            *(
                Column(f"{_NAMES[metric]}, {SIDES[variant]}", digits=2, numeric=True)
                for metric in _SHOWN
                for variant in shown
            ),
        ],
        listed,
        ["Means over few rounds move much by chance: read the number of rounds first."],
        grouped=True,
    )


def _diversity(rows: Rows, order: Callable[[str], Any], label: Callable[[str], str]) -> Table:
    places = list(SIDES)
    listed = [
        [label(row["model"]), SIDES[row["variant"]], row["distinct_1"], row["distinct_2"]]
        for row in sorted(rows, key=lambda row: (order(row["model"]), places.index(row["variant"])))
        if row["sampling"] == "greedy"
    ]
    return Table(
        "diversity",
        "How varied the replies are, decoding: greedy",
        [
            Column("Model"),
            Column("Variant"),
            Column("distinct-1", digits=3, numeric=True),
            Column("distinct-2", digits=3, numeric=True),
        ],
        listed,
        [
            "Different words, and pairs of words, as a share of all in a model's replies; near 0 "
            "for a model that says the same to everyone. Compare on the same rounds only."
        ],
        grouped=True,
    )
