"""Writing replies: the check before, the model, the check of every sentence, the check after.

A reply is written by a task of its replica, whoever listens. Each sentence is in the database
before anybody sees it, so a page that is loaded again, or a replica that takes over, goes on from
what was seen or begins the reply anew as another attempt; it is never answered twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

from milm_ray.schema import Turn
from milm_ray.serve_settings import ChatSection
from milm_ray.serving.chat.database import Unavailable
from milm_ray.serving.chat.errors import Refused
from milm_ray.serving.chat.store import LEASE_S, Reply, Store
from milm_ray.serving.chat.tables import ChatMessage, ChatSession
from milm_ray.serving.chat.upstream import Permanent, Transient, Upstream
from milm_ray.serving.safety import (
    Assessment,
    SentenceGuard,
    Violation,
    assess,
    check_reply,
    help_message,
    intervention_record,
    replacement_message,
)

log = logging.getLogger("milm_ray")
_HEARTBEAT_S = LEASE_S / 4
_POLL_S = 0.3
_LOOK_EVERY_S = 1.0
_OUTAGE_S = 60.0  # how long a reply waits for its database
Result = TypeVar("Result")
Event = dict[str, Any]


@dataclass
class Live:
    """A reply that this replica is writing, as those who listen see it."""

    content: str = ""
    notice: str = ""
    finished: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class Stopped(Exception):
    """The client asked to stop the reply."""


class Lost(Exception):
    """The reply is no longer this replica's: deleted, or taken over after a long outage."""


