"""Split: training and test dialogues, the test rounds, Table 3, and LLaMA-Factory's JSON.

In: `mi_dialogues/`, `dialogues/`. Out: `train/`, `test/` (rows of MI_DIALOGUES), `test_rounds/`
(rows of ROUNDS), `statistics/` (table3.json) and `llamafactory/`.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads

from milm_ray.config import Config
from milm_ray.dataset import export
from milm_ray.dataset.augment import augment, paraphrasing_plan
from milm_ray.dataset.rounds import ROUNDS_PER_GROUP, rounds
from milm_ray.dataset.sampling import rank
from milm_ray.dataset.statistics import COUNTING_RULE, table_row
from milm_ray.dataset.table_rows import Row, TableRows, in_columns
from milm_ray.errors import UserError
from milm_ray.job import Plan, Stage, finished
from milm_ray.llm.reply_store import answered_by
from milm_ray.models.messages import INSTRUCTION
from milm_ray.schema import MI_DIALOGUES, ROUNDS
from milm_ray.workspace import Workspace

ARTIFACTS = ("train", "test", "test_rounds", "llamafactory", "statistics")


def split(rows: Sequence[Row], test_dialogues: int, seed: int) -> tuple[list[int], list[int]]:
    """Places of training and test rows (of MI_DIALOGUES), ascending; seeded, without leakage.

    Rows that come from one source dialogue, or whose text is the same, stay on one side. Takes
    whole groups in a seeded order until the test set has exactly `test_dialogues`; UserError when
    there are too few dialogues.
    """
    if len(rows) <= test_dialogues:
        raise UserError(
            f"{len(rows)} MI dialogues cannot give {test_dialogues} for the test and some to train",
            "lower split.test_dialogues or transcribe more dialogues",
        )
    groups, sources = _groups(rows)

    def order(group: Sequence[int]) -> str:
        return min(rank(seed, "split", sources[place]) for place in group)

    tested: set[int] = set()
    for members in sorted(groups, key=order):
        if len(tested) + len(members) <= test_dialogues:
            tested.update(members)
    if len(tested) < test_dialogues:
        raise UserError(
            f"no choice of whole source dialogues makes a test set of {test_dialogues}",
            "choose another split.test_dialogues",
        )
    return [place for place in range(len(rows)) if place not in tested], sorted(tested)


def _groups(rows: Sequence[Row]) -> tuple[list[list[int]], list[str]]:
    """Places of rows that must stay together (the same source, or the same text); all sources."""
    parent = list(range(len(rows)))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    first: dict[tuple[str, Any], int] = {}
    sources = []
    for place, row in enumerate(rows):
        said = json.dumps([turn["content"] for turn in row["turns"]])
        text = hashlib.sha256(said.encode()).digest()
        sources.append(row["source_dialogue_id"])
        for mark in (("source", sources[place]), ("text", text)):
            parent[root(place)] = root(first.setdefault(mark, place))
    members: dict[int, list[int]] = defaultdict(list)
    for place in range(len(rows)):
        members[root(place)].append(place)
    return list(members.values()), sources


def _fingerprint(config: Config, workspace: Workspace) -> dict[str, Any]:
    settings = {"seed": config.seed, **config.split.model_dump(), "instruction": INSTRUCTION}
    if config.augment.synonyms or config.augment.paraphrases:
        settings["augment"] = config.augment.model_dump()
    if config.augment.paraphrases:
        settings["teacher"] = answered_by(config.teacher)
    return workspace.fingerprint(settings, workspace.input_digests("mi_dialogues"))


def plan(config: Config, workspace: Workspace) -> Plan:
    """How many MI dialogues there are to split."""
    if not workspace.exists("mi_dialogues", "manifest.json"):
        return Plan()
    fingerprint = _fingerprint(config, workspace)
    done = all(workspace.is_done(artifact, fingerprint) for artifact in ARTIFACTS)
    number = workspace.manifest("mi_dialogues")["counts"]["transcribed"]
    if done or not config.augment.paraphrases:
        return Plan(number, done=done)
    rows = TableRows(workspace.read_table("mi_dialogues"))
    train, _ = split(rows, config.split.test_dialogues, config.seed)
    return replace(paraphrasing_plan(config, workspace, rows.take(train)), rows=number)


def run(config: Config, workspace: Workspace) -> Mapping[str, Any]:
    """Split, count and export; returns the manifest of `statistics/`."""
    fingerprint = _fingerprint(config, workspace)
    # `statistics` is written last: where it is current, so are the others.
    if finished(workspace, "statistics", fingerprint):
        return workspace.manifest("statistics")
    started = time.time()
    mi = workspace.read_table("mi_dialogues")
    rows = TableRows(mi)
    places = split(rows, config.split.test_dialogues, config.seed)
    parts = [in_columns(rows.take(part), MI_DIALOGUES) for part in places]
    train, test = map(TableRows, parts)
    test_rounds = [row for dialogue in test for row in rounds(dialogue)]
    added = augment(config, workspace, train)

    def commit(artifact: str, counts: Mapping[str, Any], **facts: Any) -> Mapping[str, Any]:
        return workspace.commit(
            artifact,
            stage="split",
            settings=config.split,
            fingerprint=fingerprint,
            counts=counts,
            started=started,
            **facts,
        )

    for artifact in ARTIFACTS:
        workspace.clear(artifact)
    for artifact, part in zip(("train", "test"), parts, strict=True):
        workspace.write_table(part, artifact)
    more = pa.Table.from_pylist(added.rows, schema=MI_DIALOGUES)
    if added.rows:
        workspace.write_table(more, "train", "part-1-augmented.parquet")
    counts = {"dialogues": len(train), "augmented": len(added.rows)}
    commit("train", {**counts, "left_out": added.left_out}, usage=added.usage)
    commit("test", {"dialogues": len(test)})
    table = pa.Table.from_pylist(test_rounds, schema=ROUNDS)
    workspace.write_table(table, "test_rounds", rows_per_group=ROUNDS_PER_GROUP)
    commit("test_rounds", {"rounds": len(test_rounds)}, instruction=INSTRUCTION)
    every = train.then(TableRows(more))
    for name, records in export.files(every, test).items():
        workspace.write_stream(json_list(records), "llamafactory", name)
    workspace.write_text(_json(export.index()), "llamafactory", export.INDEX)
    commit(
        "llamafactory", {"train_dialogues": sum(counts.values()), "test_rounds": len(test_rounds)}
    )
    table3 = _table3(workspace, mi, *parts)
    if added.rows:
        table3["rows"].append(_row("MI train with copies", pa.concat_tables([parts[0], more])))
    workspace.write_text(_json(table3), "statistics", "table3.json")
    return commit(
        "statistics",
        {"train": len(train), "test": len(test), "test_rounds": len(test_rounds)},
        table3=table3,
    )


def _table3(workspace: Workspace, mi: pa.Table, train: pa.Table, test: pa.Table) -> dict[str, Any]:
    """Table 3: each source corpus whole, the dialogues transcribed, their MI form, train, test."""
    dialogues = pads.dataset(
        workspace.parquet_files("dialogues"), filesystem=workspace.filesystem, format="parquet"
    )
    sources = mi["source_dialogue_id"].unique()
    conditions = {
        f"corpus {name}": pads.field("corpus") == name
        for name in sorted(mi["corpus"].unique().to_pylist())
    }
    conditions["transcribed sources"] = pads.field("dialogue_id").isin(sources)
    rows = [
        table_row(name, (b["turns"] for b in dialogues.to_batches(["turns"], filter=condition)))
        for name, condition in conditions.items()
    ]
    sets = {"MI dialogues": mi, "MI train": train, "MI test": test}
    rows += [_row(name, part) for name, part in sets.items()]
    return {"counting_rule": COUNTING_RULE, "rows": rows}


def _row(name: str, table: pa.Table) -> dict[str, Any]:
    batches = table.select(["turns"]).to_batches(max_chunksize=4096)
    return table_row(name, (batch["turns"] for batch in batches))


def json_list(records: Iterable[Any]) -> Iterator[bytes]:
    """The text of json.dumps(records, indent=1), piece by piece."""
    opened = False
    for record in records:
        yield b",\n" if opened else b"[\n"
        yield textwrap.indent(_json(record), " ").encode()
        opened = True
    yield b"\n]" if opened else b"[]"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1)


STAGE = Stage("split", plan, run, uses_ray=False)
