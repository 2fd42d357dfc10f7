"""Parts: what one task makes of one chunk.

A part is one Parquet file of each artifact that has rows, all under the part's name. Only its ids
and counts travel back to the driver.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from milm_ray.corpora.files import Chunk, contents
from milm_ray.corpora.near import Signatures, signatures
from milm_ray.corpora.readers import READERS
from milm_ray.corpora.reading import STAGE, Parsed, Unusable
from milm_ray.schema import DIALOGUES, REJECTS, TURN, Dialogue
from milm_ray.workspace import Workspace

DIALOGUES_DIR, REJECTS_DIR, REPAIRS_DIR = "dialogues", "rejects/ingest", "repairs/ingest"


@dataclass(frozen=True)
class Part:
    """A part as the driver sees it, one entry a dialogue in the order of the rows.

    ids: 32 bytes each; signatures: [dialogues, near.BINS], no rows when they are not wanted.
    """

    name: str
    corpus: str
    files: int
    ids: bytes
    source_ids: pa.StringArray
    signatures: Signatures
    rejects: Counter[str]
    repairs: Counter[str]

    @property
    def dialogues(self) -> int:
        return len(self.source_ids)


def read_chunk(chunk: Chunk, workspace: Workspace, sign: bool) -> Part:
    """Read one chunk and write its part of the three artifacts. sign: compute the signatures."""
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
        workspace.write_table(notes(r.row() for r in total.rejects), REJECTS_DIR, file)
    repairs: Counter[str] = Counter()
    if total.repairs:
        workspace.write_table(notes(_repair_rows(total)), REPAIRS_DIR, file)
        for repair in total.repairs:
            repairs[repair.what] += repair.number
    return Part(
        name=chunk.part,
        corpus=chunk.corpus,
        files=files,
        ids=bytes.fromhex("".join(total.ids)),
        source_ids=pa.array([dialogue.source_id for dialogue in total.dialogues], pa.string()),
        signatures=signatures([_text(d) for d in total.dialogues] if sign else []),
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


def _text(dialogue: Dialogue) -> str:
    return "\n".join(turn.content for turn in dialogue.turns)


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


def notes(rows: Iterable[dict[str, Any]]) -> pa.Table:
    """Rows of REJECTS as a table."""
    return pa.Table.from_pylist(list(rows), schema=REJECTS)


def drop_rows(name: str, before: int, rows: list[int], workspace: Workspace) -> None:
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
