"""Coding sheets, out and in: an Excel workbook or two CSV files for each coder.

A sheet comes back as a person left it, so reading one checks everything against the packet and
names every fault by sheet and row. A file with any fault is not imported at all.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milm_ray.errors import UserError
from milm_ray.miti.coding_scheme import (
    CODES,
    GLOBAL_NAMES,
    GLOBAL_RULE,
    GLOBALS,
    MAX_CODES_PER_VOLLEY,
)
from milm_ray.miti.packet import Item, Packet
from milm_ray.miti.sheet_checks import (
    GLOBAL_SHEET,
    UTTERANCES,
    check_globals,
    check_utterances,
    rows_by_column,
)
from milm_ray.miti.summary import Coding

GUIDE = "how to code"
_SHOWN = 50  # faults printed; the exception holds all of them
UTTERANCE_COLUMNS = ("item", "volley", "utterance", "speaker", "text", "code")
GLOBAL_COLUMNS = ("item", "target_behavior", *GLOBAL_NAMES, "comment")


class SheetError(UserError):
    """Every fault of a coder's sheet. `faults` lists them; nothing of the sheet was imported."""

    def __init__(self, coder: str, faults: Sequence[str]) -> None:
        self.coder, self.faults = coder, list(faults)
        listed = "\n".join(f"  - {fault}" for fault in faults[:_SHOWN])
        if len(faults) > _SHOWN:
            listed += f"\n  … and {len(faults) - _SHOWN} more"
        many = f"{len(faults)} faults" if len(faults) != 1 else "one fault"
        super().__init__(
            f"{coder} returned sheets with {many}; nothing was imported:\n{listed}",
            "correct this in the sheets and run the job again",
        )

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (self.coder, self.faults)


@dataclass(frozen=True)
class CodedItem:
    """One coder's work on one item; codes by (volley, utterance), both from 1."""

    item_id: str
    coder: str
    target_behavior: str
    codes: Mapping[tuple[int, int], str]
    global_scores: Mapping[str, int]
    comment: str = ""

    def coding(self, packet: Packet) -> Coding:
        """The counts and scores under the dialogue's own id and group, for the summary."""
        item = packet.item(self.item_id)
        dialogue_id, group = packet.key[self.item_id]
        counts = Counter(self.codes.values())
        scores: dict[str, float | None] = dict(self.global_scores)
        rounds = item.rounds if item else 0
        return Coding(dialogue_id, self.coder, group, counts, scores, rounds)


Coded = Mapping[str, CodedItem]


def _utterance_rows(items: Iterable[Item], coded: Coded) -> list[list[Any]]:
    short = {code.name: code.short for code in CODES}

    def code(item: Item, volley: int, number: int) -> str:
        work = coded.get(item.item_id)
        return short[work.codes[volley, number]] if work and (volley, number) in work.codes else ""

    return [
        [item.item_id, volley.number, number, volley.role, text, code(item, volley.number, number)]
        for item in items
        for volley in item.volleys
        for number, text in enumerate(volley.utterances, 1)
    ]


