"""The report page: its sections in order, and their rendering to one self-contained HTML file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from milm_ray.config import Config
from milm_ray.report import data, models, paper, replies, run, study
from milm_ray.report.blocks import Estimate, Remark, Section, Table
from milm_ray.workspace import Workspace

TEMPLATE = "page.html.j2"
STYLE = "style.css"

_HOW_TO_READ = (
    "Read from the top: what ran, the dialogues that went in, what the teacher model made of them, "
    "how close each base model comes to the teacher's replies before and after fine-tuning, and "
    "how the tuned models counsel.",
    "BLEU-4 and ROUGE count shared characters and words with a reference reply, in percent; higher "
    "means more alike. The reference was written by the teacher model, so these scores measure "
    "likeness to the teacher. They do not tell whether a reply is good counselling, or safe.",
    "A gain whose interval does not reach 0 is larger than the choice of test dialogues would "
    "explain. Whether it matters in practice is another question.",
    "A round is one client turn with the counselor's answer. Lengths are Chinese characters. A "
    "dash marks a value that does not exist; it is never a zero.",
    "The paper's figures stand beside ours for orientation, not for a race: data, test rounds and "
    "models differ unless the run used the paper's configuration on the paper's corpora.",
)


def sections(
    config: Config, ws: Workspace, found: Mapping[str, Mapping[str, Any]]
) -> list[Section]:
    """Every section of the page, in reading order."""
    guide = Section("guide", "How to read this", "", [Remark(text) for text in _HOW_TO_READ])
    return [
        guide,
        run.section(config, ws, found),
        data.corpora(ws, found),
        data.curation(ws, found),
        data.transcription(ws, found),
        data.statistics(ws, found),
        models.benchmarks(),
        models.finetune(config, ws, found),
        models.results(config, ws, found),
        replies.examples(config, ws, found),
        study.section(ws, found),
    ]


def tables(page: Sequence[Section]) -> list[Table]:
    """The tables of a page, for their CSV copies."""
    return [block for part in page for block in part.blocks if isinstance(block, Table)]


def glance(
    config: Config, found: Mapping[str, Mapping[str, Any]], gains: Mapping[str, Estimate]
) -> list[tuple[str, str]]:
    """The few numbers that a reader looks for first."""
    items = []
    for artifact, label in (
        ("dialogues", "source dialogues"),
        ("mi_dialogues", "MI dialogues"),
        ("test_rounds", "test rounds"),
    ):
        if artifact in found:
            number = run.rows_of(artifact, found[artifact])
            if number is not None:
                items.append((label, f"{number:,}"))
    for model, gain in gains.items():
        between = "" if gain.low is None else f", {gain.low:+.2f} to {gain.high:+.2f}"
        items.append((f"BLEU-4 gain, {model}{between}", f"{gain.mean:+.2f}"))
    return items


def render(
    config: Config, ws: Workspace, page: Sequence[Section], found: Mapping[str, Mapping[str, Any]]
) -> str:
    """The page as HTML, with styles and images inside."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    environment = Environment(loader=PackageLoader("milm_ray", "report"), autoescape=True)
    template = environment.get_template(TEMPLATE)
    name = ws.root.rstrip("/").rsplit("/", 1)[-1]
    return template.render(
        title="Motivational-interviewing models: what ran and what came out",
        subtitle="Chinese counselling dialogues rewritten into motivational interviewing, three "
        "base models tuned on them, and both compared on held-out rounds.",
        workspace_name=name,
        style=Markup(_resource(STYLE)),
        glance=glance(config, found, models.gains(config, ws, found)),
        sections=page,
        manifests={
            artifact: json.dumps(manifest, ensure_ascii=False, indent=1)
            for artifact, manifest in found.items()
        },
        paper_title=paper.TITLE,
        paper_citation=paper.CITATION,
    )


def _resource(name: str) -> str:
    return (files("milm_ray.report") / name).read_text(encoding="utf-8")


def appearance() -> str:
    """Template and style together: what a page was drawn with."""
    return _resource(TEMPLATE) + _resource(STYLE)
