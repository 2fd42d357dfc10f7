"""What can be wrong in a coder's sheet, found cell by cell and named by sheet and row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from typing import Any

from milm_ray.miti.coding_scheme import CODES, GLOBAL_NAMES, code_name, volley_faults
from milm_ray.miti.packet import Packet

UTTERANCES, GLOBAL_SHEET = "utterances", "globals"
_A_FEW = 10
NO_CODES = "no codes"  # in an item's comment: the coder means that nothing is to be coded
Row = tuple[int, dict[str, Any]]  # the row's number in its sheet, its cells by column
Place = tuple[int, int]  # volley, utterance


@dataclass(frozen=True)
class ItemScores:
    """One row of the globals sheet."""

    target_behavior: str
    scores: dict[str, int]
    comment: str


def rows_by_column(
    table: Sequence[Sequence[Any]], sheet: str, columns: Sequence[str], faults: list[str]
) -> list[Row]:
    """The rows of a table under their column names; blank rows skipped, further columns too."""
    header = [str(cell or "").strip().lower() for cell in table[0]] if table else []
    missing = [column for column in columns if column not in header]
    if missing:
        faults.append(f"{sheet}, row 1: no column {', '.join(missing)}")
        return []
    at = {column: header.index(column) for column in columns}
    return [
        (number, {name: row[i] if i < len(row) else None for name, i in at.items()})
        for number, row in enumerate(table[1:], 2)
        if any(str(cell or "").strip() for cell in row)
    ]


def check_utterances(
    rows: Sequence[Row], packet: Packet, faults: list[str]
) -> dict[str, dict[Place, str]]:
    """Codes by item and place; adds to `faults` whatever does not fit the packet or the rules."""
    expected = {
        item.item_id: {
            (volley.number, number): (volley.role, text)
            for volley in item.volleys
            for number, text in enumerate(volley.utterances, 1)
        }
        for item in packet.items
    }
    codes: dict[str, dict[Place, str]] = {item_id: {} for item_id in expected}
    seen: dict[tuple[str, Place], int] = {}
    edited: list[tuple[int, str]] = []
    for number, cells in rows:
        where = f"{UTTERANCES}, row {number}"
        item_id = _text(cells["item"])
        if item_id not in expected:
            faults.append(f"{where}: item {item_id!r} is not in the packet")
            continue
        place = _place(cells, where, faults)
        if place is None:
            continue
        named = f"{item_id}, volley {place[0]}, utterance {place[1]}"
        if place not in expected[item_id]:
            faults.append(f"{where}: {named} is not in the packet")
            continue
        if (item_id, place) in seen:
            faults.append(f"{where}: {named} is there already, in row {seen[item_id, place]}")
            continue
        seen[item_id, place] = number
        role, text = expected[item_id][place]
        if _squeezed(cells["text"]) != _squeezed(text):
            edited.append((number, named))
        code = _code(cells["code"], where, faults)
        if code and role == "client":
            faults.append(f"{where}: {code} is given to a client's utterance")
        elif code:
            codes[item_id][place] = code
    for item_id, places in expected.items():
        absent = [place for place in places if (item_id, place) not in seen]
        if absent:
            first = f"the first being volley {absent[0][0]}, utterance {absent[0][1]}"
            many, are = (f"{len(absent)} rows", "are") if len(absent) > 1 else ("a row", "is")
            faults.append(f"{UTTERANCES}: {many} of {item_id} {are} missing, {first}")
    faults += _edits(edited, len(seen))
    _check_rules(codes, seen, faults)
    return codes


def _edits(edited: Sequence[tuple[int, str]], rows: int) -> list[str]:
    """Texts that are not the packet's; nobody edits most of a sheet, so then there is one cause."""
    if len(edited) > max(_A_FEW, rows // 2):
        return [
            f"{UTTERANCES}, rows {edited[0][0]} to {edited[-1][0]}: {len(edited)} of {rows} texts "
            "are not the packet's: the spreadsheet saved them in an encoding without Chinese "
            "(choose CSV UTF-8, or return the workbook), or the sheet is of another packet"
        ]
    return [
        f"{UTTERANCES}, row {number}: the text of {named} was edited; restore it from the packet"
        for number, named in edited
    ]


def _check_rules(
    codes: Mapping[str, Mapping[Place, str]],
    seen: Mapping[tuple[str, Place], int],
    faults: list[str],
) -> None:
    for item_id, coded in codes.items():
        by_volley: dict[int, list[Place]] = {}
        for place in sorted(coded):
            by_volley.setdefault(place[0], []).append(place)
        for volley, places in by_volley.items():
            rows = ", ".join(str(seen[item_id, place]) for place in places)
            for fault in volley_faults(coded[place] for place in places):
                faults.append(f"{UTTERANCES}, rows {rows}: volley {volley} of {item_id}: {fault}")


def check_globals(
    rows: Sequence[Row],
    packet: Packet,
    codes: Mapping[str, Mapping[Place, str]],
    faults: list[str],
) -> dict[str, ItemScores]:
    """Scores by item; adds to `faults` what is missing, impossible or unfinished."""
    found: dict[str, ItemScores] = {}
    seen: dict[str, int] = {}
    for number, cells in rows:
        where = f"{GLOBAL_SHEET}, row {number}"
        item_id = _text(cells["item"])
        if item_id not in codes:
            faults.append(f"{where}: item {item_id!r} is not in the packet")
            continue
        if item_id in seen:
            faults.append(f"{where}: {item_id} is there already, in row {seen[item_id]}")
            continue
        seen[item_id] = number
        target, comment = _text(cells["target_behavior"]), _text(cells["comment"])
        if not target:
            faults.append(f"{where}: target_behavior is empty; name the behaviour to change")
        scores: dict[str, int] = {}
        for name in GLOBAL_NAMES:
            value, why = _whole(cells[name])
            if value is None or not 1 <= value <= 5:
                faults.append(f"{where}: {name} is {why}; write a whole number from 1 to 5")
            else:
                scores[name] = value
        if not codes[item_id] and NO_CODES not in comment.lower():
            faults.append(
                f"{where}: no utterance of {item_id} is coded; finish it, or write "
                f"{NO_CODES!r} in its comment"
            )
        found[item_id] = ItemScores(target, scores, comment)
    absent = [item.item_id for item in packet.items if item.item_id not in seen]
    if absent:
        faults.append(f"{GLOBAL_SHEET}: no row for {', '.join(absent)}")
    return found


def _text(cell: Any) -> str:
    return "" if cell is None else str(cell).strip()


def _squeezed(cell: Any) -> str:
    """A text without blanks and without the apostrophe that keeps it from being a formula."""
    return "".join(_text(cell).removeprefix("'").split())


def _place(cells: Mapping[str, Any], where: str, faults: list[str]) -> Place | None:
    numbers = []
    for column in ("volley", "utterance"):
        value, why = _whole(cells[column])
        if value is None:
            faults.append(f"{where}: {column} is {why}; restore the number from the packet")
            return None
        numbers.append(value)
    return numbers[0], numbers[1]


def _whole(cell: Any) -> tuple[int | None, str]:
    """A whole number however the spreadsheet keeps it, and how to name the cell in a fault."""
    if isinstance(cell, datetime | date | time):
        return None, f"a date ({cell}); the spreadsheet changed it"
    text = _text(cell)
    if not text:
        return None, "empty"
    if re.fullmatch(r"\d+(\.0+)?", text):
        return int(float(text)), text
    return None, repr(text)


def _code(cell: Any, where: str, faults: list[str]) -> str | None:
    if isinstance(cell, datetime | date | time):
        faults.append(f"{where}: code is a date ({cell}); the spreadsheet changed it")
        return None
    text = _text(cell)
    if not text:
        return None
    code = code_name(text)
    if code:
        return code
    parts = [part for part in re.split(r"[\s,;/+&，；、]+", text) if part]
    if len(parts) > 1 and all(code_name(part) for part in parts):
        faults.append(f"{where}: two codes on one utterance ({text}); keep one")
    else:
        known = ", ".join(code.short for code in CODES)
        faults.append(f"{where}: unknown code {text!r}; codes are {known}")
    return None
