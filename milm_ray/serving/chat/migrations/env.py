"""Run by alembic: applies the migrations over the connection that it was handed."""

from alembic import context

from milm_ray.serving.chat.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite cannot alter a table in place
    transaction_per_migration=False,
)
context.run_migrations()
