"""What the chat's API takes and gives; whatever else is in a request is refused."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from milm_ray.schema import Motivation
from milm_ray.serving.chat.tables import ChatMessage, ChatSession

Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{8,64}$")]
_CONTROL = {chr(code) for code in (*range(32), 127)} - {"\n", "\t", "\r"}


def _plain(text: str) -> str:
    """No control characters: a NUL, for one, is no text to PostgreSQL."""
    if _CONTROL.intersection(text):
        raise ValueError("control characters are not text")
    return text


Text = Annotated[str, AfterValidator(_plain)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewSession(Body):
    """model, topic, motivation: None to have it assigned; in a study all three are."""

    session_id: Id
    participant: str = Field("", pattern=r"^[A-Za-z0-9._-]{0,64}$", description="the study's code")
    language: Literal["zh", "en"] = "zh"
    model: str | None = Field(None, min_length=1, max_length=256)
    topic: (
        Literal["weight_and_diet", "phone_use", "insomnia", "exercise", "advance_consumption"]
        | None
    ) = None
    motivation: Motivation | None = None


class NewMessage(Body):
    message_id: Id
    content: Text = Field(min_length=1, max_length=20_000)


class Rating(Body):
    rating: int = Field(ge=1, le=5, strict=True)
    comment: Text = Field("", max_length=2000)


def session_view(session: ChatSession, messages: list[ChatMessage] | None = None) -> dict[str, Any]:
    """A session as its person may see it: without the model's name where it is hidden."""
    view: dict[str, Any] = {
        "session_id": session.session_id,
        "model": None if session.blind else session.model,
        "blind": session.blind,
        "topic": session.topic,
        "motivation": session.motivation,
        "language": session.language,
        "risk": session.risk,
        "end_reason": session.end_reason,
        "rating": session.rating,
        "comment": session.comment,
        "started_at": _time(session.started_at),
        "ended_at": _time(session.ended_at),
    }
    if messages is not None:
        view["messages"] = [
            {
                "message_id": message.message_id,
                "role": message.role,
                "content": message.content,
                "notice": message.notice,
                "kind": message.kind,
                "status": message.status,
                "at": _time(message.created_at),
            }
            for message in messages
        ]
    return view


def _time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
