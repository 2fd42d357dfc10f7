"""Seeded samples of the workspace's dialogues that do not depend on the order of the files.

Every dialogue has a rank, a hash of the seed, the purpose and its id; a sample is the first n by
rank. So a larger sample contains the smaller one, and a corpus that grows changes few of the
choices: replies already paid for stay in use.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce

import pyarrow as pa
import pyarrow.dataset as pads

from milm_ray.dataset.table_rows import Row, TableRows
from milm_ray.workspace import Workspace


def rank(seed: int, purpose: str, identifier: str) -> str:
    """The place of an item in a seeded order; independent of all other items."""
    return hashlib.sha256(f"{seed}:{purpose}:{identifier}".encode()).hexdigest()


def corpora_in(workspace: Workspace) -> list[str]:
    """The names of the corpora among the dialogues."""
    table = workspace.read_table("dialogues", columns=["corpus"])
    return sorted(table.column("corpus").unique().to_pylist())


@dataclass
class Sample:
    """Dialogues per corpus (rows of schema.DIALOGUES) in the order of their rank.

    left_out: per corpus, how many dialogues were not in the pool, by reason.
    """

    by_corpus: dict[str, TableRows] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def rows(self) -> TableRows:
        return reduce(TableRows.then, self.by_corpus.values(), TableRows())


def sample(
    workspace: Workspace,
    sizes: Mapping[str, int | None],
    seed: int,
    purpose: str,
    leave_out: Callable[[Row], str] | None = None,
) -> Sample:
    """A seeded sample of the dialogues.

    sizes: how many per corpus, None for all; purpose: separates the samples of different stages;
    leave_out: why a dialogue may not be in the pool, "" when it may.
    """
    workspace.manifest("dialogues")
    dialogues = pads.dataset(
        workspace.parquet_files("dialogues"), filesystem=workspace.filesystem, format="parquet"
    )
    result = Sample()
    for corpus, size in sizes.items():
        of_corpus = pads.field("corpus") == corpus
        ids = dialogues.to_table(columns=["dialogue_id"], filter=of_corpus)["dialogue_id"]
        order = sorted(ids.to_pylist(), key=lambda identifier: rank(seed, purpose, identifier))
        rows = _rows(dialogues, of_corpus, order if leave_out else order[:size])
        if leave_out is not None:
            reasons = [leave_out(row) for row in rows]
            rows = rows.take([place for place, why in enumerate(reasons) if not why][:size])
            result.left_out[corpus] = dict(Counter(reason for reason in reasons if reason))
        result.by_corpus[corpus] = rows
    return result


def _rows(dialogues: pads.Dataset, condition: pads.Expression, order: list[str]) -> TableRows:
    wanted = condition & pads.field("dialogue_id").isin(pa.array(order, pa.string()))
    table = dialogues.to_table(filter=wanted)
    places = {identifier: at for at, identifier in enumerate(table["dialogue_id"].to_pylist())}
    return TableRows(table).take([places[identifier] for identifier in order])
