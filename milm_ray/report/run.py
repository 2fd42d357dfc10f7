"""What ran: the artifacts of a workspace with their manifests, and the way from one to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow.fs as pafs

from milm_ray.config import Config
from milm_ray.report.blocks import Column, Facts, Section, Source, Table
from milm_ray.workspace import MANIFEST, Workspace, digest

# In the order of the pipeline; "/" stands for one artifact per model below it.
ARTIFACTS = (
    ("dialogues", "Source dialogues", "ingest"),
    ("verdicts", "Quality verdicts", "curate"),
    ("selection", "Selected corpora", "curate"),
    ("mi_dialogues", "MI dialogues", "transcribe"),
    ("train", "Training set", "split"),
    ("test", "Test set", "split"),
    ("test_rounds", "Test rounds", "split"),
    ("adapters/", "LoRA adapters", "finetune"),
    ("predictions", "Predictions", "generate"),
    ("metrics", "Metrics", "score"),
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
    for name, _, _ in ARTIFACTS:
        places = [name.rstrip("/"), *_children(ws, name)] if name.endswith("/") else [name]
        for place in places:
            if ws.exists(place, MANIFEST):
                found[place] = ws.manifest(place)
    return found


def _children(ws: Workspace, folder: str) -> list[str]:
    selector = pafs.FileSelector(ws.path(folder.rstrip("/")), allow_not_found=True)
    infos = ws.filesystem.get_file_info(selector)
    return sorted(f"{folder}{i.base_name}" for i in infos if i.type == pafs.FileType.Directory)


def headline(artifact: str, counts: Mapping[str, Any]) -> int | None:
    """How much an artifact holds: the count that its manifest calls rows, or the nearest to it."""
    wanted = ("rows", artifact, "dialogues", "rounds", "predictions", "samples")
    numbers = [counts[key] for key in wanted if isinstance(counts.get(key), int)]
    numbers += [value for value in counts.values() if isinstance(value, int)]
    return numbers[0] if numbers else None


def rejected(counts: Mapping[str, Any]) -> dict[str, int]:
    """The rejects of a manifest by reason; {} when none are counted."""
    found = counts.get("rejects", counts.get("rejected"))
    if isinstance(found, Mapping):
        return {str(reason): count for reason, count in found.items() if isinstance(count, int)}
    return {"rejected": found} if isinstance(found, int) and found else {}


def usage(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replies, tokens and cost of the language-model calls behind an artifact; {} without any."""
    return manifest.get("usage", {})


def flow(found: Mapping[str, Mapping[str, Any]]) -> Flow:
    """The flow picture, with the count of each artifact that is there."""
    steps = []
    for name, title, job in ARTIFACTS:
        if name.endswith("/"):
            models = [place for place in found if place.startswith(name)]
            count = f"{len(models)} models" if models else None
        elif name in found:
            number = headline(name, found[name]["counts"])
            count = "done" if number is None else f"{number:,}"
        else:
            count = None
        steps.append(Step(title, job, count))
    return Flow(tuple(steps))


def section(config: Config, ws: Workspace, found: Mapping[str, Mapping[str, Any]]) -> Section:
    """What ran, from which configuration and in how long."""
    rows = []
    for artifact, manifest in found.items():
        spent = usage(manifest)
        rejects = sum(rejected(manifest["counts"]).values())
        rows.append(
            [
                manifest["stage"],
                artifact,
                headline(artifact, manifest["counts"]),
                rejects,
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
