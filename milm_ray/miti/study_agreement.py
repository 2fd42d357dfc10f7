"""How far coders agree: between people, and of automatic coders with people."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from milm_ray.miti.agreement import (
    Agreement,
    cohen_kappa,
    fleiss_kappa,
    icc,
    krippendorff_alpha,
)
from milm_ray.miti.coding_scheme import CODE_NAMES, GLOBAL_NAMES
from milm_ray.miti.packet import Item
from milm_ray.miti.study_tables import LABELS
from milm_ray.miti.tables import INTERVAL, StudyColumn, StudyTable

NONE = "none"
Row = Mapping[str, Any]
_COLUMNS = (
    StudyColumn("What"),
    StudyColumn("Figure"),
    StudyColumn("Value", 2, INTERVAL),
    StudyColumn("Units", 0),
    StudyColumn("Dialogues", 0),
    StudyColumn("Remark"),
)


def agreement_table(
    items: Sequence[Item], people: Sequence[Row], *, resamples: int, seed: int
) -> list[StudyTable]:
    """Agreement of people who coded the same dialogues; no table where nobody did."""
    coders = sorted({row["coder"] for row in people})
    by_item: dict[str, dict[str, Row]] = {}
    for row in people:
        by_item.setdefault(row["item_id"], {})[row["coder"]] = row
    shared = {item_id: rows for item_id, rows in by_item.items() if len(rows) >= 2}
    if len(coders) < 2 or not shared:
        return []
    labels, clusters = _labels(items, shared, coders)
    rows: list[list[Any]] = []
    complete = [all(label is not None for label in row) for row in labels]
    full = list(itertools.compress(labels, complete))
    where = list(itertools.compress(clusters, complete))
    if len(coders) == 2 and full:
        first, second = zip(*full, strict=True)
        kappa = cohen_kappa(first, second, where, resamples=resamples, seed=seed)
        rows.append(_row("Codes of utterances", "Cohen's kappa", kappa))
    elif full:
        kappa = fleiss_kappa(full, where, resamples=resamples, seed=seed)
        rows.append(_row("Codes of utterances", "Fleiss' kappa", kappa))
    alpha = krippendorff_alpha(labels, clusters, resamples=resamples, seed=seed)
    rows.append(_row("Codes of utterances", "Krippendorff's alpha", alpha))
    for kind, names in (("global_scores", GLOBAL_NAMES), ("counts", CODE_NAMES)):
        for name in names:
            table = [
                [_value(rows_.get(coder), kind, name) for coder in coders]
                for rows_ in shared.values()
            ]
            found = icc(table)
            rows.append(_row(LABELS[name], "ICC(2,1), one coder", found["single"]))
            rows.append(_row(LABELS[name], f"ICC(2,{len(coders)}), mean", found["average"]))
    return [
        StudyTable(
            "agreement",
            f"Agreement of {len(coders)} coders on {len(shared)} dialogues",
            _COLUMNS,
            rows,
            [
                "An utterance without a code has the label none. Intervals are 95 %: of kappa and "
                "alpha by resampling dialogues, of ICCs from F distributions (McGraw and Wong "
                "1996), which take scores as normal. "
                "Published with MITI: ICC of sessions .75 to 1, kappa of utterances .31 to .64 "
                "(Pérez-Rosas et al. 2016).",
            ],
        )
    ]


def automatic_table(
    items: Sequence[Item], coded: Sequence[Row], *, resamples: int, seed: int
) -> list[StudyTable]:
    """Each automatic coder against each person on the utterances that both saw."""
    people = [row for row in coded if row["source"] in ("human", "adjudicated")]
    machines = [row for row in coded if row["source"] == "automatic" and row["codes"]]
    rows = []
    for machine in sorted({row["coder"] for row in machines}):
        for person in sorted({row["coder"] for row in people}):
            pairs = {row["item_id"]: {machine: row} for row in machines if row["coder"] == machine}
            for row in people:
                if row["coder"] == person and row["item_id"] in pairs:
                    pairs[row["item_id"]][person] = row
            pairs = {item_id: both for item_id, both in pairs.items() if len(both) == 2}
            if not pairs:
                continue
            labels, clusters = _labels(items, pairs, [machine, person])
            first, second = zip(*labels, strict=True)
            kappa = cohen_kappa(first, second, clusters, resamples=resamples, seed=seed)
            rows.append(_row(f"{machine} against {person}", "Cohen's kappa", kappa))
    if not rows:
        return []
    return [
        StudyTable(
            "agreement_automatic",
            "AUTOMATIC coders against people",
            _COLUMNS,
            rows,
            [
                "Published: automatic against people, kappa .61 for fine codes (AutoMISC), "
                ".69 on a helpline (Pellemans et al. 2024)."
            ],
            True,
        )
    ]


def _labels(
    items: Sequence[Item], coded: Mapping[str, Mapping[str, Row]], coders: Sequence[str]
) -> tuple[list[list[str | None]], list[str]]:
    """Counselor utterances × coders with the dialogue of each; None where a coder did not code."""
    labels: list[list[str | None]] = []
    clusters = []
    for item in items:
        rows = coded.get(item.item_id)
        if rows is None:
            continue
        codes = {
            coder: {(c["volley"], c["utterance"]): c["code"] for c in row["codes"]}
            for coder, row in rows.items()
        }
        for volley in item.volleys:
            if volley.role != "counselor":
                continue
            for number in range(1, len(volley.utterances) + 1):
                place = (volley.number, number)
                labels.append([codes[c].get(place, NONE) if c in codes else None for c in coders])
                clusters.append(item.item_id)
    return labels, clusters


def _value(row: Row | None, kind: str, name: str) -> float:
    """A coder's score or count; NaN where they did not code the dialogue."""
    if row is None:
        return float("nan")
    values = dict(row[kind])
    return float(values.get(name, np.nan if kind == "global_scores" else 0))


def _row(what: str, figure: str, found: Agreement) -> list[Any]:
    value = None if found.value is None else [found.value, found.low, found.high]
    return [what, figure, value, found.items, found.clusters, found.reason or None]
