"""Rows of a table that become dictionaries when they are asked for.

A dialogue as a dictionary of dictionaries takes five times the memory of the same in columns, so a
driver that holds a corpus holds columns. An order or a choice of rows is a list of places; the
columns stay as they are (Arrow cannot take from more than 2 GiB of text at a time).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, overload

import numpy as np
import pyarrow as pa

Row = dict[str, Any]
_AT_ONCE = 256


class TableRows(Sequence[Row]):
    """Rows of tables, in the order of the tables or in one of their own."""

    def __init__(self, *tables: pa.Table) -> None:
        self._batches: list[pa.RecordBatch] = [
            batch for table in tables for batch in table.to_batches(max_chunksize=_AT_ONCE)
        ]
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)
        self._places = np.arange(self._ends[-1] if self._batches else 0)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Row: ...

    @overload
    def __getitem__(self, place: slice) -> TableRows: ...

    def __getitem__(self, place: int | slice) -> Row | TableRows:
        if isinstance(place, slice):
            return self.take(range(*place.indices(len(self))))
        at = self._places[place]
        number = int(np.searchsorted(self._ends, at, side="right"))
        batch = self._batches[number]
        row: Row = batch.slice(at - self._ends[number] + batch.num_rows, 1).to_pylist()[0]
        return row

    def __iter__(self) -> Iterator[Row]:
        """Row after row; what lies side by side becomes dictionaries together."""
        for start in range(0, len(self), _AT_ONCE):
            places = self._places[start : start + _AT_ONCE]
            numbers = np.searchsorted(self._ends, places, side="right")
            apart = (np.diff(places) != 1) | (np.diff(numbers) != 0)
            for first, end in pairwise([0, *np.flatnonzero(apart) + 1, len(places)]):
                batch = self._batches[numbers[first]]
                at = places[first] - self._ends[numbers[first]] + batch.num_rows
                yield from batch.slice(at, end - first).to_pylist()

    def take(self, places: Sequence[int]) -> TableRows:
        """The rows at these places, in their order."""
        chosen = TableRows()
        chosen._batches, chosen._ends = self._batches, self._ends
        chosen._places = self._places[np.asarray(places, np.int64)]
        return chosen

    def then(self, others: TableRows) -> TableRows:
        """These rows and, after them, the others."""
        both = TableRows()
        both._batches = [*self._batches, *others._batches]
        shift = self._ends[-1] if self._batches else 0
        both._ends = np.concatenate([self._ends, others._ends + shift])
        both._places = np.concatenate([self._places, others._places + shift])
        return both


def in_columns(rows: Iterable[Row], schema: pa.Schema) -> pa.Table:
    """A table of rows that are dictionaries for a moment only."""
    tables, waiting = [], list[Row]()
    for row in rows:
        waiting.append(row)
        if len(waiting) == _AT_ONCE:
            tables.append(pa.Table.from_pylist(waiting, schema=schema))
            waiting = []
    return pa.concat_tables([*tables, pa.Table.from_pylist(waiting, schema=schema)])
