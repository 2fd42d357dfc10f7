"""The chat's sessions: from its database to `sessions/human/`, and out of both on request."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import sqlalchemy as sa

from milm_ray.config import Config, load_config
from milm_ray.errors import UserError
from milm_ray.job import Plan, Stage
from milm_ray.schema import SESSIONS, Session
from milm_ray.serving.chat.database import Database, Unavailable, database_url
from milm_ray.serving.chat.replies import dialogue
from milm_ray.serving.chat.tables import ChatMessage, ChatSession
from milm_ray.serving.endpoints import chat_database
from milm_ray.workspace import MANIFEST, Workspace, digest

log = logging.getLogger("milm_ray")
ARTIFACT = "sessions/human"


def plan(config: Config, workspace: Workspace) -> Plan:
    sessions = _sessions(config, workspace)
    return Plan(rows=len(sessions), notes=("reads the chat's database; its people go on chatting",))


def run(config: Config, workspace: Workspace) -> Mapping[str, Any]:
    """Write every session in which something was said; returns the manifest."""
    started = time.time()
    sessions = _sessions(config, workspace)
    rows = [session.row() for session in sessions if session.turns]
    fingerprint = workspace.fingerprint({}, {"chat": digest([str(row) for row in rows])})
    if workspace.is_done(ARTIFACT, fingerprint):
        return workspace.manifest(ARTIFACT)
    workspace.clear(ARTIFACT)
    workspace.write_table(pa.Table.from_pylist(rows, SESSIONS), ARTIFACT)
    return workspace.commit(
        ARTIFACT,
        stage="sessions",
        settings={"study": config.chat.study, "seed": config.chat.seed},
        fingerprint=fingerprint,
        counts={
            "sessions": len(rows),
            "without_a_word": len(sessions) - len(rows),
            "open": sum(row["ended_at"] is None for row in rows),
            "rated": sum(row["rating"] is not None for row in rows),
            "high_risk": sum(row["risk"] == "high" for row in rows),
        },
        started=started,
    )


def _sessions(config: Config, workspace: Workspace) -> list[Session]:
    return _with_database(config, workspace, read_sessions)


async def read_sessions(database: Database) -> list[Session]:
    """Every session of the database as the study's table has it, the oldest first."""
    async with database.read() as transaction:
        ordered = sa.select(ChatSession).order_by(ChatSession.started_at, ChatSession.session_id)
        sessions = list(await transaction.scalars(ordered))
        said: dict[str, list[ChatMessage]] = {session.session_id: [] for session in sessions}
        messages = sa.select(ChatMessage).order_by(ChatMessage.session_id, ChatMessage.position)
        for message in await transaction.scalars(messages):
            if message.session_id in said and message.status != "pending":
                said[message.session_id].append(message)
    return [_session(session, said[session.session_id]) for session in sessions]


def _session(session: ChatSession, messages: list[ChatMessage]) -> Session:
    turns = dialogue(messages)
    model, _, adapter = session.model.partition(":")
    marked: dict[str, list[int]] = {"preset": [], "stopped": []}
    for message in messages:
        if message.role == "counselor" and message.content.strip():
            # Counselor turns are one message each: only the client's run together.
            index = len(dialogue(messages[: message.position + 1])) - 1
            if message.kind == "preset":
                marked["preset"].append(index)
            if message.status == "stopped":
                marked["stopped"].append(index)
    known: Any = session
    return Session(
        session_id=session.session_id,
        source="human",
        model=model,
        variant="adapter" if adapter else "base",
        topic=session.topic,
        motivation=known.motivation,
        turns=turns,
        started_at=datetime.fromtimestamp(session.started_at, UTC),
        ended_at=datetime.fromtimestamp(session.ended_at, UTC) if session.ended_at else None,
        end_reason=session.end_reason,
        participant=session.participant,
        blind=session.blind,
        language=known.language,
        preset_turns=marked["preset"],
        stopped_turns=marked["stopped"],
        risk=known.risk,
        rating=session.rating,
        comment=session.comment,
        seed=session.seed,
        details=json.dumps({"adapter": adapter}) if adapter else "",
    )


def forget(description: str, argv: Sequence[str] | None = None) -> int:
    """`jobs/forget.py`: delete a participant's sessions, or one session; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file, see jobs/configs/")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--participant", help="the study's code for the person")
    who.add_argument("--session", help="the id of one session")
    parser.add_argument("override", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(argv)
    try:
        config = load_config(options.config, options.override)
        workspace = Workspace.open(config.workspace)
        column = "participant" if options.participant else "session_id"
        name = options.participant or options.session
        chosen = getattr(ChatSession, column) == name
        deleted, left = _with_database(config, workspace, lambda base: _delete(base, chosen))
        print(f"deleted {deleted} session(s) from the chat's database")
        exported = _is_exported(workspace, column, name)
        if exported:
            # A table that still holds them must not outlive them, whoever deleted them.
            workspace.clear(ARTIFACT)
            print(f"removed {ARTIFACT}/ too: jobs/sessions.py writes it anew, without them")
        if items := _still_coded(workspace, left):
            print(
                f"packet/ still holds what was said in deleted sessions, as {', '.join(items)}, "
                "and so do the sheets that coders were given or have sent back: delete them all "
                "by hand; jobs/sessions.py and jobs/miti.py then make a packet without them"
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0 if deleted or exported else 1


async def _delete(database: Database, chosen: Any) -> tuple[int, set[str]]:
    """How many sessions were deleted, and the ids of those that are left."""
    async with database.write() as transaction:
        result: Any = await transaction.execute(sa.delete(ChatSession).where(chosen))
        left = set(await transaction.scalars(sa.select(ChatSession.session_id)))
    await database.scrub()
    return int(result.rowcount), left


def _is_exported(workspace: Workspace, column: str, name: str) -> bool:
    """Whether the exported table holds a person or session; one that is not whole may."""
    if not workspace.exists(ARTIFACT, MANIFEST):
        return workspace.exists(ARTIFACT)
    return name in workspace.read_table(ARTIFACT, [column])[column].to_pylist()


def _still_coded(workspace: Workspace, left: set[str]) -> list[str]:
    """The items of the coders' packet that were made of sessions that are no longer there."""
    if not workspace.exists("packet_key", MANIFEST):
        return []
    key = json.loads(workspace.read_text("packet_key", "key.json"))
    return [
        item
        for item, entry in key.items()
        if entry["source"] == "human" and entry["dialogue_id"] not in left
    ]


def _with_database(config: Config, workspace: Workspace, work: Any) -> Any:
    """The result of an async function of the open database."""
    default = chat_database(workspace)
    url = database_url(config.chat, Path(default) if default else None)
    if url.database and url.get_backend_name() == "sqlite" and not Path(url.database).exists():
        raise UserError(
            f"there is no chat database at {url.database}",
            "chat first (`make serve`), or set chat.database to where it is",
        )

    async def connected() -> Any:
        database = Database(url)
        try:
            await database.migrate()
            return await work(database)
        finally:
            await database.close()

    try:
        return asyncio.run(connected())
    except Unavailable as error:
        raise UserError(
            f"the chat's database does not answer ({error})",
            "see that it runs and that its URL is right",
        ) from error


STAGE = Stage("sessions", plan, run, uses_ray=False)
