"""The packet stage: sessions and real dialogues → a blind packet, its sheets, and its key apart.

`packet/` is what coders get: packet.json (what the coding page shows) and a workbook and two CSV
files for each coder under sheets/. `packet_key/` says which dialogue is whose; it stays with the
study's organiser.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milm_ray.config import Config
from milm_ray.errors import UserError
from milm_ray.job import Plan, Stage, finished
from milm_ray.miti import annomi
from milm_ray.miti.coding_store import FOLDER, CodingStore
from milm_ray.miti.packet import GIVE_AWAYS, Candidate, Item, Packet, make_packet
from milm_ray.miti.sheet import write_csv, write_xlsx
from milm_ray.miti.volleys import Volley
from milm_ray.schema import Turn, turns_of
from milm_ray.workspace import MANIFEST, Workspace

ARTIFACT, KEY = "packet", "packet_key"
SESSIONS = ("sessions/simulated", "sessions/human")
REAL = "Real (AnnoMI)"
SHEETS = "sheets"  # where coders' sheets come back


def group_of(session: Mapping[str, Any]) -> str:
    """The arm of a session: its model and adapter, and whether its clients were simulated."""
    name, variant = session["model"], session["variant"]
    if variant != "base":
        # A session in the chat page names its adapter; mi is the one that fine-tuning makes.
        chosen = json.loads(session["details"] or "{}").get("adapter", "mi")
        other = variant if variant != "adapter" else chosen if chosen != "mi" else ""
        name = f"MI-LLM {name}" + (f" ({other})" if other else "")
    return f"{name}, simulated clients" if session["source"] == "simulated" else name


def _inputs(workspace: Workspace) -> list[str]:
    return [name for name in SESSIONS if workspace.exists(name, MANIFEST)]


def file_digest(path: str | Path | None) -> str:
    """sha256 of a file; "" for none."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def _settings(config: Config) -> dict[str, Any]:
    names = {"annomi_dialogues", "annomi_quality", "coders"}
    return {"seed": config.seed, **config.miti.model_dump(include=names), "hidden": GIVE_AWAYS}


def _fingerprint(config: Config, workspace: Workspace) -> dict[str, Any]:
    made_from: dict[str, Any] = workspace.input_digests(*_inputs(workspace))
    made_from["annomi"] = file_digest(config.miti.annomi)
    return workspace.fingerprint(_settings(config), made_from)


def plan(config: Config, workspace: Workspace) -> Plan:
    """Rows: dialogues to be coded."""
    found = _inputs(workspace)
    if not found and not config.miti.annomi:
        return Plan(notes=("dialogues: what sessions/ holds by then",))
    if workspace.is_done(ARTIFACT, _fingerprint(config, workspace)):
        return Plan(done=True)
    counts = [workspace.manifest(name)["counts"] for name in found]
    # Exports of the chat made before they said "sessions" say "rows", and stay if nothing is new.
    rows = sum(each["sessions"] if "sessions" in each else each["rows"] for each in counts)
    rows += config.miti.annomi_dialogues if config.miti.annomi else 0
    return Plan(rows=rows, notes=(f"a sheet for each of {', '.join(config.miti.coders)}",))


def real_sessions(config: Config) -> list[annomi.Session]:
    """The AnnoMI dialogues of the study: seeded, of high quality unless asked otherwise."""
    if not config.miti.annomi:
        return []
    sessions = annomi.read(Path(config.miti.annomi))
    if config.miti.annomi_quality == "high":
        sessions = [session for session in sessions if session.quality == "high"]
    sessions.sort(key=lambda session: int(session.transcript_id))
    count = min(config.miti.annomi_dialogues, len(sessions))
    return random.Random(config.seed).sample(sessions, count)


def real_id(session: annomi.Session) -> str:
    """The dialogue id of an AnnoMI session."""
    return f"annomi-{session.transcript_id}"


