"""What ran: the artifacts of a workspace with their manifests, and the way from one to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow.fs as pafs

from milm_ray.config import Config
from milm_ray.report.blocks import Column, Facts, Section, Source, Table
from milm_ray.workspace import MANIFEST, Workspace, digest


@dataclass(frozen=True)
class Artifact:
    """An artifact of the workspace and the count in its manifest that says how much it holds.

    A name that ends in "/" stands for the artifacts below it (one per model, one per source of
    sessions). shown: in the flow picture.
    """

    name: str
    title: str
    job: str
    count: str
    shown: bool = True

    @property
    def folder(self) -> str:
        return self.name.rstrip("/")


# In the order of the pipeline.
ARTIFACTS = (
    Artifact("dialogues", "Source dialogues", "ingest", "dialogues"),
    Artifact("verdicts", "Judged dialogues", "curate", "judged"),
    Artifact("selection", "Selected corpora", "curate", "selected"),
    Artifact("mi_dialogues", "MI dialogues", "transcribe", "transcribed"),
    Artifact("train", "Training dialogues", "split", "dialogues"),
    Artifact("test", "Test dialogues", "split", "dialogues"),
    Artifact("test_rounds", "Test rounds", "split", "rounds"),
    Artifact("statistics", "Table 3", "split", "sets", shown=False),
    Artifact("llamafactory", "LLaMA-Factory export", "split", "records", shown=False),
    Artifact("adapters/", "Adapters", "finetune", "samples"),
    Artifact("preferences", "Preference pairs", "preferences", "pairs", shown=False),
    Artifact("predictions", "Predictions", "generate", "rows"),
    Artifact("metrics", "Scores", "score", "rows"),
    Artifact("sessions/", "Sessions", "simulate", "sessions"),
    Artifact("packet", "Blind packet", "miti", "dialogues", shown=False),
    Artifact("packet_key", "Its key", "miti", "dialogues", shown=False),
    Artifact("codings", "Codings", "miti", "codings"),
    Artifact("study", "Tables 4 to 6", "miti", "tables", shown=False),
)


@dataclass(frozen=True)
class Step:
    """One box of the flow picture; `count` is None where the artifact is absent."""

    title: str
    job: str
    count: str | None


@dataclass(frozen=True)
class Flow:
    """The way of the data through the pipeline."""

    kind: ClassVar[str] = "flow"
    steps: tuple[Step, ...]


def manifests(ws: Workspace) -> dict[str, dict[str, Any]]:
    """Every finished artifact of the workspace but the report, in the order of the pipeline."""
    found: dict[str, dict[str, Any]] = {}
    for artifact in ARTIFACTS:
        each = _children(ws, artifact.name) if artifact.name.endswith("/") else []
        if artifact.name == "adapters/":
            each = [place for child in each for place in (child, f"{child}/dpo")]
        for place in (artifact.folder, *each):
            if ws.exists(place, MANIFEST):
                found[place] = ws.manifest(place)
    return found


def _children(ws: Workspace, folder: str) -> list[str]:
    selector = pafs.FileSelector(ws.path(folder.rstrip("/")), allow_not_found=True)
    infos = ws.filesystem.get_file_info(selector)
    return sorted(f"{folder}{i.base_name}" for i in infos if i.type == pafs.FileType.Directory)


def rows_of(place: str, manifest: Mapping[str, Any]) -> int | None:
    """How much an artifact holds, by the count that stands for it; None where it has none."""
    for artifact in ARTIFACTS:
        below = artifact.name.endswith("/") and place.startswith(artifact.name)
        if below or place == artifact.name:
            counts = manifest["counts"]
            # Exports of the chat made before they said "sessions" say "rows".
            before = counts.get("rows") if artifact.name == "sessions/" else None
            return counts.get(artifact.count, before)
    return None


def rejected(counts: Mapping[str, Any]) -> int | None:
    """How many rows a stage could not use; None where it rejects nothing by its nature."""
    number = counts.get("rejects", counts.get("rejected", counts.get("unscored")))
    return sum(number.values()) if isinstance(number, Mapping) else number


def usage(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replies, tokens and cost of the language-model calls behind an artifact; {} without any."""
    return manifest.get("usage") or {}


def flow(found: Mapping[str, Mapping[str, Any]]) -> Flow:
    """The flow picture, with the count of each artifact that is there."""
    steps = []
    for artifact in ARTIFACTS:
        count = None
        below = [place for place in found if place.startswith(artifact.name)]
        if artifact.name == "adapters/":
            models = {place.split("/")[1] for place in below}
            count = f"{len(models)} models" if below else None
        elif artifact.name.endswith("/"):
            total = sum(rows_of(place, found[place]) or 0 for place in below)
            count = f"{total:,}" if below else None
        elif artifact.name in found:
            number = rows_of(artifact.name, found[artifact.name])
            count = "done" if number is None else f"{number:,}"
        if artifact.shown:
            steps.append(Step(artifact.title, artifact.job, count))
    return Flow(tuple(steps))


def section(config: Config, ws: Workspace, found: Mapping[str, Mapping[str, Any]]) -> Section:
    """What ran, from which configuration and in how long."""
    rows = []
    for artifact, manifest in found.items():
        spent = usage(manifest)
        rows.append(
            [
                manifest["stage"],
                artifact,
                rows_of(artifact, manifest),
                rejected(manifest["counts"]),
                spent.get("replies"),
                spent.get("cost_usd"),
                manifest["seconds"],
                _minute(manifest["finished_at"]),
                manifest["digest"][:12],
            ]
        )
    table = Table(
        "run",
        "Artifacts of this workspace, in the order of the pipeline",
        [
            Column("Stage"),
            Column("Artifact"),
            Column("Rows", numeric=True),
            Column("Rejected", numeric=True),
            Column("LLM replies", numeric=True),
            Column("Cost, USD", digits=2, numeric=True),
            Column("Seconds", digits=1, numeric=True),
            Column("Finished, UTC"),
            Column("Content, sha256"),
        ],
        rows,
        ["Each artifact's manifest.json holds the full digest, its settings and its inputs."],
    )
    versions: dict[str, set[str]] = {}
    for manifest in found.values():
        for package, number in manifest["versions"].items():
            versions.setdefault(package, set()).add(number)
    facts = Facts(
        [
            ("Workspace", ws.uri),
            ("Configuration, sha256", digest(config)),
            ("Seed", config.seed),
            ("Versions", ", ".join(f"{k} {' / '.join(sorted(v))}" for k, v in versions.items())),
        ],
        wide=True,
    )
    return Section(
        "run",
        "What ran",
        "A stage that has not run is shown as absent; nothing on this page stands in for it.",
        [flow(found), table, facts] if found else [flow(found), facts],
        [],
        "" if found else "No stage has finished in this workspace yet: run jobs/pipeline.py.",
    )


def source_list(found: Mapping[str, Mapping[str, Any]], *artifacts: str) -> list[Source]:
    """The sources of a section, of those artifacts that are there."""
    return [
        Source.of(place, manifest)
        for place, manifest in found.items()
        if any(place == a or (a.endswith("/") and place.startswith(a)) for a in artifacts)
    ]


def _minute(stamp: str) -> str:
    return stamp[:16].replace("T", " ")
