"""The chat's HTTP application: the page, its API, the life of a replica.

    create_app(settings) -> an ASGI app that needs no Ray; build.py makes a Serve app of it

A session belongs to whoever knows its secret: the browser makes one, sends it as X-Person, and the
database keeps its digest only.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from milm_ray.schema import MOTIVATIONS, TOPICS
from milm_ray.serve_settings import ChatSection
from milm_ray.serving.access import Gate
from milm_ray.serving.chat.bodies import Id, NewMessage, NewSession, Rating, session_view
from milm_ray.serving.chat.database import Database, Unavailable, database_url
from milm_ray.serving.chat.errors import Refused, unavailable
from milm_ray.serving.chat.page import page
from milm_ray.serving.chat.replies import Replies
from milm_ray.serving.chat.roles import MOTIVATION_CARDS, TOPIC_CARDS, assigned
from milm_ray.serving.chat.store import Store
from milm_ray.serving.chat.tables import ChatSession
from milm_ray.serving.chat.takeover import Takeover
from milm_ray.serving.chat.upstream import Transient, Upstream
from milm_ray.serving.safety import assess

log = logging.getLogger("milm_ray")
_MAX_BODY_BYTES = 128 << 10
_KEEP_ALIVE_S = 10.0
_SSE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def create_app(
    settings: ChatSection, keys_file: str | None = None, default_database: Path | None = None
) -> ASGIApp:
    """The chat behind its gate. default_database: the SQLite file where no URL is configured."""
    service = Chat(settings, Database(database_url(settings, default_database)))
    app = FastAPI(
        title="milm_ray chat", docs_url=None, redoc_url=None, lifespan=lambda _: service.running()
    )
    _add_errors(app)
    _add_page(app, service)
    _add_sessions(app, service)
    _add_messages(app, service)
    return Gate(
        app, keys_file, replicas=settings.replicas, sign_in=True, max_body_bytes=_MAX_BODY_BYTES
    )


class Chat:
    """What the routes of one replica share."""

    def __init__(self, settings: ChatSection, database: Database) -> None:
        self.settings = settings
        self.database = database
        self.store = Store(database, uuid.uuid4().hex, settings.max_rounds)
        self.upstream = Upstream(settings)
        self.replies = Replies(settings, self.store, self.upstream)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        for line in self.settings.safety.stale_lines(datetime.now(UTC).date()):
            log.warning(
                "chat | the help line %s was last checked on %s", line.number, line.checked_on
            )
        await self.database.migrate()
        await asyncio.to_thread(assess, [{"role": "client", "content": "你好，我想聊聊。"}])
        chores = [asyncio.create_task(self.replies.take_over())]
        if self.settings.takeover.url is not None:
            takeover = Takeover(self.settings.takeover, self.store)
            chores.append(asyncio.create_task(takeover.run()))
        try:
            yield
        finally:
            for chore in chores:
                chore.cancel()
            await asyncio.gather(*chores, return_exceptions=True)
            await self.replies.close()
            await self.upstream.close()
            await self.database.close()

    async def new_session(self, body: NewSession, person: str) -> ChatSession:
        models = await self.upstream.models()
        if not models:
            raise Refused(503, "no_model", "no model is served at the moment", 10)
        settings = self.settings
        if not settings.study and body.model is not None and body.model not in models:
            raise Refused(422, "unknown_model", "there is no such model to choose")
        blind = settings.study or body.model is None
        role, seed = None, None
        if blind or body.topic is None or body.motivation is None:
            number = await self.store.next_number(f"assigned/{settings.seed}")
            role, seed = assigned(number, settings.seed, models), settings.seed
        study = settings.study
        session = ChatSession(
            session_id=body.session_id,
            person=person,
            participant=body.participant,
            model=role.model if role and blind else body.model,
            blind=blind,
            seed=seed,
            topic=role.topic if role and (study or body.topic is None) else body.topic,
            motivation=(
                role.motivation if role and (study or body.motivation is None) else body.motivation
            ),
            language=body.language,
            risk="none",
            end_reason="",
            rating=None,
            comment="",
            started_at=time.time(),
            ended_at=None,
        )
        return await self.store.create(session, settings.max_sessions_per_person)

    def describe(self, models: list[str]) -> dict[str, Any]:
        """What the page needs to know; in a study no model is named."""
        return {
            "study": self.settings.study,
            "models": [] if self.settings.study else models,
            "topics": [{"id": topic, **TOPIC_CARDS[topic]} for topic in TOPICS],
            "motivations": [{"id": level, **MOTIVATION_CARDS[level]} for level in MOTIVATIONS],
            "max_message_chars": self.settings.max_message_chars,
            "help_lines": [
                {
                    "number": line.number,
                    "zh": line.name_zh,
                    "en": line.name_en,
                    "checked_on": line.checked_on.isoformat(),
                }
                for line in self.settings.safety.help_lines
            ],
        }


async def _person(x_person: Annotated[str, Header(pattern=r"^[A-Za-z0-9_-]{32,128}$")]) -> str:
    """The digest of the secret that the browser made for its person."""
    return hashlib.sha256(x_person.encode()).hexdigest()


Person = Annotated[str, Depends(_person)]


def _add_errors(app: FastAPI) -> None:
    def answer(
        status: int, code: str, message: str, retry_after: int | None = None
    ) -> JSONResponse:
        headers = {"Retry-After": str(retry_after)} if retry_after else None
        return JSONResponse({"error": {"code": code, "message": message}}, status, headers)

    @app.exception_handler(Refused)
    async def refused(_request: Request, error: Refused) -> Response:
        return answer(error.status, error.code, error.message, error.retry_after)

    @app.exception_handler(Unavailable)
    async def outage(_request: Request, _error: Unavailable) -> Response:
        why = unavailable()
        return answer(why.status, why.code, why.message, why.retry_after)

    @app.exception_handler(Transient)
    async def no_models(_request: Request, _error: Transient) -> Response:
        return answer(503, "no_model", "the model endpoints do not answer", 5)

    @app.exception_handler(HTTPException)
    async def http(_request: Request, error: HTTPException) -> Response:
        return answer(error.status_code, "http", str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        # Without the input: it may be somebody's words, or no text at all.
        problems = [
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:5]
        ]
        message = "; ".join(problems).encode("utf-8", "replace").decode("utf-8")
        return answer(422, "invalid", message)


def _add_page(app: FastAPI, service: Chat) -> None:
    html, policy = page()

    @app.get("/", include_in_schema=False)
    async def the_page() -> Response:
        headers = {
            "Content-Security-Policy": policy,
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        return Response(html, headers=headers, media_type="text/html")

    @app.get("/health")
    async def health() -> Response:
        """200 while the database answers, 503 while it does not."""
        try:
            await asyncio.wait_for(service.database.ping(), 5)
        except (Unavailable, TimeoutError):
            return JSONResponse({"status": "no database"}, 503, {"Retry-After": "2"})
        return JSONResponse({"status": "ok"})

    @app.get("/api/setting")
    async def setting() -> dict[str, Any]:
        return service.describe([] if service.settings.study else await service.upstream.models())


def _add_sessions(app: FastAPI, service: Chat) -> None:
    store = service.store

    @app.post("/api/sessions", status_code=201)
    async def create(body: NewSession, person: Person) -> dict[str, Any]:
        """Begin a session. The same request again gives the session that it began."""
        if not await store.exists(body.session_id, person):
            await service.new_session(body, person)
        return session_view(*await store.load(body.session_id, person))

    @app.get("/api/sessions")
    async def mine(person: Person) -> dict[str, Any]:
        return {"sessions": [session_view(session) for session in await store.sessions(person)]}

    @app.delete("/api/sessions")
    async def delete_all(person: Person) -> dict[str, int]:
        """Delete everything that this person has said here."""
        return {"deleted": await store.delete(person)}

    @app.get("/api/sessions/{session_id}")
    async def get(session_id: Id, person: Person) -> dict[str, Any]:
        return session_view(*await store.load(session_id, person))

    @app.delete("/api/sessions/{session_id}")
    async def delete(session_id: Id, person: Person) -> dict[str, int]:
        """Delete a session; doing so twice is no error."""
        return {"deleted": await store.delete(person, session_id)}

    @app.get("/api/sessions/{session_id}/export")
    async def export(session_id: Id, person: Person) -> Response:
        view = session_view(*await store.load(session_id, person))
        headers = {"Content-Disposition": f'attachment; filename="session-{session_id[:8]}.json"'}
        text = json.dumps(view, ensure_ascii=False, indent=1)
        return Response(text, headers=headers, media_type="application/json")

    @app.post("/api/sessions/{session_id}/end")
    async def end(session_id: Id, person: Person) -> dict[str, Any]:
        session, messages = await store.load(session_id, person)
        await store.end(session_id, person, "safety" if session.risk == "high" else "client")
        for position in range(len(messages)):
            service.replies.stop(session_id, position)
        return session_view(*await store.load(session_id, person))

    @app.put("/api/sessions/{session_id}/rating")
    async def rate(session_id: Id, body: Rating, person: Person) -> dict[str, str]:
        await store.rate(session_id, person, body.rating, body.comment)
        return {"status": "ok"}


def _add_messages(app: FastAPI, service: Chat) -> None:
    store, replies, limit = service.store, service.replies, service.settings.max_message_chars

    @app.post("/api/sessions/{session_id}/messages", status_code=202)
    async def send(session_id: Id, body: NewMessage, person: Person) -> dict[str, str]:
        """Store a message and begin its reply, once however often it is sent."""
        if len(body.content) > limit:
            raise Refused(422, "too_long", f"a message has at most {limit} characters")
        if not body.content.strip():
            raise Refused(422, "empty", "the message is empty")
        replies.admit()
        reply = await store.send(session_id, person, body.message_id, body.content.strip())
        if reply is not None:
            replies.start(reply)
        return {"message_id": body.message_id}

    @app.post("/api/sessions/{session_id}/messages/{message_id}/retry", status_code=202)
    async def retry(session_id: Id, message_id: Id, person: Person) -> dict[str, str]:
        """Ask again for the last reply, where it failed or was stopped."""
        replies.admit()
        reply = await store.retry(session_id, person, message_id)
        if reply is not None:
            replies.start(reply)
        return {"message_id": message_id}

    @app.post("/api/sessions/{session_id}/messages/{message_id}/stop", status_code=202)
    async def stop(session_id: Id, message_id: Id, person: Person) -> dict[str, str]:
        position = await store.position(session_id, person, message_id)
        await store.stop(session_id, person, message_id)
        replies.stop(session_id, position)
        return {"message_id": message_id}

    @app.get("/api/sessions/{session_id}/messages/{message_id}/reply")
    async def reply_events(session_id: Id, message_id: Id, person: Person) -> Response:
        """The reply as server-sent events, from its beginning, as often as it is asked for."""
        position = await store.position(session_id, person, message_id)
        events = _kept_alive(replies.follow(session_id, position))
        return StreamingResponse(events, media_type="text/event-stream", headers=_SSE)


async def _kept_alive(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Events as text, with a comment now and then while there is nothing to say."""
    following: asyncio.Task[Any] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({following}, timeout=_KEEP_ALIVE_S)
            if not done:
                yield ": still here\n\n"
                continue
            task, following = following, None
            try:
                yield f"data: {json.dumps(task.result(), ensure_ascii=False)}\n\n"
            except StopAsyncIteration:
                return
            except Unavailable:
                yield 'data: {"error": "database"}\n\n'
                return
    finally:
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
