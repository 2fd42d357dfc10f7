"""Parts: what one task makes of one chunk, and the removal of duplicates across them.

A part is one Parquet file of each artifact that has rows, all under the part's name. Only its ids
and counts travel back to the driver.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from milm_ray.corpora.files import Chunk, contents
from milm_ray.corpora.readers import READERS
from milm_ray.corpora.reading import STAGE, Parsed, Unusable
from milm_ray.schema import DIALOGUES, REJECTS, TURN, Dialogue
from milm_ray.workspace import Workspace

DIALOGUES_DIR, REJECTS_DIR, REPAIRS_DIR = "dialogues", "rejects/ingest", "repairs/ingest"


@dataclass(frozen=True)
class Part:
    """A part as the driver sees it. ids: 32 bytes a dialogue, in the order of the rows."""

    name: str
    corpus: str
    files: int
    ids: bytes
    source_ids: Sequence[str]
    rejects: Counter[str]
    repairs: Counter[str]

    @property
    def dialogues(self) -> int:
        return len(self.source_ids)


def read_chunk(chunk: Chunk, workspace: Workspace) -> Part:
    """Read one chunk and write its part of the three artifacts."""
    reader = READERS[chunk.corpus]
    total = Parsed(chunk.corpus, chunk.part)
    files = 0
    for name, data in contents(chunk, reader):
        files += 1
        if isinstance(data, Unusable):
            parsed = Parsed(chunk.corpus, name)
            parsed.reject(data.reason, name, data.detail)
        else:
            parsed = reader.read(name, data, None if reader.one_per_file else chunk.limit)
        total.dialogues += parsed.dialogues
        total.ids += parsed.ids
        total.rejects += parsed.rejects
        total.repairs += parsed.repairs
    file = f"{chunk.part}.parquet"
    if total.dialogues:
        workspace.write_table(dialogues_table(total.dialogues, total.ids), DIALOGUES_DIR, file)
    if total.rejects:
        workspace.write_table(_notes(r.row() for r in total.rejects), REJECTS_DIR, file)
    repairs: Counter[str] = Counter()
    if total.repairs:
        workspace.write_table(_notes(_repair_rows(total)), REPAIRS_DIR, file)
        for repair in total.repairs:
            repairs[repair.what] += repair.number
    return Part(
        name=chunk.part,
        corpus=chunk.corpus,
        files=files,
        ids=bytes.fromhex("".join(total.ids)),
        source_ids=[dialogue.source_id for dialogue in total.dialogues],
        rejects=Counter(reject.reason for reject in total.rejects),
        repairs=repairs,
    )


def dialogues_table(dialogues: list[Dialogue], ids: list[str]) -> pa.Table:
    """Dialogues and their ids as a table of schema.DIALOGUES."""
    offsets = np.cumsum([0, *(len(dialogue.turns) for dialogue in dialogues)], dtype=np.int32)
    turns = pa.StructArray.from_arrays(
        [
            pa.array([turn.role for d in dialogues for turn in d.turns], pa.string()),
            pa.array([turn.content for d in dialogues for turn in d.turns], pa.string()),
        ],
        fields=list(TURN),
    )
    columns = [
        pa.array(ids, pa.string()),
        pa.array([dialogue.corpus for dialogue in dialogues], pa.string()),
        pa.array([dialogue.source_id for dialogue in dialogues], pa.string()),
        pa.array([dialogue.topic for dialogue in dialogues], pa.string()),
        pa.ListArray.from_arrays(pa.array(offsets), turns),
    ]
    return pa.table(columns, schema=DIALOGUES)


def _repair_rows(parsed: Parsed) -> Iterator[dict[str, Any]]:
    """Repairs as rows of REJECTS: the reason is what was done, the detail how many times."""
    for repair in parsed.repairs:
        yield {
            "stage": STAGE,
            "corpus": parsed.corpus,
            "source_id": repair.source_id,
            "dialogue_id": repair.dialogue_id,
            "reason": repair.what,
            "detail": str(repair.number),
            "raw": "",
        }


def _notes(rows: Iterable[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=REJECTS)


def drop_duplicates(parts: Sequence[Part], workspace: Workspace) -> Counter[str]:
    """Keep the first of the dialogues with one id; the others go to the rejects. Counts by corpus.

    parts: in output order. Only the files that hold a duplicate are written again.
    """
    ids = np.frombuffer(b"".join(part.ids for part in parts), dtype="S32")
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    kept = first[inverse]
    starts = np.cumsum([0, *(part.dialogues for part in parts)])

    def source(index: int) -> tuple[int, int]:
        number = int(np.searchsorted(starts, index, side="right")) - 1
        return number, index - int(starts[number])

    rows: list[dict[str, Any]] = []
    drop: dict[int, list[int]] = {}
    for index in np.flatnonzero(kept != np.arange(len(ids))).tolist():
        number, row = source(index)
        first_number, first_row = source(int(kept[index]))
        drop.setdefault(number, []).append(row)
        part = parts[number]
        rows.append(
            {
                "stage": STAGE,
                "corpus": part.corpus,
                "source_id": part.source_ids[row],
                "dialogue_id": part.ids[32 * row : 32 * row + 32].hex(),
                "reason": "duplicate",
                "detail": f"the same turns as {parts[first_number].source_ids[first_row]}",
                "raw": "",
            }
        )
    if rows:
        _drop_rows_everywhere([(parts[n], dropped) for n, dropped in drop.items()], workspace)
        workspace.write_table(_notes(rows), REJECTS_DIR, "duplicates.parquet")
    return Counter(row["corpus"] for row in rows)


def _drop_rows_everywhere(drop: list[tuple[Part, list[int]]], workspace: Workspace) -> None:
    import ray

    task = ray.remote(_drop_rows)
    ray.get([task.remote(part.name, part.dialogues, rows, workspace) for part, rows in drop])


def _drop_rows(name: str, before: int, rows: list[int], workspace: Workspace) -> None:
    """Write a part again without some rows, unless a try that was cut off has done so."""
    file = f"{name}.parquet"
    path = workspace.path(DIALOGUES_DIR, file)
    table = pq.read_table(path, filesystem=workspace.filesystem)
    if len(table) != before:
        return
    keep = np.setdiff1d(np.arange(before), rows)
    if len(keep):
        workspace.write_table(table.take(keep), DIALOGUES_DIR, file)
    else:
        workspace.filesystem.delete_file(path)
