"""The study stage: codings → Tables 4, 5 and 6, rates, comparisons and agreement. `study/`.

Rows by different instruments (people, each automatic coder, AnnoMI's own labels) never meet in one
figure: every table that rests on codes is made once for each, and says by whom it was coded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from milm_ray.config import Config
from milm_ray.job import Plan, Stage, finished
from milm_ray.miti import codings as code_stage
from milm_ray.miti import paper_study, study_packet, study_tables
from milm_ray.miti.study_agreement import agreement_table, automatic_table
from milm_ray.miti.summary import Coding
from milm_ray.miti.tables import LAYOUT, csv_text
from milm_ray.workspace import MANIFEST, Workspace

ARTIFACT = "study"
PEOPLE = "people"
Row = Mapping[str, Any]


def _settings(config: Config) -> dict[str, Any]:
    return {
        "layout": LAYOUT,
        "resamples": config.miti.resamples,
        "seed": config.seed,
        "paper": study_packet.file_digest(config.miti.paper_cells),
    }


def _fingerprint(config: Config, workspace: Workspace) -> dict[str, Any]:
    inputs = workspace.input_digests(code_stage.ARTIFACT, study_packet.ARTIFACT, study_packet.KEY)
    return workspace.fingerprint(_settings(config), inputs)


def plan(config: Config, workspace: Workspace) -> Plan:
    """Rows: codings to summarise."""
    if not workspace.exists(code_stage.ARTIFACT, MANIFEST):
        return Plan()
    if workspace.is_done(ARTIFACT, _fingerprint(config, workspace)):
        return Plan(done=True)
    return Plan(rows=workspace.manifest(code_stage.ARTIFACT)["counts"]["codings"])


def run(config: Config, workspace: Workspace) -> Mapping[str, Any]:
    """Write study.json, with every table, and each table as CSV. Returns the manifest."""
    fingerprint = _fingerprint(config, workspace)
    if finished(workspace, ARTIFACT, fingerprint):
        return workspace.manifest(ARTIFACT)
    started = time.time()
    items = study_packet.load_items(workspace)
    key = study_packet.load_key(workspace)
    rows = workspace.read_table(code_stage.ARTIFACT).to_pylist()
    coded = [row for row in rows if row["status"] == "coded"]
    cells = paper_study.read_cells(config.miti.paper_cells)
    tables = [study_tables.table4(items, key, cells), study_tables.table5(key)]
    long: list[dict[str, Any]] = []
    drawn = {"resamples": config.miti.resamples, "seed": config.seed}
    for instrument, codings in instruments(coded).items():
        groups = study_tables.by_group(codings)
        tables += study_tables.coded_tables(instrument, groups, cells)
        tables.append(study_tables.ratios(instrument, groups, **drawn))
        long += study_tables.long_rows(instrument, groups)
        tables += study_tables.comparisons(instrument, groups, **drawn)
    people = [row for row in coded if row["source"] == "human"]
    tables += agreement_table(items, people, **drawn)
    tables += automatic_table(items, coded, **drawn)
    tables += study_tables.paper_tables(cells)
    uncoded = [
        {name: row[name] for name in ("item_id", "coder", "reason")}
        for row in rows
        if row["status"] == "uncoded"
    ]
    workspace.clear(ARTIFACT)
    for table in tables:
        workspace.write_text(table.csv(), ARTIFACT, f"{table.name}.csv")
    names = list(long[0]) if long else []
    workspace.write_text(
        csv_text(names, [list(row.values()) for row in long]), ARTIFACT, "table6_long.csv"
    )
    study = {
        "layout": LAYOUT,
        "tables": [asdict(table) for table in tables],
        "notes": paper_study.NOTES,
        "uncoded": uncoded,
        "people": sorted({row["coder"] for row in people}),
    }
    workspace.write_text(json.dumps(study, ensure_ascii=False, indent=1), ARTIFACT, "study.json")
    return workspace.commit(
        ARTIFACT,
        stage="study",
        settings=_settings(config),
        fingerprint=fingerprint,
        counts={
            "dialogues": len(items),
            "codings": len(coded),
            "uncoded": len(uncoded),
            "coders": len({row["coder"] for row in people}),
            "tables": len(tables),
        },
        started=started,
    )


def instruments(rows: Sequence[Row]) -> dict[str, list[Coding]]:
    """Codings by who made them: people together, every other coder alone.

    Where a dialogue was adjudicated, that coding stands in the place of the coders' own.
    """
    settled = {row["item_id"] for row in rows if row["source"] == "adjudicated"}
    found: dict[str, list[Coding]] = {}
    order = {"human": 0, "adjudicated": 0, "mapped": 1, "automatic": 2}
    for row in sorted(rows, key=lambda r: (order[r["source"]], r["coder"], r["item_id"])):
        if row["source"] == "human" and row["item_id"] in settled:
            continue
        by_people = row["source"] in ("human", "adjudicated")
        name = PEOPLE if by_people else f"{row['source']}: {row['coder']}"
        found.setdefault(name, []).append(coding_of(row))
    return found


def coding_of(row: Row) -> Coding:
    """A row of CODINGS as the summary code takes it."""
    return Coding(
        row["dialogue_id"],
        row["coder"],
        row["group"],
        dict(row["counts"]),
        dict(row["global_scores"]),
        row["rounds"],
        automatic=row["source"] == "automatic",
        scope=tuple(row["scope"]),
    )


STAGE = Stage("study", plan, run, check_paths=("miti",), uses_ray=False)
