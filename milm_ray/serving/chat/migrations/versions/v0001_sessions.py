"""Sessions, their messages, interventions of the safety check, counters."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "chat_sessions",
        sa.Column("session_id", sa.String(64), nullable=False),
        sa.Column("person", sa.String(64), nullable=False),
        sa.Column("participant", sa.String(64), nullable=False),
        sa.Column("model", sa.String(256), nullable=False),
        sa.Column("blind", sa.Boolean, nullable=False),
        sa.Column("seed", sa.Integer),
        sa.Column("topic", sa.String(64), nullable=False),
        sa.Column("motivation", sa.String(16), nullable=False),
        sa.Column("language", sa.String(8), nullable=False),
        sa.Column("risk", sa.String(16), nullable=False),
        sa.Column("end_reason", sa.String(16), nullable=False),
        sa.Column("rating", sa.Integer),
        sa.Column("comment", sa.Text, nullable=False),
        sa.Column("started_at", sa.Double, nullable=False),
        sa.Column("ended_at", sa.Double),
        sa.PrimaryKeyConstraint("session_id", name="pk_chat_sessions"),
    )
    op.create_index("ix_chat_sessions_person", "chat_sessions", ["person"])
    op.create_index("ix_chat_sessions_participant", "chat_sessions", ["participant"])
    op.create_table(
        "chat_messages",
        sa.Column("session_id", sa.String(64), nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("message_id", sa.String(64), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("content", sa.Text, nullable=False),
        sa.Column("notice", sa.Text, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("stop", sa.Boolean, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("lease_until", sa.Double, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("finished_at", sa.Double),
        sa.PrimaryKeyConstraint("session_id", "position", name="pk_chat_messages"),
        sa.UniqueConstraint(
            "session_id", "message_id", "role", name="uq_chat_messages_session_id_message_id_role"
        ),
        sa.ForeignKeyConstraint(
            ["session_id"],
            ["chat_sessions.session_id"],
            ondelete="CASCADE",
            name="fk_chat_messages_session_id_chat_sessions",
        ),
    )
    op.create_table(
        "chat_interventions",
        sa.Column("intervention_id", sa.String(64), nullable=False),
        sa.Column("session_id", sa.String(64), nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("record", sa.Text, nullable=False),
        sa.Column("hook", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("due_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("intervention_id", name="pk_chat_interventions"),
        sa.ForeignKeyConstraint(
            ["session_id"],
            ["chat_sessions.session_id"],
            ondelete="CASCADE",
            name="fk_chat_interventions_session_id_chat_sessions",
        ),
    )
    op.create_index("ix_chat_interventions_session_id", "chat_interventions", ["session_id"])
    op.create_index("ix_chat_interventions_due", "chat_interventions", ["hook", "due_at"])
    op.create_table(
        "chat_counters",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("value", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_chat_counters"),
    )