class Replies:
    def __init__(self, settings: ChatSection, store: Store, upstream: Upstream) -> None:
        self._settings = settings
        self._store = store
        self._upstream = upstream
        self._live: dict[tuple[str, int], Live] = {}
        self._tasks: dict[asyncio.Task[None], Reply] = {}

    def admit(self) -> None:
        """Refuse what would be one reply too many for this replica."""
        if len(self._tasks) >= self._settings.max_replies:
            raise Refused(503, "overloaded", "too many replies at a time; try again shortly", 2)

    def start(self, reply: Reply) -> None:
        live = Live()
        self._live[reply.session_id, reply.position] = live
        task = asyncio.create_task(self._write(reply, live))
        self._tasks[task] = reply
        task.add_done_callback(lambda done: self._tasks.pop(done, None))

    def stop(self, session_id: str, position: int) -> None:
        """Stop at once what is written here; the database tells the others."""
        if live := self._live.get((session_id, position)):
            live.stop.set()

    async def close(self) -> None:
        """Give up what is being written, so that another replica takes it over at once."""
        tasks = dict(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        releases = [self._store.release(reply) for reply in tasks.values()]
        await asyncio.gather(*releases, return_exceptions=True)

    # listening -----------------------------------------------------------------------------------

    async def follow(self, session_id: str, position: int) -> AsyncIterator[Event]:
        """What there is to see of a reply, from its first word to its end.

        {"reset", "text", "notice"}: text to append, or (reset) in place of all before it; at last
        one {"end": status}. A reply whose replica has gone is taken over.
        """
        shown: str | None = None
        notice = ""
        while True:
            live = self._live.get((session_id, position))
            message = None
            if live is None:
                message = await self._store.message(session_id, position)
                if message is None:
                    return  # deleted meanwhile
            now = live or Live(message.content, message.notice)  # type: ignore[union-attr]
            waiter = now.changed
            reset = shown is None or not now.content.startswith(shown)
            if reset or now.content != shown or now.notice != notice:
                text = now.content if reset else now.content[len(shown or "") :]
                yield {"reset": reset, "text": text, "notice": now.notice}
                shown, notice = now.content, now.notice
            if live is not None and not live.finished:
                await waiter.wait()
                continue
            message = message or await self._store.message(session_id, position)
            if message is None:
                return
            if message.status != "pending":
                if message.content == shown:
                    yield {"end": message.status}
                    return
            elif message.lease_until < time.time():
                reply = await self._store.claim(session_id, position)
                if reply is not None:
                    self.start(reply)
                    continue
            await asyncio.sleep(_POLL_S)

    async def take_over(self) -> None:
        """Begin anew what another replica has left unfinished, for as long as this one lives.

        Nobody may be listening: a person in a crisis who has closed the page is assessed all the
        same.
        """
        while True:
            try:
                for key in await self._store.abandoned():
                    if len(self._tasks) >= self._settings.max_replies:
                        break
                    # What is written here goes on by itself after an outage.
                    if key not in self._live and (reply := await self._store.claim(*key)):
                        self.start(reply)
            except Unavailable:
                pass
            except Exception as error:  # whatever it is, the next look may do better
                log.error("chat | replies were not taken over: %s", type(error).__name__)
            await asyncio.sleep(_LOOK_EVERY_S)

    # writing -------------------------------------------------------------------------------------

    async def _write(self, reply: Reply, live: Live) -> None:
        key = (reply.session_id, reply.position)
        started = time.monotonic()
        status = "lost"
        try:
            session, messages = await self._patiently(lambda: self._store.history(reply))
            if session is None:
                raise Lost
            status = await self._answer(reply, live, session, messages)
        except Lost:
            pass
        except Unavailable:
            log.warning("chat | a reply was given up: the database did not come back")
        except Exception as error:
            # Left as it is it would be begun anew for ever. Its own words are not for the log.
            log.error("chat | a reply failed: %s", type(error).__name__)
            with suppress(Unavailable, Lost):
                status = await self._finish(reply, live, "failed", "", "model", "none")
        finally:
            live.finished = True
            if self._live.get(key) is live:
                del self._live[key]
            live.tell()
        log.info("chat | reply %s after %.1f s", status, time.monotonic() - started)

    async def _answer(
        self, reply: Reply, live: Live, session: ChatSession, messages: Sequence[ChatMessage]
    ) -> str:
        """Write one reply to its end; returns its status."""
        turns = dialogue(messages)
        history = [{"role": turn.role, "content": turn.content} for turn in turns]
        safety = self._settings.safety
        # Cheap for a short message; a long one must not hold up the other chats.
        found = await asyncio.to_thread(assess, history, safety)
        found = await self._second_opinion(found, turns)
        if session.risk == "high" and found.level != "high":
            # A second opinion may not say again what it said before; the level never falls.
            category = "suicide" if found.category == "none" else found.category
            found = replace(found, level="high", category=category)
        language: Any = session.language
        # Once is enough for a page, but an attempt that was stopped takes its notice with it.
        beside = any(message.notice for message in messages)
        if found.level == "high" or (found.level == "medium" and not beside):
            await self._intervene(reply, session, "before", found, history)
            live.notice = help_message(
                found.level, found.category, language, safety.help_lines, found.minor
            )
        if found.level == "high":
            text, live.notice = live.notice, ""
            return await self._finish(reply, live, "done", text, "preset", "high")
        try:
            content = await self._generate(reply, live, session, turns)
        except Stopped:
            return await self._finish(reply, live, "stopped", live.content, "model", found.level)
        except Permanent as error:
            log.error("chat | %s will not answer: %s", session.model, error)
            return await self._finish(reply, live, "failed", "", "model", found.level)
        if isinstance(content, str):
            return await self._finish(reply, live, "done", content, "model", found.level)
        await self._intervene(reply, session, "after", content, history)
        text = replacement_message(language)
        return await self._finish(reply, live, "done", text, "preset", found.level)

    async def _second_opinion(self, found: Assessment, turns: Sequence[Turn]) -> Assessment:
        """The assessment, raised where a configured language model sees more; never lowered."""
        settings = self._settings.second_opinion
        if settings.model is None or found.level == "high":
            return found
        try:
            async with asyncio.timeout(settings.timeout_s):
                opinion = await self._upstream.opinion(settings.model, turns)
        except Exception as error:
            # Whatever is wrong with it, the rules and the classifier have spoken.
            log.warning("chat | no second opinion: %s", type(error).__name__)
            return found
        if opinion is None or opinion[0] in ("none", found.level):
            return found
        level, category = opinion
        return replace(
            found,
            level=level,
            category=category,
            categories=tuple(dict.fromkeys((category, *found.categories))),
            evidence=(*found.evidence, "second_opinion"),
            score=max(found.score, 0.8 if level == "high" else 0.5),
            turn=len(turns) - 1,
        )

    async def _generate(
        self, reply: Reply, live: Live, session: ChatSession, turns: Sequence[Turn]
    ) -> str | list[Violation]:
        """The model's whole reply, or why it must not be shown; asked again where it breaks off."""
        if live.notice:
            await self._keep(reply, live)
        for attempt in range(1, self._settings.max_attempts + 1):
            try:
                return await self._attempt(reply, live, session, turns)
            except Transient as error:
                log.warning("chat | %s: %s, attempt %d", session.model, error, attempt)
                if attempt == self._settings.max_attempts:
                    raise Permanent(str(error)) from None
                pause = max(error.retry_after_s, min(8.0, 0.5 * 2**attempt))
            live.content = ""
            await self._pause(reply, live, pause)
        raise AssertionError("unreachable")

    async def _attempt(
        self, reply: Reply, live: Live, session: ChatSession, turns: Sequence[Turn]
    ) -> str | list[Violation]:
        guard = SentenceGuard(self._settings.safety)
        pieces = self._upstream.reply(session.model, turns)
        beat = time.monotonic()
        following: asyncio.Task[str] | None = None
        stopped = asyncio.ensure_future(live.stop.wait())
        try:
            while True:
                following = following or asyncio.ensure_future(cast(Any, anext(pieces)))
                await asyncio.wait(
                    {following, stopped}, timeout=_HEARTBEAT_S,
                    return_when=asyncio.FIRST_COMPLETED,
                )  # fmt: skip
                if live.stop.is_set():
                    raise Stopped
                shown = ""
                if following.done():
                    done, following = following, None
                    try:
                        shown = guard.feed(done.result())
                    except StopAsyncIteration:
                        break
                if guard.blocked:
                    return guard.violations
                if shown or time.monotonic() - beat > _HEARTBEAT_S:
                    live.content += shown
                    await self._keep(reply, live)
                    beat = time.monotonic()
            shown = guard.finish()
            whole = live.content + shown
            # Once more over the whole: the guard reads a few sentences at a time.
            if guard.blocked or (violations := check_reply(whole, self._settings.safety)):
                return guard.violations or violations
            if not whole.strip():
                raise Transient("an empty reply")
            return whole
        finally:
            stopped.cancel()
            if following is not None:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
            await pieces.aclose()  # type: ignore[attr-defined]  # an async generator

    async def _pause(self, reply: Reply, live: Live, seconds: float) -> None:
        """Wait, keeping the lease; a stop ends it."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            await self._keep(reply, live)
            try:
                await asyncio.wait_for(live.stop.wait(), min(left, _HEARTBEAT_S))
            except TimeoutError:
                continue
            raise Stopped

    async def _keep(self, reply: Reply, live: Live) -> None:
        """Put what is written so far into the database, then show it."""
        stop = await self._patiently(lambda: self._store.progress(reply, live.content, live.notice))
        if stop is None:
            raise Lost
        live.tell()
        if stop:
            raise Stopped

    async def _finish(
        self, reply: Reply, live: Live, status: str, content: str, kind: str, risk: str
    ) -> str:
        await self._patiently(lambda: self._store.finish(reply, status, content, kind, risk))
        live.content = content
        return status

    async def _intervene(
        self,
        reply: Reply,
        session: ChatSession,
        stage: str,
        found: Assessment | list[Violation],
        history: list[dict[str, str]],
    ) -> None:
        """Log and keep what the check found; high risk calls the takeover webhook."""
        if isinstance(found, Assessment):
            record = intervention_record(found, history, self._settings.safety)
            call = found.level == "high" and self._settings.takeover.url is not None
        else:
            record = {"violations": [violation.rule for violation in found], "turns": len(history)}
            call = False
        record |= {"stage": stage, "model": session.model}
        log.warning("chat | safety %s | session %s | %s", stage, session.session_id, record)
        await self._patiently(lambda: self._store.intervened(reply, record, call))

    async def _patiently(self, call: Callable[[], Awaitable[Result]]) -> Result:
        """A call of the database, again and again through an outage."""
        until, pause = time.monotonic() + _OUTAGE_S, 0.2
        while True:
            try:
                return await call()
            except Unavailable:
                if time.monotonic() > until:
                    raise
            await asyncio.sleep(pause)
            pause = min(2.0, 2 * pause)


def dialogue(messages: Sequence[ChatMessage]) -> list[Turn]:
    """The turns of a chat, alternating: a reply that never came leaves two messages as one turn."""
    turns: list[Turn] = []
    for message in messages:
        if not message.content.strip():
            continue
        role: Any = message.role
        if turns and turns[-1].role == role:
            turns[-1] = Turn(role, f"{turns[-1].content}\n{message.content}")
        else:
            turns.append(Turn(role, message.content))
    return turns
