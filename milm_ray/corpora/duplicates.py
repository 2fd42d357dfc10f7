"""Duplicates across parts: found on the driver from ids and signatures, removed by the workers.

Exact duplicates have one dialogue id and are always removed, the first one staying. Near ones, of
whatever corpus, are listed or removed as the config says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from milm_ray.config import IngestSection
from milm_ray.corpora.near import near_pairs, repeats
from milm_ray.corpora.parts import REJECTS_DIR, REPAIRS_DIR, Part, drop_rows
from milm_ray.corpora.reading import STAGE
from milm_ray.schema import REJECTS
from milm_ray.workspace import Workspace

Rows = NDArray[np.int64]
Found = dict[str, Counter[str]]


class _Rows:
    """All dialogues of all parts by one running number, in output order."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.ids = b"".join(part.ids for part in parts)
        self.names = pa.chunked_array([part.source_ids for part in parts], pa.string())
        self.starts = np.cumsum([0, *(part.dialogues for part in parts)])
        self.corpora = np.array([part.corpus for part in parts])
        self.signatures = np.concatenate([part.signatures for part in parts])

    def part_of(self, rows: Rows) -> Rows:
        return np.searchsorted(self.starts, rows, side="right") - 1

    def corpus_of(self, rows: Rows) -> list[str]:
        return self.corpora[self.part_of(rows)].tolist()

    def listing(self, reason: str, rows: Rows, details: Sequence[str]) -> pa.Table:
        """Rows as a table of REJECTS."""
        columns = {
            "stage": [STAGE] * len(rows),
            "corpus": self.corpus_of(rows),
            "source_id": self.names.take(pa.array(rows)),
            "dialogue_id": [self.ids[32 * row : 32 * row + 32].hex() for row in rows.tolist()],
            "reason": [reason] * len(rows),
            "detail": details,
            "raw": [""] * len(rows),
        }
        return pa.table(columns, schema=REJECTS)


def find_duplicates(
    parts: Sequence[Part], settings: IngestSection, workspace: Workspace
) -> tuple[Found, Found]:
    """List the duplicates, remove those that have to go; only files that hold one are rewritten.

    parts: in output order, with signatures unless settings.near_duplicates is "off".
    Returns what was rejected and what was only listed: corpus → reason → number.
    """
    if not parts:
        return {}, {}
    rows = _Rows(parts)
    dropped, kept = _exact(rows)
    rejected: Found = {}
    listed: Found = {}
    if len(dropped):
        names = rows.names.take(pa.array(kept)).to_pylist()
        table = rows.listing("duplicate", dropped, [f"the same turns as {name}" for name in names])
        workspace.write_table(table, REJECTS_DIR, "duplicates.parquet")
        _count(rejected, table)
    if settings.near_duplicates != "off":
        near, details = _near(rows, dropped, settings.near_duplicate_similarity)
        if len(near) and settings.near_duplicates == "drop":
            table = rows.listing("near_duplicate", near, details)
            workspace.write_table(table, REJECTS_DIR, "near_duplicates.parquet")
            _count(rejected, table)
            dropped = np.union1d(dropped, near)
        elif len(near):
            table = rows.listing("near_duplicate_kept", near, details)
            workspace.write_table(table, REPAIRS_DIR, "near_duplicates.parquet")
            _count(listed, table)
    _remove(parts, rows, dropped, workspace)
    return rejected, listed


def _exact(rows: _Rows) -> tuple[Rows, Rows]:
    """Rows whose id an earlier row has, and that earlier row of each."""
    ids = np.frombuffer(rows.ids, dtype="S32")
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    kept = first[inverse]
    repeated = np.flatnonzero(kept != np.arange(len(ids)))
    return repeated, kept[repeated]


def _near(rows: _Rows, dropped: Rows, threshold: float) -> tuple[Rows, list[str]]:
    """Rows that nearly repeat an earlier one, with a sentence each; exact ones are left out."""
    staying = np.setdiff1d(np.arange(len(rows.signatures)), dropped)
    found = repeats(*near_pairs(rows.signatures[staying], threshold))
    later = staying[sorted(found)]
    earlier = staying[[found[row][0] for row in sorted(found)]]
    names = rows.names.take(pa.array(earlier)).to_pylist()
    details = [
        f"similarity {found[row][1]:.2f} to {corpus} {name}"
        for row, corpus, name in zip(sorted(found), rows.corpus_of(earlier), names, strict=True)
    ]
    return later, details


def _count(found: Found, table: pa.Table) -> None:
    pairs = zip(table["corpus"].to_pylist(), table["reason"].to_pylist(), strict=True)
    for (corpus, reason), number in Counter(pairs).items():
        found.setdefault(corpus, Counter())[reason] += number


def _remove(parts: Sequence[Part], rows: _Rows, dropped: Rows, workspace: Workspace) -> None:
    import ray

    task = ray.remote(drop_rows)
    numbers = rows.part_of(dropped)
    ray.get(
        [
            task.remote(
                parts[number].name,
                parts[number].dialogues,
                (dropped[numbers == number] - rows.starts[number]).tolist(),
                workspace,
            )
            for number in np.unique(numbers).tolist()
        ]
    )
