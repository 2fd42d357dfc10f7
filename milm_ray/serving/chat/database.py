"""The chat's database: SQLite in a file, or PostgreSQL by URL; brought up to date at start.

SQLite serves one node and is one file to back up; several nodes need PostgreSQL.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, closing, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from milm_ray.errors import UserError
from milm_ray.serve_settings import ChatSection

_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
_MIGRATION_LOCK = 0x6D696C6D  # any number that nobody else locks
_WRITES = "milm_writes"
_WAL_S = 60.0  # how long a start waits for others that set up the same new file
Calls = TypeVar("Calls")


class Unavailable(Exception):
    """The database does not answer at the moment; the same call may succeed later."""


def uninterrupted(calls: type[Calls]) -> type[Calls]:
    """A class whose calls of the database go on to their end where their caller is cancelled.

    A transaction that is cut off while it begins or ends may stay open in a connection that nobody
    has any more, and with it SQLite's one lock. The caller is cancelled all the same, afterwards.
    """
    for name, call in list(vars(calls).items()):
        if inspect.iscoroutinefunction(call) and not name.startswith("_"):
            setattr(calls, name, _to_its_end(call))
    return calls


def _to_its_end(call: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    @wraps(call)
    async def ended(*args: Any, **kwargs: Any) -> Any:
        task = asyncio.create_task(call(*args, **kwargs))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait({task})
            raise

    return ended


def database_url(settings: ChatSection, default: Path | None = None) -> URL:
    """Where the sessions are: the environment's URL, else the configured one, else `default`.

    Raises UserError where there is none or it is no URL of SQLite or PostgreSQL.
    """
    text = os.environ.get(settings.database_env) or settings.database
    if not text and default is not None:
        text = f"sqlite:///{default}"
    if not text:
        raise UserError(
            "the chat has no database",
            f"set chat.database, or {settings.database_env}, to sqlite:///PATH or "
            "postgresql://USER@HOST/NAME",
        )
    try:
        url = make_url(text)
    except exc.ArgumentError:
        url = URL.create("unknown")
    kind = url.get_backend_name()
    if kind not in _DRIVERS:
        # The text itself may hold a password.
        raise UserError(
            "the database's URL is not one of SQLite or PostgreSQL",
            "give sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME",
        )
    return url.set(drivername=_DRIVERS[kind])


class Database:
    """Transactions on the chat's tables. Every outage is raised as Unavailable."""

    def __init__(self, url: URL) -> None:
        self.url = url
        self._sqlite = url.get_backend_name() == "sqlite"
        self._engine = _sqlite(url) if self._sqlite else _postgresql(url)
        self._writing_engine = self._engine.execution_options(**{_WRITES: True})
        # SQLite lets one write at a time; waiting here is fairer than its own polling.
        self._writers = asyncio.Lock() if self._sqlite else nullcontext()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        async with _outages(), AsyncSession(self._engine, expire_on_commit=False) as session:
            yield session

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncSession]:
        """One transaction, committed at the end of the block."""
        async with (
            _outages(),
            self._writers,
            AsyncSession(self._writing_engine, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    async def migrate(self) -> None:
        """Bring the tables up to date. Replicas that start together wait for the first."""
        if self._sqlite and self.url.database:
            Path(self.url.database).parent.mkdir(parents=True, exist_ok=True)
            await asyncio.to_thread(_to_wal, self.url.database)
        async with _outages(), self._writing_engine.begin() as connection:
            if not self._sqlite:
                await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            await connection.run_sync(_upgrade)

    async def scrub(self) -> None:
        """After a deletion: SQLite's write-ahead log must not keep what the tables no longer do."""
        if self._sqlite:
            async with _outages(), self._writers, self._engine.connect() as connection:
                # Below SQLAlchemy, which would begin a transaction that no checkpoint can be in.
                driver: Any = (await connection.get_raw_connection()).driver_connection
                await driver.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    async def ping(self) -> None:
        async with self.read() as session:
            await session.execute(sa.select(1))

    async def close(self) -> None:
        await self._engine.dispose()


def _upgrade(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "milm_ray.serving.chat:migrations")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


@asynccontextmanager
async def _outages() -> AsyncIterator[None]:
    try:
        yield
    except (exc.IntegrityError, exc.DataError, exc.ProgrammingError):
        raise
    except (exc.DBAPIError, exc.TimeoutError, OSError, TimeoutError) as error:
        raise Unavailable(type(error).__name__) from error
    except Exception as error:
        # The driver's own errors pass SQLAlchemy by while it connects.
        if type(error).__module__.partition(".")[0] == "asyncpg":
            raise Unavailable(type(error).__name__) from error
        raise


def _postgresql(url: URL) -> AsyncEngine:
    return create_async_engine(
        url,
        pool_size=10,
        max_overflow=20,
        pool_timeout=10,
        pool_pre_ping=True,
        hide_parameters=True,  # they are people's words, and errors are logged
        connect_args={"timeout": 10, "command_timeout": 20},
    )


def _to_wal(path: str) -> None:
    """Set the file's journal, which stays so, before many connections do it at once.

    SQLite waits for nobody here, whatever its busy_timeout: who meets another's lock is refused.
    Whatever else is wrong with the file, the engine's first connection says.
    """
    until = time.monotonic() + _WAL_S
    while time.monotonic() < until:
        try:
            with closing(sqlite3.connect(path, timeout=0)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                return
        time.sleep(0.05)


def _sqlite(url: URL) -> AsyncEngine:
    engine = create_async_engine(
        url, pool_size=8, max_overflow=8, pool_timeout=10, hide_parameters=True
    )

    @event.listens_for(engine.sync_engine, "connect")
    def connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions begin below, not where sqlite3 thinks
        cursor = connection.cursor()
        for pragma in (
            "journal_mode=WAL",  # readers do not wait for the writer
            "synchronous=FULL",  # what was acknowledged survives a power cut
            "busy_timeout=10000",
            "foreign_keys=ON",
            "secure_delete=ON",  # a deleted session's text is overwritten
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begun(connection: Connection) -> None:
        # A write that begins as a read may find that it can no longer become one.
        writes = connection.get_execution_options().get(_WRITES)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine
