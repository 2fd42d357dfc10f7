"""An index of the replies that are being written."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    pending = sa.text("status = 'pending'")
    op.create_index(
        "ix_chat_messages_pending",
        "chat_messages",
        ["session_id"],
        sqlite_where=pending,
        postgresql_where=pending,
    )
