"""The data half of the page: corpora, curation, transcription, and the statistics of Table 3."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from milm_ray.report import paper
from milm_ray.report.blocks import (
    INTERVAL,
    Column,
    Estimate,
    Facts,
    Pair,
    Remark,
    Section,
    Speech,
    Table,
    absent,
    images,
)
from milm_ray.report.models import remarks
from milm_ray.report.run import source_list, usage
from milm_ray.workspace import Workspace

_SHOWN_TURNS = 8

Manifests = Mapping[str, Mapping[str, Any]]


def corpora(ws: Workspace, found: Manifests) -> Section:
    """What was read from each corpus, what was repaired and what could not be used."""
    if "dialogues" not in found:
        return absent("corpora", "Corpora", "dialogues/", "ingest")
    summary = found["dialogues"]["corpora"]
    rounds = _mean_rounds(ws)
    rows = [
        [
            entry["title"],
            entry["files"],
            entry["dialogues"],
            rounds.get(corpus),
            sum(entry["rejects"].values()),
            sum(entry["repairs"].values()),
        ]
        for corpus, entry in summary.items()
    ]
    read = Table(
        "corpora",
        "Dialogues read per corpus",
        [
            Column("Corpus"),
            Column("Files", numeric=True),
            Column("Dialogues", numeric=True),
            Column("Rounds per dialogue", digits=2, numeric=True),
            Column("Rejected", numeric=True),
            Column("Repairs", numeric=True),
        ],
        rows,
        ["A round is one client turn with the counselor's answer."],
    )
    reasons = [
        [entry["title"], what, reason.replace("_", " "), count]
        for entry in summary.values()
        for what, key in (("rejected", "rejects"), ("repaired", "repairs"))
        for reason, count in entry[key].items()
    ]
    handled = Table(
        "corpora_handled",
        "What was rejected or repaired, by reason",
        [Column("Corpus"), Column("Handling"), Column("Reason"), Column("Count", numeric=True)],
        reasons,
        ["Each case is listed with its file in rejects/ingest/ and repairs/ingest/."],
        grouped=True,
    )
    return Section(
        "corpora",
        "Corpora",
        "Ordinary Chinese counselling dialogues, read from the corpora's own files.",
        [read, *([handled] if reasons else [Remark("Nothing was rejected or repaired.")])],
        source_list(found, "dialogues"),
    )


def _mean_rounds(ws: Workspace) -> dict[str, float]:
    """Corpus → mean rounds of its dialogues."""
    table = ws.read_table("dialogues", ["corpus", "turns"])
    sizes = pa.table({"corpus": table["corpus"], "turns": pc.list_value_length(table["turns"])})
    grouped = sizes.group_by("corpus").aggregate([("turns", "mean")])
    return {row["corpus"]: row["turns_mean"] / 2 for row in grouped.to_pylist()}


def reject_counts(ws: Workspace, stage: str) -> dict[tuple[str, str], int]:
    """(corpus, reason) → number of rejects that a stage wrote."""
    selector = pafs.FileSelector(ws.path("rejects", stage), recursive=True, allow_not_found=True)
    files = [
        info.path
        for info in ws.filesystem.get_file_info(selector)
        if info.path.endswith(".parquet")
    ]
    if not files:
        return {}
    table = pq.read_table(files, filesystem=ws.filesystem, columns=["corpus", "reason"])
    grouped = table.group_by(["corpus", "reason"]).aggregate([([], "count_all")])
    return {(r["corpus"], r["reason"]): r["count_all"] for r in grouped.to_pylist()}


def _reject_table(stage: str, rejects: Mapping[tuple[str, str], int]) -> list[Any]:
    if not rejects:
        return [Remark("No row was rejected.")]
    rows = [[corpus, reason, count] for (corpus, reason), count in sorted(rejects.items())]
    columns = [Column("Corpus"), Column("Reason"), Column("Rows", numeric=True)]
    foot = [f"Each rejected row with its raw text is in rejects/{stage}/."]
    return [Table(f"rejects_{stage}", "Rejected, by reason", columns, rows, foot)]


def curation(ws: Workspace, found: Manifests) -> Section:
    """Figure 2: the judge's verdicts per corpus, and which corpora were kept on which scale."""
    if "selection" not in found:
        return absent("curation", "Curation", "selection/", "curate")
    selection = json.loads(ws.read_text("selection", "selection.json"))
    selected, corpora_ = selection["selected"], selection["corpora"]
    maxima = selection["maxima"]
    titles = _titles(found)
    order = selection["rankings"][selection["scale"]]
    order += [corpus for corpus in corpora_ if corpus not in order]
    dimension_rows, total_rows = [], []
    for corpus in order:
        summary = corpora_[corpus]
        dimensions, totals = summary["dimensions"] or {}, summary["totals"] or {}
        name = titles.get(corpus, corpus)
        dimension_rows.append(
            [
                name,
                "kept" if corpus in selected else "",
                summary["n"],
                summary["unscored"],
                *(dimensions.get(dimension, {}).get("mean") for dimension in maxima["turn"]),
            ]
        )
        placed: list[Any] = []
        for scale, ranking in selection["rankings"].items():
            placed += [
                _estimate(totals.get(scale, {})),
                ranking.index(corpus) + 1 if corpus in ranking else None,
            ]
        total_rows.append([name, *placed])
    dimensions_table = Table(
        "figure2_verdicts",
        "Figure 2 as a table. Mean verdicts per corpus, best first",
        [
            Column("Corpus"),
            Column("Kept"),
            Column("Scored", numeric=True),
            Column("Unscored", numeric=True),
            *(
                Column(f"{name.capitalize()}, of {maximum}", digits=2, numeric=True)
                for name, maximum in maxima["turn"].items()
            ),
        ],
        dimension_rows,
        ["A reply of the judge that could not be read is unscored: it counts in no mean."],
    )
    labels = {
        "fraction": "Fraction",
        "turn": f"Total of {sum(maxima['turn'].values())}",
        "dialogue": f"Total of {sum(maxima['dialogue'].values())}",
    }
    totals_table = Table(
        "curation_totals",
        "Totals and places on each scale, with 95 % intervals",
        [
            Column("Corpus"),
            *(
                column
                for scale in selection["rankings"]
                for column in (
                    Column(labels[scale], digits=2, numeric=True, parts=INTERVAL),
                    Column(f"Place by {scale}", numeric=True),
                )
            ),
        ],
        total_rows,
        [f"{selection['note']} Used to select: {selection['scale']}."],
    )
    figure = images(ws, "selection", {"figure2": "Figure 2. Quality of the corpora"})
    return Section(
        "curation",
        "Curation",
        "A seeded sample of each corpus, judged on four dimensions. The best corpora go on.",
        [*figure, dimensions_table, totals_table, *remarks("curation")],
        source_list(found, "verdicts", "selection"),
    )


