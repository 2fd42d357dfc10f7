"""The code stage: every coder's work on the packet → `codings/`, one row per coder and dialogue.

People's codes come from the sheets that they return and from the coding page; automatic ones from
the trained coders and from a language model. A row says which it is, and the study keeps them
apart. A sheet with any fault stops the stage before anything is written.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from milm_ray.config import Config
from milm_ray.job import Plan, Stage, log
from milm_ray.llm.ask import Asking, make_or_ask_again, unasked
from milm_ray.llm.reply_store import answered_by
from milm_ray.miti import annomi, chinese_coder, study_packet, trained_coder
from milm_ray.miti.coding_scheme import CODE_NAMES
from milm_ray.miti.coding_store import ADJUDICATED, CodingStore
from milm_ray.miti.llm_coder import PROMPT, Coder
from milm_ray.miti.packet import Packet
from milm_ray.miti.sheet import CodedItem, SheetError, read_csv, read_xlsx
from milm_ray.miti.study_packet import SHEETS
from milm_ray.miti.summary import Coding
from milm_ray.prompts import load
from milm_ray.schema import CODINGS
from milm_ray.workspace import MANIFEST, Workspace, digest

ARTIFACT = "codings"
MAPPED = "AnnoMI labels"


def _sheet_folder(config: Config, workspace: Workspace) -> Path | None:
    if config.miti.sheets:
        return Path(config.miti.sheets)
    return workspace.local(SHEETS) if workspace.exists(SHEETS) else None


def _sheet_files(config: Config, workspace: Workspace) -> list[Path]:
    folder = _sheet_folder(config, workspace)
    if folder is None:
        return []
    # Not what an open workbook and the system leave beside the sheets.
    return sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(("~$", ".")))


def _fingerprint(config: Config, workspace: Workspace) -> dict[str, Any]:
    miti = config.miti
    settings: dict[str, Any] = {"coders": miti.coders, "automatic": miti.automatic}
    settings["annomi"] = study_packet.file_digest(miti.annomi)
    if "trained" in miti.automatic:
        settings["trained"] = [digest(chinese_coder.examples()), "expected counts", "ten folds"]
    if "llm" in miti.automatic:
        settings["llm"] = [answered_by(config.coder), load(PROMPT).version]
    inputs: dict[str, Any] = workspace.input_digests(study_packet.ARTIFACT, study_packet.KEY)
    for path in _sheet_files(config, workspace):
        inputs[f"{SHEETS}/{path.name}"] = study_packet.file_digest(path)
    inputs["coding page"] = CodingStore.digest_of(workspace)
    return workspace.fingerprint(settings, inputs)


def plan(config: Config, workspace: Workspace) -> Plan:
    """Rows: dialogues; LLM calls: the automatic coder's whose replies the store does not hold."""
    names = ", ".join(config.miti.automatic) or "none"
    note = f"automatic coders: {names}; people's: sheets in {SHEETS}/ and the coding page"
    if not workspace.exists(study_packet.ARTIFACT, MANIFEST):
        return Plan(notes=(note,))
    if workspace.is_done(ARTIFACT, _fingerprint(config, workspace)) and not _unasked(workspace):
        return Plan(done=True)
    packet = study_packet.load_packet(workspace)
    if "llm" not in config.miti.automatic:
        return Plan(rows=len(packet.items), notes=(note,))
    asking, rows = _asking(config, workspace, packet)
    return asking.plan(rows, note)


def _asking(
    config: Config, workspace: Workspace, packet: Packet
) -> tuple[Asking, list[dict[str, Any]]]:
    task = Coder({item.item_id: item for item in packet.items}, _llm_name(config))
    rows = [{"item": item.item_id} for item in packet.items]
    return Asking(config, config.coder, workspace, task, "code"), rows


def _llm_name(config: Config) -> str:
    return f"llm {config.coder.model}"


def _unasked(workspace: Workspace) -> bool:
    return unasked(workspace.manifest(ARTIFACT)["counts"]["uncoded_by_reason"])


def run(config: Config, workspace: Workspace) -> Mapping[str, Any]:
    """Collect every coding there is; returns the manifest of `codings/`."""
    fingerprint = _fingerprint(config, workspace)
    make = partial(_collect, config, workspace, fingerprint)
    make_or_ask_again(workspace, ARTIFACT, fingerprint, _unasked, make)
    return workspace.manifest(ARTIFACT)