def run(config: Config, workspace: Workspace) -> Mapping[str, Any]:
    """Write the packet, its sheets and its key; returns the packet's manifest."""
    fingerprint = _fingerprint(config, workspace)
    if finished(workspace, ARTIFACT, fingerprint):
        return workspace.manifest(ARTIFACT)
    started = time.time()
    found, facts = candidates(config, workspace)
    if not found:
        raise UserError(
            "there is no dialogue to code: sessions/ is empty and miti.annomi is not set",
            "run jobs/simulate.py, hold sessions in the chat page, or give miti.annomi=FILE",
        )
    packet = make_packet(found, config.seed)
    _keep_coded(config, workspace, packet)
    workspace.clear(ARTIFACT)
    workspace.clear(KEY)
    workspace.write_text(_json(_packet_rows(packet)), ARTIFACT, "packet.json")
    with tempfile.TemporaryDirectory() as folder:
        for coder in config.miti.coders:
            write_csv(packet.items, Path(folder), coder)
            write_xlsx(packet.items, Path(folder, f"{coder}.xlsx"))
        for path in sorted(Path(folder).iterdir()):
            workspace.write_bytes(path.read_bytes(), ARTIFACT, "sheets", path.name)
    key = {
        item_id: {"dialogue_id": dialogue_id, "group": group, **facts[dialogue_id]}
        for item_id, (dialogue_id, group) in packet.key.items()
    }
    workspace.write_text(_json(key), KEY, "key.json")
    groups = Counter(entry["group"] for entry in key.values())
    shared: dict[str, Any] = {
        "stage": "packet",
        "settings": _settings(config),
        "fingerprint": fingerprint,
        "counts": {"dialogues": len(key), "by_group": dict(groups)},
        "started": started,
    }
    workspace.commit(KEY, **shared, annomi_ids=[i for i in facts if i.startswith("annomi-")])
    # The coders' copy says nothing of the groups, not even how many there are.
    shared["counts"] = {"dialogues": len(key), "hidden": sum(packet.masked.values())}
    return workspace.commit(ARTIFACT, **shared)


def _keep_coded(config: Config, workspace: Workspace, packet: Packet) -> None:
    """Raises UserError when people have begun to code a packet of other dialogues than this."""
    if not workspace.exists(ARTIFACT, MANIFEST) or load_items(workspace) == packet.items:
        return
    folder = Path(config.miti.sheets) if config.miti.sheets else None
    if folder is None and workspace.exists(SHEETS):
        folder = workspace.local(SHEETS)
    begun = [str(folder)] if folder and any(folder.iterdir()) else []
    if CodingStore.begun(workspace):
        begun.append(str(workspace.local(FOLDER)))
    if begun:
        raise UserError(
            "the dialogues are no longer those of packet/, which people have begun to code "
            f"({', '.join(begun)}): sessions/, the settings of miti or this program have changed",
            "use the settings and the version that made packet/, or move people's work away to "
            "begin anew",
        )


def candidates(
    config: Config, workspace: Workspace
) -> tuple[list[Candidate], dict[str, dict[str, Any]]]:
    """The dialogues of the study, and by dialogue id what the tables need to know of them."""
    found, facts = [], {}
    for name in _inputs(workspace):
        for row in workspace.read_table(name).to_pylist():
            # A text of the safety check is not the model's own, nor is where a person cut a reply.
            left_out = {*(row["preset_turns"] or ()), *(row["stopped_turns"] or ())}
            turns = [turn for n, turn in enumerate(turns_of(row)) if n not in left_out]
            open_ = row["ended_at"] is None
            if open_ or all(turn.role != "counselor" for turn in turns):
                continue
            found.append(Candidate(row["session_id"], group_of(row), turns))
            facts[row["session_id"]] = {
                "language": row["language"],
                "topic": row["topic"],
                "motivation": row["motivation"],
                "source": row["source"],
            }
    for session in real_sessions(config):
        turns = [
            Turn("client" if u.speaker == "client" else "counselor", u.text)
            for u in session.utterances
        ]
        found.append(Candidate(real_id(session), REAL, turns))
        topic = {"language": "en", "topic": session.topic, "motivation": "", "source": "annomi"}
        facts[real_id(session)] = topic
    return found, facts


def _packet_rows(packet: Packet) -> dict[str, Any]:
    return {
        "items": [
            {
                "item_id": item.item_id,
                "volleys": [
                    {"number": v.number, "role": v.role, "utterances": list(v.utterances)}
                    for v in item.volleys
                ],
            }
            for item in packet.items
        ],
        "masked": packet.masked,
    }


def load_items(workspace: Workspace) -> tuple[Item, ...]:
    """The items of the packet, in coding order, without the key."""
    workspace.manifest(ARTIFACT)
    data = json.loads(workspace.read_text(ARTIFACT, "packet.json"))
    return tuple(
        Item(
            row["item_id"],
            tuple(Volley(v["number"], v["role"], tuple(v["utterances"])) for v in row["volleys"]),
        )
        for row in data["items"]
    )


def load_key(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """By item id: dialogue_id, group, language, topic, motivation, source."""
    workspace.manifest(KEY)
    return json.loads(workspace.read_text(KEY, "key.json"))


def load_packet(workspace: Workspace) -> Packet:
    """The packet with its key."""
    key = {i: (e["dialogue_id"], e["group"]) for i, e in load_key(workspace).items()}
    masked = json.loads(workspace.read_text(ARTIFACT, "packet.json"))["masked"]
    return Packet(load_items(workspace), key, masked)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1)


STAGE = Stage("packet", plan, run, check_paths=("miti",), uses_ray=False)
