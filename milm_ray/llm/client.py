"""The one LLM client: ask an OpenAI-compatible server, keep the reply, never ask twice.

What a server does wrong ends in one of three ways: it is tried again (408, 409, 429, 5xx, dropped
connections), it costs one row (`Rejected`), or it stops the job with a cause and a fix
(`UserError`: wrong key, wrong model, no credit). The key is read from the environment and is
removed from every message.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milm_ray.config import LLMSection
from milm_ray.errors import UserError
from milm_ray.llm.limits import Gate, Limits
from milm_ray.llm.prices import cost_of, price_of
from milm_ray.llm.replies import Reply, Request, Subject, request_key, storable
from milm_ray.llm.reply_store import ReplyStore
from milm_ray.llm.tokens import estimate_tokens

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_RETRIED = {408, 409, 425, 429}
_LONGEST_PAUSE_S = 60.0
# So many 400s before any reply may be wrong settings and not wrong rows; the probe tells.
_BAD_REQUESTS_BEFORE_PROBE = 3
_PROBE = Request([{"role": "user", "content": "你好"}], subject=Subject(prompt="probe"))
_KEY_LIKE = re.compile(r"\b(sk|key|Bearer)[-_ ][\w*.-]{6,}", re.IGNORECASE)


class Rejected(Exception):
    """This row gets no reply: the server refused it for good, or every attempt failed."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


class BudgetReached(Exception):
    """`max_cost` does not allow another call."""


