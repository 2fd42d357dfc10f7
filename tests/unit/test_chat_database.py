"""The chat's SQLite file: who starts or is cut off at a bad moment holds up nobody."""

from __future__ import annotations

import asyncio
import sqlite3
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import aiosqlite
import pytest
import sqlalchemy as sa

from milm_ray.serve_settings import ChatSection
from milm_ray.serving.chat import database
from milm_ray.serving.chat.replies import Replies
from milm_ray.serving.chat.store import Store
from milm_ray.serving.chat.tables import ChatSession


def opened(file: Path) -> database.Database:
    return database.Database(database.database_url(ChatSection(database=f"sqlite:///{file}")))


def test_a_new_file_that_another_replica_is_just_setting_up_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "chat.sqlite3"

    async def start() -> None:
        replica = opened(file)
        await replica.migrate()
        await replica.close()

    with closing(sqlite3.connect(file, check_same_thread=False)) as other:
        other.execute("CREATE TABLE theirs (a)")
        other.execute("BEGIN IMMEDIATE")
        waiting = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: other.rollback())
        monkeypatch.setattr(database, "time", waiting, raising=False)
        asyncio.run(start())


@pytest.mark.parametrize("moment", range(1, 10))
def test_a_call_that_is_cut_off_leaves_no_lock_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    file, under_way = tmp_path / "chat.sqlite3", aiosqlite.Connection._execute

    async def cut_off() -> None:
        async def executed(self: aiosqlite.Connection, *call: object, **options: object) -> object:
            nonlocal done
            done += 1
            if done == moment:
                writing.cancel()
            return await under_way(self, *call, **options)

        done = 0
        replica = opened(file)
        await replica.migrate()
        store = Store(replica, "replica", max_rounds=9)
        await store.next_number("calls")
        monkeypatch.setattr(aiosqlite.Connection, "_execute", executed)
        writing = asyncio.create_task(store.next_number("calls"))
        await asyncio.gather(writing, return_exceptions=True)
        with closing(sqlite3.connect(file, timeout=0)) as probe:
            probe.execute("BEGIN IMMEDIATE")
        await replica.close()

    asyncio.run(cut_off())


def test_an_error_does_not_say_what_people_wrote(tmp_path: Path) -> None:
    words = "-".join(["mine"] * 3)

    async def fail() -> None:
        replica = opened(tmp_path / "chat.sqlite3")
        try:
            async with replica.write() as transaction:
                await transaction.execute(sa.text("INSERT INTO absent VALUES (:a)"), {"a": words})
        finally:
            await replica.close()

    with pytest.raises(Exception, match=r".") as error:
        asyncio.run(fail())
    logged = "".join(traceback.format_exception(error.value))
    assert "INSERT INTO absent" in logged
    assert words not in logged


def test_a_file_that_is_no_database_is_an_outage(tmp_path: Path) -> None:
    (tmp_path / "chat.sqlite3").write_bytes(b"not a database, " * 512)

    async def start() -> None:
        replica = opened(tmp_path / "chat.sqlite3")
        try:
            await replica.migrate()
        finally:
            await replica.close()

    with pytest.raises(database.Unavailable):
        asyncio.run(start())


def test_a_reply_that_cannot_be_written_is_not_begun_for_ever(tmp_path: Path) -> None:
    class Broken:
        async def reply(self, *_: object) -> AsyncIterator[str]:
            raise ZeroDivisionError
            yield ""

    async def chat() -> str:
        replica = opened(tmp_path / "chat.sqlite3")
        await replica.migrate()
        store = Store(replica, "replica", max_rounds=9)
        session = dict.fromkeys(("participant", "topic", "motivation", "end_reason", "comment"), "")
        await store.create(
            ChatSession(
                session_id="s", person="p", model="m", blind=False, language="zh", risk="none",
                started_at=0.0, **session,
            ),
            max_per_person=1,
        )  # fmt: skip
        reply = await store.send("s", "p", "m1", "你好")
        assert reply is not None
        replies = Replies(ChatSection(), store, Broken())
        replies.start(reply)
        message = await store.message("s", 1)
        while message is not None and message.status == "pending":
            await asyncio.sleep(0.01)
            message = await store.message("s", 1)
        await replica.close()
        assert message is not None
        return message.status

    assert asyncio.run(chat()) == "failed"