def _collect(config: Config, workspace: Workspace, fingerprint: Mapping[str, Any]) -> None:
    started = time.time()
    packet = study_packet.load_packet(workspace)
    languages = {i: entry["language"] for i, entry in study_packet.load_key(workspace).items()}
    people = import_people(config, workspace, packet)
    rows = [_row(packet, coded, _source(coded.coder)) for coded in people]
    done = {coded.coder: sum(c.coder == coded.coder for c in people) for coded in people}
    missing = {
        coder: len(packet.items) - done.get(coder, 0)
        for coder in config.miti.coders
        if done.get(coder, 0) < len(packet.items)
    }
    for coder, number in missing.items():
        log.info("code | %s has %d of %d dialogues still to code", coder, number, len(packet.items))
    facts: dict[str, Any] = {"still_to_code": missing}
    if "trained" in config.miti.automatic:
        rows += _trained(packet, languages)
        facts["trained"] = chinese_coder.VALIDATED
    rows += _from_annomi(config, packet)
    if "llm" in config.miti.automatic:
        asking, wanted = _asking(config, workspace, packet)
        for answer in asking.run(wanted):
            key = answer.reply.key if answer.reply else ""
            coded = answer.value or CodedItem(answer.row["item"], _llm_name(config), "", {}, {})
            why = answer.why if answer.reason else ""
            rows.append(_row(packet, coded, "automatic", why=why, reply_key=key))
        facts |= {"usage": asking.usage.facts(), "llm": answered_by(config.coder)}
    workspace.clear(ARTIFACT)
    workspace.write_table(pa.Table.from_pylist(rows, CODINGS), ARTIFACT)
    uncoded = [row["reason"].partition(":")[0] for row in rows if row["status"] == "uncoded"]
    by_coder = Counter(f"{row['coder']} ({row['source']})" for row in rows)
    workspace.commit(
        ARTIFACT,
        stage="code",
        settings=config.miti,
        fingerprint=fingerprint,
        counts={
            "codings": len(rows) - len(uncoded),
            "uncoded": len(uncoded),
            "uncoded_by_reason": dict(Counter(uncoded)),
            "by_coder": dict(by_coder),
        },
        started=started,
        **facts,
    )


def _source(coder: str) -> str:
    return "adjudicated" if coder == ADJUDICATED else "human"


def import_people(config: Config, workspace: Workspace, packet: Packet) -> list[CodedItem]:
    """What people coded, in sheets and on the page. Raises UserError with every fault of all."""
    found: dict[str, list[CodedItem]] = {}
    faults: list[str] = []
    files = _sheet_files(config, workspace)
    names = {*config.miti.coders, ADJUDICATED}
    sheets: dict[str, list[Path]] = {}
    for path in files:
        coder = path.stem.removesuffix("-utterances").removesuffix("-globals")
        if path.suffix.lower() not in (".xlsx", ".csv"):
            faults.append(f"{path.name}: neither .xlsx nor .csv; save it as one of the two")
        elif coder not in names:
            faults.append(
                f"{path.name}: {coder!r} is not among miti.coders ({_listed(names)}); name a sheet "
                "after its coder"
            )
        else:
            sheets.setdefault(coder, []).append(path)
    for coder, paths in sheets.items():
        try:
            found[coder] = _read_sheet(paths, packet, coder)
        except SheetError as error:
            faults += [f"{coder}: {fault}" for fault in error.faults]
    on_page = CodingStore.finished_items(workspace, packet.items)
    for coder in sorted({coded.coder for coded in on_page}):
        if coder in sheets:
            faults.append(f"{coder} has both a sheet and finished items on the coding page")
        found[coder] = [coded for coded in on_page if coded.coder == coder]
    if faults:
        raise SheetError("coders", faults)
    return [coded for coder in sorted(found) for coded in found[coder]]


