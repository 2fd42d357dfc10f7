"""A table of the study as plain data: what a page draws and a CSV holds."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LAYOUT = 5  # of study.json; a study of another layout is made again by jobs/miti.py
INTERVAL = ("low", "high")
SPREAD = ("q1", "q3", "n")


@dataclass(frozen=True)
class StudyColumn:
    """A column; digits None for text.

    parts: what stands beside a cell's number, INTERVAL or the quartiles and n of SPREAD. Such a
    cell is None or a list of the number and one entry for each part.
    """

    label: str
    digits: int | None = None
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class StudyTable:
    """A table of the study; foot explains. automatic: its codes are an automatic coder's."""

    name: str
    caption: str
    columns: Sequence[StudyColumn]
    rows: Sequence[Sequence[Any]]
    foot: Sequence[str] = ()
    automatic: bool = False

    def csv(self) -> str:
        """The table as CSV text, numbers in full; a column with parts becomes several."""
        head = [
            name
            for column in self.columns
            for name in (column.label, *(f"{column.label} {part}" for part in column.parts))
        ]
        rows = []
        for row in self.rows:
            cells: list[Any] = []
            for column, cell in zip(self.columns, row, strict=True):
                several = cell if column.parts and cell is not None else [cell]
                cells += [*several, *[None] * (1 + len(column.parts) - len(several))]
            rows.append(cells)
        return csv_text(head, rows)


def csv_text(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows under a head as CSV; None is an empty cell."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([["" if cell is None else cell for cell in row] for row in rows])
    return sink.getvalue()