def _titles(found: Manifests) -> dict[str, str]:
    """Corpus → the name it is published under."""
    corpora_ = found["dialogues"]["corpora"] if "dialogues" in found else {}
    return {corpus: entry["title"] for corpus, entry in corpora_.items()}


def _estimate(cell: Mapping[str, Any]) -> Estimate:
    low, high = cell.get("interval", (None, None))
    return Estimate(cell.get("mean"), low, high)


def transcription(ws: Workspace, found: Manifests) -> Section:
    """Counts, cost and rejects of the rewrite into MI style, and one dialogue before and after."""
    if "mi_dialogues" not in found:
        return absent("transcription", "Transcription into MI", "mi_dialogues/", "transcribe")
    manifest = found["mi_dialogues"]
    counts, spent = manifest["counts"], usage(manifest)
    table = ws.read_table("mi_dialogues")
    silent = spent["replies"] == spent["replies_with_unknown_tokens"]
    facts = Facts(
        [
            ("Teacher", manifest["llm"]["model"]),
            ("Prompt", f"{manifest['prompt']['name']}, {manifest['prompt']['version']}"),
            ("Dialogues asked for", counts["asked"]),
            ("Transcribed", counts["transcribed"]),
            ("Rejected", counts["rejected"]),
            ("Repaired by a second reply", counts["repaired"]),
            ("Replies", spent["replies"]),
            ("Prompt tokens", None if silent else spent["prompt_tokens"]),
            ("Completion tokens", None if silent else spent["completion_tokens"]),
            ("Replies of unknown tokens", spent["replies_with_unknown_tokens"]),
            ("Cost, USD", spent["cost_usd"]),
            ("Replies of unknown cost", spent["replies_with_unknown_cost"]),
        ]
    )
    blocks: list[Any] = [facts, *_reject_table("transcribe", reject_counts(ws, "transcribe"))]
    behaviours = counts["by_target_behavior"]
    if behaviours:
        blocks += [
            Remark(
                "Target behaviours of the MI dialogues, found by keywords in what the client says:"
            ),
            Facts([(name.replace("_", " "), count) for name, count in behaviours.items()]),
        ]
    pair = _example_pair(ws, found, table)
    if pair:
        blocks.append(pair)
    return Section(
        "transcription",
        "Transcription into MI",
        "A teacher model rewrites each source dialogue so that the counselor keeps to motivational "
        "interviewing.",
        [*blocks, *remarks("transcription")],
        source_list(found, "mi_dialogues"),
    )