def write_csv(
    items: Sequence[Item], folder: Path, coder: str, work: Sequence[CodedItem] = ()
) -> tuple[Path, Path]:
    """Write <coder>-utterances.csv and <coder>-globals.csv; returns their paths.

    work: what the coder has coded so far, filled in; empty sheets without it.
    UTF-8 with a byte order mark, since Excel takes Chinese without one for another encoding. A
    text that a spreadsheet would run as a formula gets an apostrophe in front, as Excel's own.
    """
    coded = {item.item_id: item for item in work}
    tables = {
        UTTERANCES: (UTTERANCE_COLUMNS, _utterance_rows(items, coded)),
        GLOBAL_SHEET: (GLOBAL_COLUMNS, _global_rows(items, coded)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (columns, rows) in tables.items():
        path = folder / f"{coder}-{name}.csv"
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows([[_inert(cell) for cell in row] for row in rows])
        paths.append(path)
    return paths[0], paths[1]


def _global_rows(items: Iterable[Item], coded: Coded) -> list[list[Any]]:
    empty = CodedItem("", "", "", {}, {})
    return [
        [
            item.item_id,
            work.target_behavior,
            *(work.global_scores.get(name, "") for name in GLOBAL_NAMES),
            work.comment,
        ]
        for item in items
        for work in [coded.get(item.item_id, empty)]
    ]


def _inert(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@") else cell


def write_xlsx(items: Sequence[Item], path: Path) -> None:
    """Write one workbook: the utterances, the global scores, and how to code.

    Codes are picked from a list, client rows and the text are grey and not for writing.
    """
    from openpyxl import Workbook
    from openpyxl.styles import Alignment, Font, PatternFill
    from openpyxl.worksheet.datavalidation import DataValidation

    book = Workbook()
    grey = PatternFill("solid", fgColor="EEEEEE")
    sheets = (
        (UTTERANCES, UTTERANCE_COLUMNS, _utterance_rows(items, {}), (10, 8, 10, 11, 80, 10)),
        (GLOBAL_SHEET, GLOBAL_COLUMNS, _global_rows(items, {}), (10, 24, 14, 14, 14, 14, 40)),
    )
    book.remove(book.worksheets[0])
    for name, columns, rows, widths in sheets:
        sheet = book.create_sheet(name)
        sheet.append(columns)
        for row in rows:
            sheet.append([None if cell == "" else cell for cell in row])
        for cell in sheet[1]:
            cell.font = Font(bold=True)
        for column, width in zip("ABCDEFGH", widths, strict=False):
            sheet.column_dimensions[column].width = width
        sheet.freeze_panes = "A2"
    sheet = book[UTTERANCES]
    for cells in sheet.iter_rows(min_row=2):
        cells[4].data_type = "s"  # a text that begins with = is not a formula
        cells[4].alignment = Alignment(wrap_text=True, vertical="top")
        if cells[3].value == "client":
            for cell in cells:
                cell.fill = grey
    codes = DataValidation(
        "list", formula1=f'"{",".join(c.short for c in CODES)}"', allow_blank=True
    )
    scores = DataValidation(
        "whole", operator="between", formula1="1", formula2="5", allow_blank=True
    )
    sheet.add_data_validation(codes)
    codes.add(f"F2:F{max(2, sheet.max_row)}")
    book[GLOBAL_SHEET].add_data_validation(scores)
    scores.add(f"C2:F{max(2, book[GLOBAL_SHEET].max_row)}")
    guide = book.create_sheet(GUIDE)
    for line in guide_lines():
        guide.append(line)
    guide.column_dimensions["B"].width = 28
    guide.column_dimensions["C"].width = guide.column_dimensions["D"].width = 70
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)


def guide_lines() -> list[list[str]]:
    """The coding scheme as rows of a table, to stand beside a sheet."""
    return [
        ["Code", "Name", "What it is", "When in doubt"],
        *[[code.short, code.label, code.meaning, code.rule] for code in CODES],
        [],
        [
            "",
            "Volley",
            f"Each code once per volley, at most {MAX_CODES_PER_VOLLEY} codes; leave an "
            "utterance without a code empty.",
        ],
        ["", "Global scores", GLOBAL_RULE],
        *[
            [str(level), score.label, anchor, score.note if level == 1 else ""]
            for score in GLOBALS
            for level, anchor in enumerate(score.anchors, 1)
        ],
    ]


def read_xlsx(path: Path, packet: Packet, coder: str) -> list[CodedItem]:
    """A coder's workbook, checked against the packet. Raises SheetError naming every fault."""
    import zlib
    from zipfile import BadZipFile

    from openpyxl import load_workbook
    from openpyxl.utils.exceptions import InvalidFileException

    # What openpyxl lets through of damaged archives, and of damaged XML in them.
    archive = (BadZipFile, InvalidFileException, OSError, EOFError, RuntimeError, zlib.error)
    xml = (SyntaxError, LookupError, ValueError, TypeError, AttributeError)
    try:
        book = load_workbook(path, data_only=True)
    except (*archive, *xml) as error:
        raise SheetError(
            coder, [f"{path.name} is not a readable .xlsx workbook: {error}"]
        ) from error
    tables: dict[str, list[list[Any]]] = {}
    missing = [name for name in (UTTERANCES, GLOBAL_SHEET) if name not in book.sheetnames]
    if missing:
        raise SheetError(coder, [f"{path.name} has no sheet {name!r}" for name in missing])
    for name in (UTTERANCES, GLOBAL_SHEET):
        tables[name] = [list(row) for row in book[name].iter_rows(values_only=True)]
    return _import(tables[UTTERANCES], tables[GLOBAL_SHEET], packet, coder)


def read_csv(utterances: Path, globals_: Path, packet: Packet, coder: str) -> list[CodedItem]:
    """A coder's two CSV files, checked against the packet. Raises SheetError with every fault.

    Reads UTF-8 and what Excel saves in its place: UTF-16 with tabs, and GB 18030.
    """
    tables = []
    for path in (utterances, globals_):
        try:
            text = _decode(path.read_bytes())
            first = text.split("\n", 1)[0]
            delimiter = max(",;\t", key=first.count)
            tables.append(list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)))
        except (OSError, UnicodeDecodeError) as error:
            raise SheetError(coder, [f"{path.name} cannot be read: {error}"]) from error
        except csv.Error as error:
            why = f'{error} (look for a " that nothing closes)'
            raise SheetError(coder, [f"{path.name} cannot be read: {why}"]) from error
    return _import(tables[0], tables[1], packet, coder)


def _decode(data: bytes) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("gb18030")


def _import(
    utterances: list[list[Any]], globals_: list[list[Any]], packet: Packet, coder: str
) -> list[CodedItem]:
    faults: list[str] = []
    rows = rows_by_column(utterances, UTTERANCES, UTTERANCE_COLUMNS, faults)
    score_rows = rows_by_column(globals_, GLOBAL_SHEET, GLOBAL_COLUMNS, faults)
    if faults:
        raise SheetError(coder, faults)
    codes = check_utterances(rows, packet, faults)
    found = check_globals(score_rows, packet, codes, faults)
    if faults:
        raise SheetError(coder, faults)
    return [
        CodedItem(
            item.item_id,
            coder,
            found[item.item_id].target_behavior,
            codes[item.item_id],
            found[item.item_id].scores,
            found[item.item_id].comment,
        )
        for item in packet.items
    ]