def _read_sheet(paths: Sequence[Path], packet: Packet, coder: str) -> list[CodedItem]:
    """One coder's sheet: a workbook, or the two CSV files."""
    books = [path for path in paths if path.suffix.lower() == ".xlsx"]
    tables = {path.stem.rsplit("-", 1)[-1]: path for path in paths if path not in books}
    if len(books) == 1 and not tables:
        return read_xlsx(books[0], packet, coder)
    if not books and set(tables) == {"utterances", "globals"}:
        return read_csv(tables["utterances"], tables["globals"], packet, coder)
    names = ", ".join(path.name for path in paths)
    raise SheetError(
        coder, [f"{names}: give {coder}.xlsx, or {coder}-utterances.csv with {coder}-globals.csv"]
    )


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _trained(packet: Packet, languages: Mapping[str, str]) -> list[dict[str, Any]]:
    """Chinese dialogues by the Chinese coder; it has no business with others."""
    return [
        _row(
            packet,
            CodedItem(item.item_id, chinese_coder.NAME, "", chinese_coder.code_item(item), {}),
            "automatic",
            scope=chinese_coder.SCOPE,
            counts=chinese_coder.expected(item),
        )
        for item in packet.items
        if languages[item.item_id] == "zh"
    ]


def _from_annomi(config: Config, packet: Packet) -> list[dict[str, Any]]:
    """AnnoMI's own labels as MITI counts, and the English trained coder's counts."""
    chosen = {study_packet.real_id(session) for session in study_packet.real_sessions(config)}
    if not chosen or not config.miti.annomi:
        return []
    items = {dialogue_id: item_id for item_id, (dialogue_id, _) in packet.key.items()}
    sessions = annomi.read(Path(config.miti.annomi))
    by_id = {study_packet.real_id(session): session for session in sessions}
    found = [
        _count_row(
            items[name],
            Coding(
                name,
                MAPPED,
                study_packet.REAL,
                by_id[name].counts(),
                rounds=by_id[name].rounds(),
                scope=annomi.MAPPED,
            ),
            "mapped",
        )
        for name in sorted(chosen)
    ]
    if "trained" in config.miti.automatic:
        wanted = {by_id[name].transcript_id for name in chosen}
        for coding in trained_coder.code_unseen(sessions, wanted):
            item_id = items[f"annomi-{coding.dialogue_id}"]
            found.append(_count_row(item_id, coding, "automatic"))
    return found


def _count_row(item_id: str, coding: Coding, source: str) -> dict[str, Any]:
    """A row of CODINGS for a source that has counts of a real dialogue and no codes in place."""
    return {
        "item_id": item_id,
        "dialogue_id": f"annomi-{coding.dialogue_id.removeprefix('annomi-')}",
        "group": study_packet.REAL,
        "coder": coding.coder,
        "source": source,
        "status": "coded",
        "reason": "",
        "scope": list(coding.scope),
        "target_behavior": "",
        "codes": [],
        "counts": [(code, float(n)) for code, n in sorted(coding.counts.items())],
        "global_scores": [],
        "rounds": coding.rounds,
        "comment": "",
        "reply_key": "",
    }


def _row(
    packet: Packet,
    coded: CodedItem,
    source: str,
    *,
    scope: Sequence[str] = CODE_NAMES,
    counts: Mapping[str, float] | None = None,
    why: str = "",
    reply_key: str = "",
) -> dict[str, Any]:
    """One row of CODINGS; counts: expected ones, else those of the codes; why it is uncoded."""
    dialogue_id, group = packet.key[coded.item_id]
    item = packet.item(coded.item_id)
    if counts is None:
        counts = Counter(coded.codes.values())
    return {
        "item_id": coded.item_id,
        "dialogue_id": dialogue_id,
        "group": group,
        "coder": coded.coder,
        "source": source,
        "status": "uncoded" if why else "coded",
        "reason": why,
        "scope": list(scope),
        "target_behavior": coded.target_behavior,
        "codes": [
            {"volley": volley, "utterance": utterance, "code": code}
            for (volley, utterance), code in sorted(coded.codes.items())
        ],
        "counts": [(code, float(n)) for code, n in sorted(counts.items())],
        "global_scores": sorted(coded.global_scores.items()),
        "rounds": item.rounds if item else 0,
        "comment": coded.comment,
        "reply_key": reply_key,
    }


STAGE = Stage("code", plan, run, check_paths=("miti", "llm"), uses_ray=False)
