"""The chat's tables. Times are UTC seconds since 1970; a change here needs a migration."""

from __future__ import annotations

from sqlalchemy import (
    Boolean,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# Named constraints: a later migration can address them on every database.
_NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}
# Word for word as in a query that is to use the index of these: it has no parameter.
PENDING = "status = 'pending'"


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=_NAMES)


class ChatSession(Base):
    """A chat of one person with one model. person: digest of the secret that the browser keeps."""

    __tablename__ = "chat_sessions"

    session_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    person: Mapped[str] = mapped_column(String(64), index=True)
    participant: Mapped[str] = mapped_column(String(64), index=True)
    model: Mapped[str] = mapped_column(String(256))
    blind: Mapped[bool] = mapped_column(Boolean)
    seed: Mapped[int | None] = mapped_column(Integer)
    topic: Mapped[str] = mapped_column(String(64))
    motivation: Mapped[str] = mapped_column(String(16))
    language: Mapped[str] = mapped_column(String(8))
    risk: Mapped[str] = mapped_column(String(16))  # none | medium | high, the highest so far
    end_reason: Mapped[str] = mapped_column(String(16))  # "" while open
    rating: Mapped[int | None] = mapped_column(Integer)
    comment: Mapped[str] = mapped_column(Text)
    started_at: Mapped[float] = mapped_column(Double)
    ended_at: Mapped[float | None] = mapped_column(Double)


class ChatMessage(Base):
    """A client's message, or the reply to it, which has the same message_id.

    A reply that is being written (status pending) belongs to a replica for as long as its lease
    lasts; whoever finds it expired may take it over, and begins it anew as the next attempt.
    """

    __tablename__ = "chat_messages"
    __table_args__ = (
        UniqueConstraint("session_id", "message_id", "role"),
        # Of the few that are being written, to find those whose replica has gone.
        Index(
            "ix_chat_messages_pending",
            "session_id",
            sqlite_where=text(PENDING),
            postgresql_where=text(PENDING),
        ),
    )

    session_id: Mapped[str] = mapped_column(
        ForeignKey("chat_sessions.session_id", ondelete="CASCADE"), primary_key=True
    )
    position: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    message_id: Mapped[str] = mapped_column(String(64))
    role: Mapped[str] = mapped_column(String(16))  # client | counselor
    content: Mapped[str] = mapped_column(Text)
    notice: Mapped[str] = mapped_column(Text)  # help lines shown beside the reply
    kind: Mapped[str] = mapped_column(String(16))  # client | model | preset
    status: Mapped[str] = mapped_column(String(16))  # pending | done | stopped | failed
    stop: Mapped[bool] = mapped_column(Boolean)  # the client asked to stop it
    attempt: Mapped[int] = mapped_column(Integer)
    owner: Mapped[str] = mapped_column(String(64))
    lease_until: Mapped[float] = mapped_column(Double)
    created_at: Mapped[float] = mapped_column(Double)
    finished_at: Mapped[float | None] = mapped_column(Double)


class Intervention(Base):
    """What the safety check did, without the text unless the configuration says so.

    hook: state of the call to the takeover webhook: none | pending | sent | failed.
    """

    __tablename__ = "chat_interventions"
    __table_args__ = (Index("ix_chat_interventions_due", "hook", "due_at"),)

    intervention_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    session_id: Mapped[str] = mapped_column(
        ForeignKey("chat_sessions.session_id", ondelete="CASCADE"), index=True
    )
    at: Mapped[float] = mapped_column(Double)
    record: Mapped[str] = mapped_column(Text)  # JSON
    hook: Mapped[str] = mapped_column(String(16))
    attempts: Mapped[int] = mapped_column(Integer)
    due_at: Mapped[float] = mapped_column(Double)


class Counter(Base):
    """Counts that a deletion must not turn back, as the number of assigned sessions."""

    __tablename__ = "chat_counters"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[int] = mapped_column(Integer)
