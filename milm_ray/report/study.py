"""The MITI study on the page: sessions, Tables 4 to 6, comparisons, agreement, how to read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from milm_ray.errors import UserError
from milm_ray.miti.tables import LAYOUT
from milm_ray.report.blocks import Column, Estimate, Facts, Remark, Section, Table, absent
from milm_ray.report.run import source_list, usage
from milm_ray.workspace import Workspace

Manifests = Mapping[str, Mapping[str, Any]]
_SIMULATED = "sessions/simulated"
_HOW_TO_READ = (
    "For clinicians. MITI counts what the counselor does in each turn (questions, reflections, "
    "affirmations, advice and so on) and lets the coder judge the whole dialogue on four scales "
    "from 1 to 5. Fair and Good are the manual's thresholds for clinicians, set by its authors' "
    "opinion; that a model reaches one does not make it a therapist, and says nothing of safety.",
    "Look first at who coded. Tables of codes by people and tables of AUTOMATIC codes are never "
    "mixed. Automatic codes show that the study runs and give a first impression; they must not be "
    "cited as MITI scores. Look next at n: with ten dialogues a group, a mean can move by a whole "
    "code when one dialogue changes, and the range in brackets says more than the mean does.",
    "Clients marked as simulated are programs that follow a model of readiness to change. They "
    "cannot be helped or harmed, and how a counselor does with them is not how it does with "
    "people.",
)


def section(ws: Workspace, found: Manifests) -> Section:
    """The study's blocks; what is missing of it is said.

    Raises UserError for a study that another version of this program wrote.
    """
    title = "The MITI study"
    if "study" not in found:
        return absent("miti", title, "study/", "miti")
    study = json.loads(ws.read_text("study", "study.json"))
    if study.get("layout") != LAYOUT:
        raise UserError(
            "study/ was written by another version of this program, in a layout that this one "
            "does not read",
            "run jobs/miti.py again with the same settings, then jobs/report.py; codings by people "
            "are kept",
        )
    counts = found["study"]["counts"]
    coders = ", ".join(study["people"]) or "none yet: no sheet has come back"
    waiting = found.get("codings", {}).get("still_to_code", {})
    missing = ", ".join(f"{coder} ({number})" for coder, number in waiting.items())
    blocks: list[Any] = [Remark(text) for text in _HOW_TO_READ]
    blocks.append(
        Facts(
            [
                ("Dialogues", counts["dialogues"]),
                ("Codings", counts["codings"]),
                ("Left uncoded", counts["uncoded"]),
                ("People who coded", coders),
                ("Dialogues still to code", missing or "none"),
            ]
        )
    )
    real = found.get("packet_key", {}).get("annomi_ids", [])
    if real:
        ids = ", ".join(sorted((name.removeprefix("annomi-") for name in real), key=int))
        blocks.append(Facts([("AnnoMI transcripts", ids)], wide=True))
    if _SIMULATED in found:
        blocks += _simulator(found[_SIMULATED])
    blocks += [_table(table) for table in study["tables"]]
    if "trained" in found.get("codings", {}):
        blocks.append(_validation(found["codings"]["trained"]))
    if study["uncoded"]:
        rows = [[row["item_id"], row["coder"], row["reason"]] for row in study["uncoded"]]
        columns = [Column("Dialogue"), Column("Coder"), Column("Why", wrap=True)]
        foot = ["An uncoded dialogue is in no table; it is not one without codes."]
        blocks.append(Table("uncoded", "Dialogues that a coder left uncoded", columns, rows, foot))
    blocks += [Remark(handling, finding) for finding, handling in study["notes"]]
    return Section(
        "miti",
        title,
        "How the MI-LLMs counsel, by the Motivational Interviewing Treatment Integrity scheme.",
        blocks,
        source_list(found, "sessions/", "packet", "codings", "study"),
    )


def _table(table: Mapping[str, Any]) -> Table:
    columns = [
        Column(
            column["label"],
            digits=column["digits"],
            numeric=column["digits"] is not None,
            parts=tuple(column["parts"]),
            wrap=column["label"] in ("Remark", "Result"),
            least=0.001 if column["label"] == "p" else None,
        )
        for column in table["columns"]
    ]
    rows = [
        [Estimate(*cell) if isinstance(cell, list) else cell for cell in row]
        for row in table["rows"]
    ]
    grouped = table["name"].partition("_")[0] in ("table5", "table6", "comparisons", "ratios")
    return Table(f"miti_{table['name']}", table["caption"], columns, rows, table["foot"], grouped)


def _simulator(manifest: Mapping[str, Any]) -> list[Any]:
    """How consistent the simulated clients were, beside what was published of real ones."""
    figures, targets = manifest["consistency"], manifest["consistency_targets"]
    labels = (
        ("receptivity", "Mean receptivity, 1 closed to 5 open"),
        ("motivated", "Left precontemplation within 20 turns, of the sessions that began there"),
        ("lawful", "Turns whose action the state allows"),
        ("recognised", "Turns whose action was recognised blind"),
        ("repeated", "Client turns said before in the session"),
    )
    turns = figures["client_turns"]
    of = {
        "motivated": figures["began_in_precontemplation"],
        "recognised": figures["recognised_turns"],
    }
    rows = [
        [label, figures[name], of.get(name, turns), targets.get(name)] for name, label in labels
    ]
    table = Table(
        "miti_simulator",
        "Consistency of the simulated clients",
        [
            Column("Figure"),
            Column("Here", digits=2, numeric=True),
            Column("n", digits=0, numeric=True),
            Column("Published"),
        ],
        rows,
        [
            f"{figures['sessions']} sessions, {turns} client turns, client: "
            f"{manifest['simulator']}. Published: Yang et al., ACL 2025. A dash: not measured. n: "
            "the sessions or client turns that the figure is of."
        ],
    )
    spent = usage(manifest)
    if not spent:
        return [table]
    facts = Facts([("Client's model", manifest["llm"]["model"]), ("Replies", spent["replies"])])
    return [table, facts]


def _validation(trained: Mapping[str, Any]) -> Table:
    """How far the automatic Chinese coder can be trusted, code by code and in its totals."""
    totals = trained.get("totals", {})  # codings made before these were written have none
    rows = [
        [code.replace("_", " "), f1, *totals.get(code, (None, None, None))]
        for code, f1 in trained["f1"].items()
    ]
    columns = [Column("Code"), Column("F1", digits=2, numeric=True)]
    columns += [
        Column(label, digits=0, numeric=True) for label in ("Labels", "Best guesses", "Expected")
    ]
    return Table(
        "miti_trained_coder",
        "The AUTOMATIC Chinese coder on utterances it has not seen",
        columns,
        rows,
        [
            f"{trained['utterances']} utterances of {trained['dialogues']} dialogues, cross-"
            f"validated by dialogue: macro F1 {trained['macro_f1']:.2f}, kappa "
            f"{trained['kappa']:.2f}. Its labels were given once, not by trained MITI coders; a "
            "code with a low F1 is hardly more than a guess. It goes by wording and does not "
            "notice nonsense: a model that strings MI phrases together is given MI codes.",
            "Labels: how many of the utterances have the code by their labels. The coder's totals "
            "beside it, both AUTOMATIC: best guesses, and expected ones, the sum of how probable "
            "the code is. Its tables of codes count by expected ones.",
        ],
    )