class LLMClient:
    """Replies to requests, from the store where it has them, else from the server.

    One client serves any number of concurrent `complete` calls of one event loop.
    """

    def __init__(self, settings: LLMSection, store: ReplyStore, gate: Gate | None = None) -> None:
        """gate: limits shared with other processes; None: this client's own."""
        self.settings = settings
        self.store = store
        self._gate = gate or Limits(settings)
        self._price = price_of(settings)
        self._server: AsyncOpenAI | None = None
        self._format = 0 if settings.structured_output else 2  # see _response_format
        self._format_works = False  # whether a request of that format has been answered
        self._length_name = "max_tokens"
        self._bad_requests = 0
        self._last_answer = float("-inf")  # on the monotonic clock
        self._pending: list[tuple[Reply, asyncio.Future[None]]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._asking: dict[str, asyncio.Task[Reply]] = {}

    def recall(self, request: Request) -> Reply | None:
        """The reply that the store holds for a request, or None."""
        return self.store.get(request_key(self.settings, request), request.subject)

    async def complete(self, request: Request) -> Reply:
        """The reply to a request; stored before it is returned.

        Raises Rejected (this row has none), BudgetReached, or UserError (nothing more can be asked:
        wrong key, wrong model, unwritable store; or a miss while offline).
        """
        key = request_key(self.settings, request)
        known = self.store.get(key, request.subject)
        if known is not None:
            return known
        if self.settings.offline:
            raise not_recorded(self.settings, request)
        return await self._ask_once(key, request)

    async def _ask_once(self, key: str, request: Request) -> Reply:
        """Ask; who wants the same meanwhile gets the same reply."""
        asking = self._asking.get(key)
        if asking is None:
            asking = asyncio.ensure_future(self._ask_and_keep(key, request))
            self._asking[key] = asking
            asking.add_done_callback(lambda _: self._asked(key))
        return await asyncio.shield(asking)

    def _asked(self, key: str) -> None:
        self._asking.pop(key, None)
        if not self._asking:
            self.store.release()

    async def _ask_and_keep(self, key: str, request: Request) -> Reply:
        try:
            reply = await self._ask(key, request)
        except _BadRequest as error:
            if request is _PROBE:
                raise self._refused(error.status, error.text) from None
            self._bad_requests += 1
            if self._last_answer < 0 and self._bad_requests >= _BAD_REQUESTS_BEFORE_PROBE:
                await self._probe()
            raise Rejected("bad_request", f"HTTP {error.status}: {error.text}") from None
        await self._keep(reply)
        return reply

    async def _probe(self) -> None:
        """Ask something harmless with the same settings; UserError where that fails too.

        A server may refuse, or break on, what some rows are about, and those may be the first, or
        the only ones left. Its reply is kept as every reply is; no row has it.
        """
        with contextlib.suppress(Rejected):
            await self._ask_once(request_key(self.settings, _PROBE), _PROBE)

    async def _ask(self, key: str, request: Request) -> Reply:
        """Call until the server answers or the attempts are used up."""
        prompt_tokens = sum(estimate_tokens(message["content"]) for message in request.messages)
        ceiling = cost_of(self._price, prompt_tokens, self.settings.max_tokens) or 0.0
        failure, halfway = "", 0.0
        for attempt in range(1, self.settings.max_attempts + 1):
            self.store.prepare()
            lease = await self._gate.acquire(prompt_tokens + self.settings.max_tokens, ceiling)
            if lease is None:
                raise BudgetReached
            used, cost = None, None
            started = time.monotonic()
            if attempt == self.settings.max_attempts // 2 + 1:
                halfway = started
            try:
                completion = await self._call(request)
                reply = self._reply(key, request, completion, attempt, time.monotonic() - started)
                if reply.prompt_tokens is not None and reply.completion_tokens is not None:
                    used = reply.prompt_tokens + reply.completion_tokens
                cost = reply.cost
                self._last_answer = time.monotonic()
                return reply
            except Exception as error:
                failure, pause = self._judge(error)
            finally:
                await self._gate.release(lease, used, cost)
            if attempt < self.settings.max_attempts:
                backoff = min(_LONGEST_PAUSE_S, 0.5 * 2 ** (attempt - 1))
                await asyncio.sleep(pause + random.uniform(0.25, 1.0) * backoff)
        if self._last_answer < halfway and request is not _PROBE:
            # Nobody got an answer while this row was tried again: perhaps nobody else asked.
            await self._probe()
        elif self._last_answer < halfway:
            raise UserError(
                f"{self._where()} does not answer ({self.settings.max_attempts} attempts; "
                f"the last: {failure})",
                "check base_url and the server, then run the same command again; "
                "replies received so far are kept",
            )
        raise Rejected("no_reply", f"{self.settings.max_attempts} attempts; the last: {failure}")

    async def _call(self, request: Request) -> Any:
        """One HTTP call; falls back to plainer requests where the server lacks a feature."""
        import openai

        shape = self._format
        while True:
            shape = max(shape, self._format)  # another call may have stepped down in the meantime
            options: dict[str, Any] = {self._length_name: self.settings.max_tokens}
            if self.settings.seed is not None:
                options["seed"] = self.settings.seed
            if self.settings.top_k is not None:
                options["top_k"] = self.settings.top_k
            names = self._length_name
            if request.schema is not None and shape < 2:
                options["response_format"] = _response_format(shape, request.schema)
            try:
                # As chat.completions.create does, but for its walk over every message by its type,
                # which costs as much as the rest of the call.
                completion = await self._connect().post(
                    "/chat/completions",
                    cast_to=openai.types.chat.ChatCompletion,
                    body={
                        "model": self.settings.model,
                        "messages": [dict(message) for message in request.messages],
                        "temperature": self.settings.temperature,
                        "top_p": self.settings.top_p,
                        **options,
                    },
                )
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                text = str(error)
                if "max_completion_tokens" in text and names == "max_tokens":
                    self._length_name = "max_completion_tokens"
                elif "response_format" in options and (
                    shape < self._format or not self._format_works
                ):
                    shape += 1  # for this call: it may be the row that the server will not have
                else:
                    raise
                continue
            if request.schema is not None and not self._format_works:
                self._format, self._format_works = shape, True
            return completion

    def _reply(
        self, key: str, request: Request, completion: Any, attempt: int, latency_s: float
    ) -> Reply:
        try:
            choice = completion.choices[0]
            message = choice.message
            text, refusal = message.content or "", getattr(message, "refusal", None)
            usage = completion.usage
            prompt_tokens = usage.prompt_tokens if usage else None
            completion_tokens = usage.completion_tokens if usage else None
        except (AttributeError, IndexError, TypeError) as error:
            raise _Malformed(f"the server's answer is not a chat completion ({error})") from error
        return Reply(
            key=key,
            text=storable(refusal or text),
            finish_reason="refusal" if refusal else choice.finish_reason or "stop",
            model=completion.model or self.settings.model,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            cost=cost_of(self._price, prompt_tokens, completion_tokens),
            latency_s=round(latency_s, 3),
            attempts=attempt,
            time=round(time.time(), 3),
            subject=request.subject,
        )

    def _judge(self, error: Exception) -> tuple[str, float]:
        """A failed call: returns what happened and the seconds to wait, or raises for good."""
        import openai

        text = self._clean(str(error))
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            if status in _RETRIED or status >= 500:
                return f"HTTP {status}: {text}", _retry_after(error.response.headers)
            if status in (401, 402, 403, 404):
                raise self._refused(status, text) from None
            raise _BadRequest(status, text) from None
        # Dropped and refused connections, timeouts, bodies that are not what the header promised.
        if isinstance(error, openai.APIError | _Malformed | ValueError):
            return f"{type(error).__name__}: {text}", 0.0
        raise error

    def _refused(self, status: int, text: str) -> UserError:
        fixes = {
            401: f"set {self.settings.api_key_env} to a valid key for {self._where()}",
            402: f"add credit to the account at {self._where()} and run the same command again",
            403: f"the key in {self.settings.api_key_env} may not use {self.settings.model}: "
            "choose another model or key",
            404: f"check the model name {self.settings.model!r} and the base URL {self._where()}",
        }
        fix = fixes.get(status, "check model, sampling and max_tokens in the configuration")
        return UserError(
            f"{self._where()} refused the request (HTTP {status}): {text}",
            f"{fix}; replies received so far are kept",
        )

    def _where(self) -> str:
        configured = self.settings.base_url or os.environ.get("OPENAI_BASE_URL")
        return re.sub(r"//[^/@]*@", "//", configured or "api.openai.com")

    def _clean(self, text: str) -> str:
        """A server's message without the key and without line breaks."""
        if self.settings.api_key_env and (key := find_key(self.settings)):
            text = text.replace(key, "[key]")
        return " ".join(_KEY_LIKE.sub("[key]", text).split())[:300]

    def _connect(self) -> AsyncOpenAI:
        if self._server is None:
            import openai

            key = find_key(self.settings)
            if not key:
                name = self.settings.api_key_env
                raise UserError(
                    f"the environment variable {name} is not set",
                    f"export your API key in it, or in {name}_FILE the path of a file that holds "
                    "it; api_key_env='' is for a server without keys",
                )
            self._server = openai.AsyncOpenAI(
                api_key=key,
                base_url=self.settings.base_url,
                timeout=self.settings.timeout_s,
                max_retries=0,  # retried here, under the shared limits
            )
        return self._server

    async def _keep(self, reply: Reply) -> None:
        """Store a reply; replies that arrive while one is being written share the next write."""
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending.append((reply, stored))
        if self._flushing is None:
            self._flushing = asyncio.ensure_future(self._flush())
        await stored

    async def _flush(self) -> None:
        while self._pending:
            batch, self._pending = self._pending, []
            try:
                await asyncio.to_thread(self.store.put, [reply for reply, _ in batch])
            except Exception as error:
                for _, stored in batch:
                    stored.set_exception(error)
            else:
                for _, stored in batch:
                    stored.set_result(None)
        self._flushing = None


def find_key(settings: LLMSection) -> str | None:
    """The endpoint's key: the variable's value, else the content of the file that <variable>_FILE
    names (a submitted job's command line is public, a file on the head node is not)."""
    name = settings.api_key_env
    if not name:
        return "none"
    if value := os.environ.get(name):
        return value
    file = os.environ.get(f"{name}_FILE")
    if not file:
        return None
    try:
        return Path(file).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{name}_FILE: {file} cannot be read: {type(error).__name__}",
            "name a text file on the node that runs the job's driver, readable by its user",
        ) from None


