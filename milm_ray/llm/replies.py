"""What is asked of an LLM, what came back, and the key that binds the two."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from milm_ray.config import LLMSection

Message = Mapping[str, str]


@dataclass(frozen=True)
class Subject:
    """What a request is about: for messages to people, and to find a recorded reply by name."""

    corpus: str = ""
    source_id: str = ""
    prompt: str = ""

    def __str__(self) -> str:
        return f"{self.prompt or 'a prompt'} on {self.corpus or 'a row'}/{self.source_id}"


@dataclass(frozen=True)
class Request:
    """One question to an LLM.

    messages: chat messages with role and content; schema: the JSON schema the reply must fit, if
    any; version: what the model's name alone does not say about who answers (an adapter's digest).
    """

    messages: Sequence[Message]
    schema: Mapping[str, Any] | None = None
    subject: Subject = Subject()
    version: str = ""


@dataclass(frozen=True)
class Reply:
    """What came back, as it came. Tokens and cost are None where the server did not say.

    finish_reason: stop, length, content_filter, refusal or recorded; cost in USD; latency_s of the
    attempt that succeeded; attempts: calls made for it, failed ones included; time: Unix seconds.
    """

    key: str
    text: str
    finish_reason: str = "stop"
    model: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost: float | None = None
    latency_s: float | None = None
    attempts: int = 1
    time: float = 0.0
    subject: Subject = field(default=Subject(), compare=False)

    def line(self) -> bytes:
        """The reply as one line of a store; the key comes first, so that an index needs no JSON."""
        return (json.dumps(asdict(self), ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_line(cls, line: bytes) -> Reply:
        """Read a stored line; ValueError or TypeError when it is not one."""
        data = json.loads(line)
        return cls(**{**data, "subject": Subject(**data.get("subject", {}))})


def sampling(settings: LLMSection) -> dict[str, Any]:
    """The settings that shape a reply."""
    found = settings.model_dump(include={"temperature", "top_p", "max_tokens", "seed"})
    return found if settings.top_k is None else {**found, "top_k": settings.top_k}


def request_key(settings: LLMSection, request: Request) -> str:
    """sha256 over everything that shapes the reply: model, messages, schema, sampling, version."""
    canonical = json.dumps(
        [
            settings.model,
            [dict(message) for message in request.messages],
            request.schema,
            sampling(settings),
            request.version,
        ],
        ensure_ascii=False,
        sort_keys=True,
        separators=(",", ":"),
    )
    return hashlib.sha256(canonical.encode()).hexdigest()


def storable(text: str) -> str:
    """A server's text; half of a surrogate pair, which no file can hold, as its escape.

    In JSON the escape means the same.
    """
    return text.encode("utf-8", "backslashreplace").decode()


def json_object(text: str) -> dict[str, Any]:
    """The JSON object in a reply, without code fences or a reasoning block around it.

    Raises ValueError with what is wrong; nothing is guessed or repaired here.
    """
    text = re.sub(r"^\s*<think>.*?</think>", "", text, flags=re.DOTALL).strip()
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?\s*```", text, flags=re.DOTALL)
    value = json.loads(fenced.group(1) if fenced else text)
    if "\\u" in text:
        _check_surrogates(value)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def _check_surrogates(value: Any) -> None:
    """ValueError for half of a surrogate pair, which JSON may escape and no file can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ValueError(f"{half} is half of a surrogate pair, no character") from None
