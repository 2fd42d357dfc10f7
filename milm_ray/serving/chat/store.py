"""Sessions and messages in the database: every rule that must hold between replicas is here.

A message is known by the id that its client gave it, so sending it twice stores it once. A reply
belongs to one replica at a time, by lease and attempt: who lost it writes nothing any more.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from milm_ray.serving.chat.database import Database, uninterrupted
from milm_ray.serving.chat.errors import Refused, not_found
from milm_ray.serving.chat.tables import PENDING, ChatMessage, ChatSession, Counter, Intervention

LEASE_S = 8.0
# The tables themselves, for what is done with every sentence: without the bookkeeping of objects.
_MESSAGES: Any = ChatMessage.__table__
_SESSIONS: Any = ChatSession.__table__
_RISKS = ("none", "medium", "high")


@dataclass(frozen=True)
class Reply:
    """A reply of which this replica has the lease."""

    session_id: str
    position: int
    message_id: str
    attempt: int


@uninterrupted
class Store:
    def __init__(self, database: Database, owner: str, max_rounds: int) -> None:
        self._database = database
        self._owner = owner
        self._max_rounds = max_rounds

    # sessions ------------------------------------------------------------------------------------

    async def create(self, session: ChatSession, max_per_person: int) -> ChatSession:
        """Store a new session; the one that is there already where its id is known."""
        try:
            async with self._database.write() as transaction:
                found = await transaction.get(ChatSession, session.session_id)
                if found is None:
                    count = await transaction.scalar(
                        sa.select(sa.func.count()).where(ChatSession.person == session.person)
                    )
                    if (count or 0) >= max_per_person:
                        raise Refused(
                            429, "too_many_sessions", "too many sessions; delete old ones", 3600
                        )
                    transaction.add(session)
                    return session
        except IntegrityError:  # the same request, twice at once
            async with self._database.read() as transaction:
                found = await transaction.get(ChatSession, session.session_id)
        if found is None or found.person != session.person:
            raise Refused(409, "session_taken", "that session id is taken")
        return found

    async def exists(self, session_id: str, person: str) -> bool:
        async with self._database.read() as transaction:
            found = await transaction.get(ChatSession, session_id)
        return found is not None and found.person == person

    async def next_number(self, name: str) -> int:
        """0, 1, 2, …: each number once, over all replicas, whatever is deleted."""
        async with self._database.write() as transaction:
            dialect = transaction.get_bind().dialect.name
            insert: Any = (sqlite if dialect == "sqlite" else postgresql).insert
            statement = (
                insert(Counter)
                .values(name=name, value=1)
                .on_conflict_do_update(
                    index_elements=[Counter.name], set_={"value": Counter.value + 1}
                )
                .returning(Counter.value)
            )
            return int((await transaction.execute(statement)).scalar_one()) - 1

    async def load(self, session_id: str, person: str) -> tuple[ChatSession, list[ChatMessage]]:
        """A session and its messages in order; 404 where it is not this person's."""
        async with self._database.read() as transaction:
            session = await self._own(transaction, session_id, person)
            return session, await _messages(transaction, session_id)

    async def sessions(self, person: str) -> list[ChatSession]:
        async with self._database.read() as transaction:
            statement = sa.select(ChatSession).where(ChatSession.person == person)
            found = await transaction.scalars(statement.order_by(ChatSession.started_at))
            return list(found)

    async def end(self, session_id: str, person: str, reason: str) -> None:
        async with self._database.write() as transaction:
            session = await self._own(transaction, session_id, person, lock=True)
            if not session.end_reason:
                session.end_reason, session.ended_at = reason, time.time()
                await transaction.execute(
                    sa.update(ChatMessage)
                    .where(ChatMessage.session_id == session_id, ChatMessage.status == "pending")
                    .values(stop=True)
                )

    async def rate(self, session_id: str, person: str, rating: int, comment: str) -> None:
        async with self._database.write() as transaction:
            session = await self._own(transaction, session_id, person, lock=True)
            session.rating, session.comment = rating, comment

    async def delete(self, person: str, session_id: str | None = None) -> int:
        """Remove one session, or all of a person's, with all that hangs on them; how many."""
        statement = sa.delete(ChatSession).where(ChatSession.person == person)
        if session_id is not None:
            statement = statement.where(ChatSession.session_id == session_id)
        async with self._database.write() as transaction:
            result: Any = await transaction.execute(statement)
        await self._database.scrub()
        return int(result.rowcount)

    async def _own(
        self, transaction: AsyncSession, session_id: str, person: str, lock: bool = False
    ) -> ChatSession:
        session = await transaction.get(ChatSession, session_id, with_for_update=lock)
        if session is None or session.person != person:
            raise not_found()
        return session

    # messages ------------------------------------------------------------------------------------

    async def send(self, session_id: str, person: str, message_id: str, text: str) -> Reply | None:
        """Store a client's message and the place of its reply; None where it was stored before."""
        now, over = time.time(), False
        async with self._database.write() as transaction:
            session = await self._own(transaction, session_id, person, lock=True)
            known = await transaction.scalar(
                sa.select(_MESSAGES.c.content).where(
                    _MESSAGES.c.session_id == session_id,
                    _MESSAGES.c.message_id == message_id,
                    _MESSAGES.c.role == "client",
                )
            )
            if known is not None:
                if known != text:
                    raise Refused(409, "other_text", "that message id was sent with other text")
                return None
            if session.end_reason:
                raise Refused(409, "ended", "the session has ended")
            newest = sa.select(_MESSAGES.c.position, _MESSAGES.c.status).where(
                _MESSAGES.c.session_id == session_id
            )
            newest = newest.order_by(_MESSAGES.c.position.desc()).limit(1)
            last = (await transaction.execute(newest)).first()
            position = 0 if last is None else last.position + 1
            if last is not None and last.status == "pending":
                raise Refused(409, "busy", "the reply before this one is not finished yet")
            if position >= 2 * self._max_rounds:
                session.end_reason, session.ended_at = "limit", now
                over = True
            common = {"session_id": session_id, "message_id": message_id, "created_at": now}
            asked = ChatMessage(
                **common, position=position, role="client", content=text, notice="", kind="client",
                status="done", stop=False, attempt=1, owner="", lease_until=0.0, finished_at=now,
            )  # fmt: skip
            reply = ChatMessage(
                **common, position=position + 1, role="counselor", content="", notice="",
                kind="model", status="pending", stop=False, attempt=1, owner=self._owner,
                lease_until=now + LEASE_S, finished_at=None,
            )  # fmt: skip
            if not over:
                transaction.add_all([asked, reply])
        if over:
            raise Refused(409, "limit", "the session has reached its last round")
        return Reply(session_id, position + 1, message_id, 1)

    async def retry(self, session_id: str, person: str, message_id: str) -> Reply | None:
        """Begin the last reply anew where it failed or was stopped; None where it is under way."""
        async with self._database.write() as transaction:
            session = await self._own(transaction, session_id, person, lock=True)
            messages = await _messages(transaction, session_id)
            last = messages[-1] if messages else None
            if last is None or last.message_id != message_id:
                raise Refused(409, "not_last", "only the last reply can be asked for again")
            if session.end_reason:
                raise Refused(409, "ended", "the session has ended")
            if last.status == "pending":
                return None
            if last.status == "done":
                raise Refused(409, "done", "the reply is there already")
            last.status, last.content, last.notice, last.stop = "pending", "", "", False
            last.kind, last.finished_at = "model", None
            return self._take(last)

    async def stop(self, session_id: str, person: str, message_id: str) -> None:
        """Ask whoever writes the reply to stop; without effect where it is finished."""
        async with self._database.write() as transaction:
            await self._own(transaction, session_id, person)
            await transaction.execute(
                sa.update(ChatMessage)
                .where(
                    ChatMessage.session_id == session_id,
                    ChatMessage.message_id == message_id,
                    ChatMessage.status == "pending",
                )
                .values(stop=True)
            )

    # replies -------------------------------------------------------------------------------------

    async def abandoned(self) -> list[tuple[str, int]]:
        """Session and position of each reply whose replica has gone, the oldest first."""
        statement = sa.select(_MESSAGES.c.session_id, _MESSAGES.c.position).where(
            sa.text(PENDING), _MESSAGES.c.lease_until < time.time()
        )
        async with self._database.read() as transaction:
            found = await transaction.execute(statement.order_by(_MESSAGES.c.created_at))
            return [(row.session_id, row.position) for row in found]

    async def claim(self, session_id: str, position: int) -> Reply | None:
        """Take over a reply whose replica has gone; None where it is in good hands, or finished."""
        async with self._database.write() as transaction:
            message = await transaction.get(
                ChatMessage, (session_id, position), with_for_update=True
            )
            if message is None or message.status != "pending" or message.lease_until > time.time():
                return None
            message.content, message.notice = "", ""
            return self._take(message)

    def _take(self, message: ChatMessage) -> Reply:
        message.attempt += 1
        message.owner, message.lease_until = self._owner, time.time() + LEASE_S
        return Reply(message.session_id, message.position, message.message_id, message.attempt)

    async def history(self, reply: Reply) -> tuple[ChatSession | None, list[ChatMessage]]:
        """The session and all messages before a reply; None where it has been deleted."""
        async with self._database.read() as transaction:
            session = await transaction.get(ChatSession, reply.session_id)
            messages = await _messages(transaction, reply.session_id)
            return session, messages[: reply.position]

    async def progress(self, reply: Reply, content: str, notice: str) -> bool | None:
        """Keep what is written so far, and the lease; whether to stop, None where it was lost."""
        values = {"content": content, "notice": notice, "lease_until": time.time() + LEASE_S}
        async with self._database.write() as transaction:
            statement = sa.update(_MESSAGES).where(*self._mine(reply)).values(**values)
            row = (await transaction.execute(statement.returning(_MESSAGES.c.stop))).first()
            return None if row is None else bool(row[0])

    async def finish(self, reply: Reply, status: str, content: str, kind: str, risk: str) -> None:
        """End a reply; the session's risk only ever rises."""
        now = time.time()
        lower = _RISKS[: _RISKS.index(risk)]
        async with self._database.write() as transaction:
            await transaction.execute(
                sa.update(_MESSAGES)
                .where(*self._mine(reply))
                .values(status=status, content=content, kind=kind, finished_at=now, lease_until=0.0)
            )
            if lower:
                await transaction.execute(
                    sa.update(_SESSIONS)
                    .where(_SESSIONS.c.session_id == reply.session_id, _SESSIONS.c.risk.in_(lower))
                    .values(risk=risk)
                )

    async def release(self, reply: Reply) -> None:
        """Give a reply up, so that another replica may take it over at once."""
        async with self._database.write() as transaction:
            await transaction.execute(
                sa.update(_MESSAGES).where(*self._mine(reply)).values(lease_until=0.0)
            )

    def _mine(self, reply: Reply) -> Sequence[Any]:
        return (
            _MESSAGES.c.session_id == reply.session_id,
            _MESSAGES.c.position == reply.position,
            _MESSAGES.c.attempt == reply.attempt,
            _MESSAGES.c.owner == self._owner,
            _MESSAGES.c.status == "pending",
        )

    async def position(self, session_id: str, person: str, message_id: str) -> int:
        """Where the reply to a message is in its session; 404 where there is none."""
        statement = (
            sa.select(_MESSAGES.c.position)
            .join(_SESSIONS, _SESSIONS.c.session_id == _MESSAGES.c.session_id)
            .where(
                _SESSIONS.c.session_id == session_id,
                _SESSIONS.c.person == person,
                _MESSAGES.c.message_id == message_id,
                _MESSAGES.c.role == "counselor",
            )
        )
        async with self._database.read() as transaction:
            found = await transaction.scalar(statement)
        if found is None:
            raise not_found()
        return int(found)

    async def message(self, session_id: str, position: int) -> ChatMessage | None:
        async with self._database.read() as transaction:
            return await transaction.get(ChatMessage, (session_id, position))

    # interventions -------------------------------------------------------------------------------

    async def intervened(self, reply: Reply, record: dict[str, Any], call: bool) -> None:
        """Keep what the safety check did; call: the takeover webhook is to be called about it.

        The same record about the same reply is kept once, whichever replicas found it.
        """
        content = json.dumps(record, ensure_ascii=False, sort_keys=True)
        about = f"{reply.session_id}/{reply.position}/{content}"
        intervention_id = uuid.uuid5(uuid.NAMESPACE_OID, about).hex
        session_id, now = reply.session_id, time.time()
        async with self._database.write() as transaction:
            known = await transaction.get(Intervention, intervention_id)
            if known or await transaction.get(ChatSession, session_id) is None:
                return
            transaction.add(
                Intervention(
                    intervention_id=intervention_id,
                    session_id=session_id,
                    at=now,
                    record=content,
                    hook="pending" if call else "none",
                    attempts=0,
                    due_at=now,
                )
            )

    async def due_calls(self, hold_s: float, limit: int = 16) -> list[Intervention]:
        """Webhook calls that are due; none of them is due again for `hold_s` seconds."""
        now = time.time()
        async with self._database.write() as transaction:
            statement = (
                sa.select(Intervention)
                .where(Intervention.hook == "pending", Intervention.due_at <= now)
                .order_by(Intervention.due_at)
                .limit(limit)
                .with_for_update(skip_locked=True)
            )
            due = list(await transaction.scalars(statement))
            for call in due:
                call.due_at = now + hold_s
                call.attempts += 1
            return due

    async def called(self, intervention_id: str, hook: str, again_in_s: float = 0.0) -> None:
        async with self._database.write() as transaction:
            await transaction.execute(
                sa.update(Intervention)
                .where(Intervention.intervention_id == intervention_id)
                .values(hook=hook, due_at=time.time() + again_in_s)
            )


async def _messages(transaction: AsyncSession, session_id: str) -> list[ChatMessage]:
    statement = sa.select(ChatMessage).where(ChatMessage.session_id == session_id)
    return list(await transaction.scalars(statement.order_by(ChatMessage.position)))