class _BadRequest(Exception):
    """Refused, by a row's fault or by that of the settings."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        self.text = text
        super().__init__(f"HTTP {status}: {text}")


class _Malformed(Exception):
    """An answer with status 200 that is not a chat completion."""


def not_recorded(settings: LLMSection, request: Request, missing: int = 1) -> UserError:
    """The error for a reply that is needed, not in any store, and may not be asked for."""
    more = f" (and {missing - 1:,} more)" if missing > 1 else ""
    return UserError(
        f"no recorded reply to {request.subject}{more}, and the LLM is offline",
        f"name a reply store that holds it under `recorded:` (now: {settings.recorded or 'none'}), "
        "choose `pool: recorded` to use only dialogues with a reply, or set `offline: false`",
    )


def _response_format(level: int, schema: Mapping[str, Any]) -> dict[str, Any]:
    """0: by JSON schema; 1: any JSON object; 2 (nothing to send): the prompt alone asks for it."""
    if level == 1:
        return {"type": "json_object"}
    return {
        "type": "json_schema",
        "json_schema": {"name": "reply", "strict": True, "schema": dict(schema)},
    }


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds a server asks to wait (Retry-After in seconds or as a date, retry-after-ms)."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers.get("retry-after")
        if value is None:
            return 0.0
        try:
            return max(0.0, float(value))
        except ValueError:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
