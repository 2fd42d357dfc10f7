"""The pieces a report page is made of: tables (also written as CSV), images, transcripts, sources.

They hold values, not markup; `page.html.j2` draws them.
"""

from __future__ import annotations

import base64
import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from milm_ray.workspace import MANIFEST, Workspace

INTERVAL = ("low", "high")


@dataclass(frozen=True)
class Estimate:
    """A number with its interval or quartiles, and the n it rests on; None where there is none."""

    mean: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Column:
    """A column: `digits` decimals for floats; numbers stand right-aligned in equal-width digits.

    parts: its cells are Estimates, and these are the names of what stands beside the number
    (INTERVAL, or q1, q3 and n); wrap: its text is long and wants room; least: a number below it is
    shown as being below it.
    """

    label: str
    digits: int | None = None
    numeric: bool = False
    parts: tuple[str, ...] = ()
    wrap: bool = False
    least: float | None = None


@dataclass(frozen=True)
class Table:
    """A captioned table. A None cell is a value that does not exist; `foot` explains the rest.

    name: the file name of its CSV copy under report/; grouped: rows that follow each other with
    the same first cell are drawn under one heading.
    """

    kind: ClassVar[str] = "table"
    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    foot: Sequence[str] = ()
    grouped: bool = False

    @property
    def groups(self) -> list[list[Sequence[Any]]]:
        """The rows by their first cell when grouped, each on its own otherwise."""
        if not self.grouped:
            return [[row] for row in self.rows]
        return [list(rows) for _, rows in itertools.groupby(self.rows, key=lambda row: row[0])]

    def csv(self) -> str:
        """The table as CSV text, numbers in full precision, None as an empty cell.

        A column with parts becomes several: the number, and one for each part.
        """
        head = [
            name
            for column in self.columns
            for name in (column.label, *(f"{column.label} {part}" for part in column.parts))
        ]
        sink = io.StringIO()
        writer = csv.writer(sink, lineterminator="\n")
        writer.writerow(head)
        for row in self.rows:
            cells: list[Any] = []
            for column, cell in zip(self.columns, row, strict=True):
                whole = [cell]
                if isinstance(cell, Estimate):
                    whole = [cell.mean, cell.low, cell.high, cell.n][: 1 + len(column.parts)]
                cells += [*whole, *[None] * (1 + len(column.parts) - len(whole))]
            writer.writerow(["" if cell is None else cell for cell in cells])
        return sink.getvalue()

    @property
    def csv_url(self) -> str:
        """The CSV inside the page, so that a page sent on its own still gives its numbers."""
        return (
            "data:text/csv;charset=utf-8;base64," + base64.b64encode(self.csv().encode()).decode()
        )


@dataclass(frozen=True)
class Image:
    """A figure of the workspace, carried inside the page."""

    kind: ClassVar[str] = "image"
    caption: str
    path: str
    png: bytes = field(repr=False)

    @property
    def data_url(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Facts:
    """Labelled values, as a definition list. A value may be a string, a number or None.

    wide: one below the other, for values that are long.
    """

    kind: ClassVar[str] = "facts"
    items: Sequence[tuple[str, Any]]
    wide: bool = False


@dataclass(frozen=True)
class Speech:
    """Turns of one dialogue under a heading. turns: (role, text)."""

    title: str
    turns: Sequence[tuple[str, str]]
    left_out: int = 0


@dataclass(frozen=True)
class Pair:
    """Two dialogues side by side: the source and what the teacher made of it."""

    kind: ClassVar[str] = "pair"
    caption: str
    left: Speech
    right: Speech


@dataclass(frozen=True)
class Reply:
    """What one variant of a model said; `score` is a short line of its metrics."""

    side: str
    text: str
    score: str = ""


@dataclass(frozen=True)
class Example:
    """A test round: what the client said, the reference, and each model's replies by its name."""

    kind: ClassVar[str] = "example"
    title: str
    client: str
    reference: str
    replies: Sequence[tuple[str, Sequence[Reply]]]


@dataclass(frozen=True)
class Remark:
    """A short paragraph; `finding` in front of it is set apart when there is one."""

    kind: ClassVar[str] = "remark"
    text: str
    finding: str = ""


@dataclass(frozen=True)
class Source:
    """Where a section's numbers come from: one manifest."""

    path: str
    digest: str
    finished_at: str

    @classmethod
    def of(cls, artifact: str, manifest: Mapping[str, Any]) -> Source:
        return cls(f"{artifact}/{MANIFEST}", manifest["digest"], manifest["finished_at"])


@dataclass(frozen=True)
class Section:
    """A part of the page. `absent` says what is missing when the workspace does not hold it."""

    id: str
    title: str
    lead: str = ""
    blocks: Sequence[Any] = ()
    sources: Sequence[Source] = ()
    absent: str = ""


def absent(id: str, title: str, artifact: str, job: str) -> Section:
    """A section whose artifact no job has made yet."""
    return Section(
        id, title, absent=f"{artifact} is not in this workspace. jobs/{job}.py makes it."
    )


def images(ws: Workspace, artifact: str, captions: Mapping[str, str]) -> list[Image]:
    """The PNG figures directly in an artifact, in the order of `captions`, the rest by name.

    captions: file stem → caption; a figure without one is captioned by its name.
    """
    import pyarrow.fs as pafs

    selector = pafs.FileSelector(ws.path(artifact), allow_not_found=True)
    found = sorted(
        info.base_name
        for info in ws.filesystem.get_file_info(selector)
        if info.base_name.endswith(".png")
    )
    order = list(captions)
    found.sort(key=lambda name: order.index(name[:-4]) if name[:-4] in order else len(order))
    pictures = []
    for name in found:
        with ws.filesystem.open_input_stream(ws.path(artifact, name)) as stream:
            png = stream.read()
        pictures.append(Image(captions.get(name[:-4], name[:-4]), f"{artifact}/{name}", png))
    return pictures
