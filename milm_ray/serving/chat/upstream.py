"""The model behind the chat: any OpenAI-compatible server, the product's own endpoints by default.

By HTTP and not by a Serve handle: a request finds the endpoints again after any part of them has
been replaced, and they may as well run elsewhere.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import openai

from milm_ray.models.messages import dialogue_messages
from milm_ray.prompts import load
from milm_ray.schema import Turn
from milm_ray.serve_settings import ChatSection
from milm_ray.serving.errors import CONTEXT_LENGTH
from milm_ray.serving.safety import CATEGORIES, Category, Level

_LISTED_FOR_S = 10.0
_OPINION_TURNS = 12
_WHO = {"client": "来访者", "counselor": "咨询师"}


class Transient(Exception):
    """The model gave no whole reply, and may give one when asked again."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class Permanent(Exception):
    """The model will not answer this, however often it is asked."""


class Upstream:
    def __init__(self, settings: ChatSection) -> None:
        self._settings = settings
        self._client = openai.AsyncOpenAI(
            base_url=settings.models_url,
            api_key=os.environ.get(settings.models_key_env) or "none",
            timeout=settings.reply_timeout_s,
            max_retries=0,
        )
        self._listed: tuple[float, list[str]] = (float("-inf"), [])

    async def close(self) -> None:
        await self._client.close()

    async def models(self) -> list[str]:
        """The ids that can be chatted with now: the configured ones that are served."""
        at, ids = self._listed
        if time.monotonic() - at > _LISTED_FOR_S:
            try:
                served = [model.id async for model in self._client.models.list(timeout=10)]
            except openai.OpenAIError as error:
                if not ids:
                    raise Transient(type(error).__name__) from None
                served = ids  # better an old list than none
            wanted = self._settings.models
            ids = [model for model in wanted if model in served] if wanted else served
            self._listed = (time.monotonic(), ids)
        return ids

    async def reply(self, model: str, turns: Sequence[Turn]) -> AsyncIterator[str]:
        """The model's reply to a dialogue that ends with the client, piece by piece.

        Where the dialogue is too long for the model, its oldest rounds are left out; the client's
        newest words never are. Raises Transient or Permanent.
        """
        kept = list(turns)
        while True:
            try:
                stream = await self._ask(model, dialogue_messages(kept))
                break
            except openai.BadRequestError as error:
                if error.code != CONTEXT_LENGTH or len(kept) <= 2:
                    raise Permanent(type(error).__name__) from None
                # An even number of turns, so that the client's come first again.
                kept = kept[max(2, len(kept) // 4 // 2 * 2) :]
        finished, half = False, ""
        try:
            async for chunk in stream:
                for choice in chunk.choices:
                    finished = finished or choice.finish_reason is not None
                    text, half = _characters(half + (choice.delta.content or ""))
                    if text:
                        yield text
        except (openai.OpenAIError, OSError) as error:
            raise Transient(type(error).__name__) from None
        except Exception as error:
            # The HTTP library's own errors come through where a stream breaks off.
            if type(error).__module__.startswith(("httpx", "httpcore", "json")):
                raise Transient(type(error).__name__) from None
            raise
        finally:
            await stream.close()
        if not finished:
            raise Transient("the stream broke off")

    async def opinion(self, model: str, turns: Sequence[Turn]) -> tuple[Level, Category] | None:
        """What a language model makes of the risk in a dialogue; None where it makes no sense.

        Raises Transient or Permanent as `reply` does.
        """
        said = "\n".join(f"{_WHO[turn.role]}：{turn.content}" for turn in turns[-_OPINION_TURNS:])
        question = [Turn("client", f"{load('risk.zh.md').text}\n{said}")]
        stream = await self._ask(model, dialogue_messages(question, ""), max_tokens=16)
        answer = ""
        async with stream:
            async for chunk in stream:
                answer += "".join(choice.delta.content or "" for choice in chunk.choices)
        words = re.findall(r"[a-z_]+", answer.lower())
        level: Any = next((word for word in words if word in ("none", "medium", "high")), None)
        category: Any = next((word for word in words if word in CATEGORIES), "suicide")
        return None if level is None else (level, category)

    async def _ask(self, model: str, messages: Any, max_tokens: int | None = None) -> Any:
        """The stream of a reply; with max_tokens a short and greedy one."""
        settings = self._settings
        try:
            return await self._client.chat.completions.create(
                model=model,
                messages=messages,
                stream=True,
                max_tokens=max_tokens or settings.max_tokens,
                temperature=0.0 if max_tokens else settings.temperature,
                top_p=1.0 if max_tokens else settings.top_p,
            )
        except openai.BadRequestError:
            raise
        except openai.APIStatusError as error:
            # A 404 that is not the endpoints' own comes from a proxy that does not know them yet.
            unknown_path = error.status_code == 404 and not isinstance(error.body, dict)
            if error.status_code in (408, 425, 429) or error.status_code >= 500 or unknown_path:
                raise Transient(type(error).__name__, _retry_after(error)) from None
            raise Permanent(f"{type(error).__name__} {error.status_code}") from None
        except openai.OpenAIError as error:
            raise Transient(type(error).__name__) from None


def _characters(text: str) -> tuple[str, str]:
    """`text` as what a database can hold, and a half of a surrogate pair that may find its other.

    Servers that cut a reply into pieces of UTF-16 cut an emoji in two.
    """
    half = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
    whole = text.removesuffix(half).replace("\0", "")
    return whole.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), half


def _retry_after(error: openai.APIStatusError) -> float:
    try:
        return min(30.0, max(0.0, float(error.response.headers.get("retry-after", 0))))
    except ValueError:
        return 0.0