def _example_pair(ws: Workspace, found: Manifests, table: Any) -> Pair | None:
    """The first MI dialogue, in the order of ids, whose source is in the workspace too."""
    if "dialogues" not in found or not table.num_rows:
        return None
    rewritten = table.sort_by("dialogue_id").slice(0, 1).to_pylist()[0]
    source = (
        ws.read_table("dialogues")
        .filter(pc.field("dialogue_id") == rewritten["source_dialogue_id"])
        .to_pylist()
    )
    if not source:
        return None
    behaviour = rewritten["target_behavior"].replace("_", " ")
    corpus = _titles(found).get(rewritten["corpus"], rewritten["corpus"])
    about = f"; target behaviour: {behaviour}" if behaviour else ""
    return Pair(
        f"{corpus}, {rewritten['source_id']}: before and after transcription{about}",
        _speech("Source", source[0]["turns"]),
        _speech("Transcribed", rewritten["turns"]),
    )


def _speech(title: str, turns: list[dict[str, str]]) -> Speech:
    shown = [(turn["role"], turn["content"]) for turn in turns[:_SHOWN_TURNS]]
    return Speech(f"{title}, {len(turns) // 2} rounds", shown, max(0, len(turns) - _SHOWN_TURNS))


# The sets of Table 3 that the paper reports, by the name that split gives them.
_PAPER_SETS = {"corpus cpsycound": "cpsycound", "MI train": "train", "MI test": "test"}


def statistics(ws: Workspace, found: Manifests) -> Section:
    """Table 3: dialogues, rounds and lengths of turns, the paper's figures beside ours."""
    if "statistics" not in found:
        return absent("statistics", "Statistics", "statistics/", "split")
    table3 = json.loads(ws.read_text("statistics", "table3.json"))
    rows = []
    for ours in table3["rows"]:
        theirs = paper.TABLE_3.get(_PAPER_SETS.get(ours["set"], ""), {})
        rows.append(
            [
                ours["set"],
                ours["dialogues"],
                ours["rounds"],
                ours["rounds_per_dialogue"],
                theirs.get("rounds"),
                ours["client_characters"],
                theirs.get("client_chars"),
                ours["counselor_characters"],
                theirs.get("counselor_chars"),
            ]
        )
    table = Table(
        "table3_statistics",
        "Table 3. Dialogues, rounds and lengths of turns",
        [
            Column("Set"),
            Column("Dialogues", numeric=True),
            Column("Rounds", numeric=True),
            Column("Rounds each", digits=2, numeric=True),
            Column("Paper: rounds", digits=2, numeric=True),
            Column("Client turn", digits=2, numeric=True),
            Column("Paper: client", digits=2, numeric=True),
            Column("Counselor turn", digits=2, numeric=True),
            Column("Paper: counselor", digits=2, numeric=True),
        ],
        rows,
        [
            f"Length of a turn: {table3['counting_rule']}.",
            "The paper's cells that were not available to us are left empty. Its train and test "
            "sets have 2,000 and 40 dialogues.",
        ],
    )
    return Section(
        "statistics",
        "Statistics",
        "What the dialogues look like before and after transcription, and on either side of the "
        "split.",
        [table, *remarks("statistics")],
        source_list(found, "statistics", "train", "test", "test_rounds"),
    )
