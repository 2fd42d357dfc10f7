"""The report stage: whatever artifacts a workspace holds → report/index.html and CSV tables."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from milm_ray.config import Config
from milm_ray.job import Plan, Stage, finished
from milm_ray.report import page, run
from milm_ray.workspace import Workspace

ARTIFACT = "report"


def _made_from(
    config: Config, ws: Workspace, found: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    settings = {"config": config.model_dump(mode="json"), "appearance": page.appearance()}
    return ws.fingerprint(settings, {name: found[name]["digest"] for name in found})


def plan(config: Config, ws: Workspace) -> Plan:
    """Rows: artifacts to report on. Done when none has changed since the last report."""
    found = run.manifests(ws)
    done = ws.is_done(ARTIFACT, _made_from(config, ws, found))
    note = () if found else ("no artifact is in the workspace yet",)
    return Plan(rows=len(found) or None, done=done, notes=note)


def write(config: Config, ws: Workspace) -> Mapping[str, Any]:
    """Write the page and the CSV copies of its tables. Returns the manifest."""
    found = run.manifests(ws)
    made_from = _made_from(config, ws, found)
    if finished(ws, ARTIFACT, made_from):
        return ws.manifest(ARTIFACT)
    started = time.time()
    ws.clear(ARTIFACT)
    parts = page.sections(config, ws, found)
    tables = page.tables(parts)
    for table in tables:
        ws.write_text(table.csv(), ARTIFACT, f"{table.name}.csv")
    ws.write_text(page.render(config, ws, parts, found), ARTIFACT, "index.html")
    return ws.commit(
        ARTIFACT,
        stage="report",
        settings=config,
        fingerprint=made_from,
        counts={
            "artifacts": len(found),
            "sections": len(parts),
            "absent": sum(bool(part.absent) for part in parts),
            "tables": len(tables),
        },
        started=started,
    )


STAGE = Stage("report", plan, write, uses_ray=False)
