"""The chat's API over real databases, with a model in another process and replicas that die."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import sqlite3
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from milm_ray.models.messages import INSTRUCTION
from milm_ray.serve_settings import ChatSection
from milm_ray.serving.chat.database import Database, database_url
from milm_ray.serving.chat.store import Store
from milm_ray.serving.chat.tables import Base
from tests.serving.chat_model import ASKED, DRUG, SAID, SLOW
from tests.serving.chat_processes import ChatServer, ModelServer, Person
from tests.serving.postgres import INSTALLED, Postgres

pytestmark = pytest.mark.slow
KINDS = ["sqlite", "postgresql"] if INSTALLED else ["sqlite"]
USUAL = f"{SAID}这是第1轮。{ASKED}"
NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chat")


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[ModelServer]:
    with ModelServer(folder, pause=0.01) as server:
        yield server


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    yield server
    server.close()


@pytest.fixture(scope="module", params=KINDS)
def database(request: pytest.FixtureRequest, folder: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{folder / 'deep' / 'chat.sqlite3'}"
    return request.getfixturevalue("postgres").url


@pytest.fixture(scope="module")
def chat(database: str, model: ModelServer) -> Iterator[ChatServer]:
    with ChatServer(database, model) as server:
        yield server


@pytest.fixture(scope="module")
def other(chat: ChatServer, database: str, model: ModelServer) -> Iterator[ChatServer]:
    """A second replica on the same database."""
    with ChatServer(database, model) as server:
        yield server


@pytest.fixture
def person(chat: ChatServer) -> Person:
    someone = Person(chat.url)
    someone.begin(model="llama3:mi", topic="insomnia", motivation="low")
    return someone


def unique(text: str) -> str:
    """The text with something that tells it from all others, for the model's log."""
    return f"{text} {next(NUMBERS)}号"


def test_a_conversation_from_beginning_to_end(person: Person, model: ModelServer) -> None:
    first, second = unique("我最近睡不好。"), unique("我想早点睡。")
    assert person.say(first)["content"] == USUAL
    assert person.say(second)["content"] == USUAL.replace("1", "2")
    (question,) = model.asked(second)
    assert question["model"] == "llama3:mi"
    assert [m["content"] for m in question["messages"]] == [
        f"{INSTRUCTION}\n{first}",
        USUAL,
        second,
    ]
    assert person.call("POST", f"api/sessions/{person.session}/end")[1]["end_reason"] == "client"
    rating = {"rating": 4, "comment": "还不错"}
    assert person.call("PUT", f"api/sessions/{person.session}/rating", rating)[0] == 200
    status, exported = person.call("GET", f"api/sessions/{person.session}/export")
    assert status == 200
    assert exported == person.get()
    assert exported["rating"] == 4
    assert [m["role"] for m in exported["messages"]] == ["client", "counselor"] * 2
    body = {"message_id": uuid.uuid4().hex, "content": "还在吗"}
    status, refused = person.call("POST", f"api/sessions/{person.session}/messages", body)
    assert (status, refused["error"]["code"]) == (409, "ended")


def test_a_message_sent_many_times_at_once_is_answered_once(
    person: Person, model: ModelServer
) -> None:
    text, message_id = unique("我总是忘记。"), uuid.uuid4().hex
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda _: person.send(text, message_id), range(12)))
    assert person.reply(message_id)["content"] == USUAL
    assert person.send(text, message_id) == message_id
    assert len(person.messages()) == 2
    assert len(model.asked(text)) == 1
    body = {"message_id": message_id, "content": "别的话"}
    status, refused = person.call("POST", f"api/sessions/{person.session}/messages", body)
    assert (status, refused["error"]["code"]) == (409, "other_text")


def test_a_session_begun_twice_is_one_session(chat: ChatServer) -> None:
    someone, session_id = Person(chat.url), uuid.uuid4().hex
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(
                lambda _: someone.call("POST", "api/sessions", {"session_id": session_id}), range(8)
            )
        )
    assert {status for status, _ in answers} == {201}
    assert len({json.dumps(session, sort_keys=True) for _, session in answers}) == 1


def test_nobody_sees_or_changes_a_stranger_s_session(person: Person, chat: ChatServer) -> None:
    message_id = person.send("我想戒烟。")
    person.reply(message_id)
    stranger = Person(chat.url)
    before, path = person.get(), f"api/sessions/{person.session}"
    body = {"message_id": uuid.uuid4().hex, "content": "你好"}
    for method, where, sent in [
        ("GET", path, None),
        ("GET", f"{path}/export", None),
        ("POST", f"{path}/messages", body),
        ("GET", f"{path}/messages/{message_id}/reply", None),
        ("POST", f"{path}/messages/{message_id}/retry", None),
        ("POST", f"{path}/messages/{message_id}/stop", None),
        ("POST", f"{path}/end", None),
        ("PUT", f"{path}/rating", {"rating": 1}),
    ]:
        assert stranger.call(method, where, sent)[0] == 404, where
    assert stranger.call("DELETE", path) == (200, {"deleted": 0})
    taken = {"session_id": person.session}
    assert stranger.call("POST", "api/sessions", taken)[0] == 409
    assert stranger.call("GET", "api/sessions") == (200, {"sessions": []})
    assert person.get() == before


def test_a_replica_killed_in_mid_reply_is_replaced_and_nothing_said_twice(
    chat: ChatServer, database: str, model: ModelServer
) -> None:
    with ChatServer(database, model) as doomed:
        someone = Person(doomed.url)
        someone.begin()
        text = unique("慢慢来，停")
        message_id = someone.send(text)
        someone.wait_for_words("第3句")
        doomed.kill()
    someone.url = chat.url
    assert someone.messages()[1]["status"] == "pending"
    assert someone.reply(message_id)["content"] == "".join(SLOW)
    assert len(someone.messages()) == 2
    assert len(model.asked(text)) == 2
    assert someone.say("谢谢")["content"].startswith(SAID)


def test_a_replica_that_is_stopped_hands_its_replies_over_at_once(
    chat: ChatServer, database: str, model: ModelServer
) -> None:
    # Its lease alone would keep the reply from everybody until long after the test.
    with ChatServer(database, model, lease_s=3600.0) as leaving:
        someone = Person(leaving.url)
        someone.begin()
        message_id = someone.send(unique("慢慢来，停"))
        someone.wait_for_words(SLOW[0])
        leaving.terminate()
    someone.url = chat.url
    assert someone.reply(message_id)["content"] == "".join(SLOW)


def test_a_message_whose_replica_and_page_have_gone_is_assessed_all_the_same(
    person: Person, database: str
) -> None:
    async def stored_by_a_replica_that_then_died() -> None:
        opened = Database(database_url(ChatSection(database=database)))
        store = Store(opened, "gone", max_rounds=9)
        digest = hashlib.sha256(person.secret.encode()).hexdigest()
        reply = await store.send(person.session, digest, uuid.uuid4().hex, "我已经写好遗书了")
        assert reply is not None
        await store.release(reply)
        await opened.close()

    asyncio.run(stored_by_a_replica_that_then_died())
    while person.messages()[1]["status"] != "done":  # nobody listens
        time.sleep(0.1)
    assert person.messages()[1]["kind"] == "preset"
    assert person.get()["risk"] == "high"


def test_a_reply_is_followed_and_stopped_at_another_replica_too(
    person: Person, other: ChatServer
) -> None:
    message_id = person.send(unique("慢慢来"))
    elsewhere = Person(other.url)
    elsewhere.headers, elsewhere.session = person.headers, person.session
    assert elsewhere.reply(message_id)["content"] == "".join(SLOW)
    message_id = person.send(unique("再慢慢来，停"))
    path = f"api/sessions/{person.session}/messages/{message_id}/stop"
    person.wait_for_words(SLOW[0])
    assert elsewhere.call("POST", path)[0] == 202
    assert person.reply(message_id)["status"] == "stopped"


def test_stop_keeps_what_was_said_and_retry_says_it_anew(person: Person) -> None:
    message_id = person.send(unique("慢慢来，停"))
    path = f"api/sessions/{person.session}/messages/{message_id}"
    person.wait_for_words(SLOW[0])
    assert person.call("POST", f"{path}/stop")[0] == 202
    stopped = person.reply(message_id)
    assert stopped["status"] == "stopped"
    assert SLOW[0] in stopped["content"]
    assert SLOW[-1] not in stopped["content"]
    assert person.call("POST", f"{path}/retry")[0] == 202
    assert person.reply(message_id)["content"] == "".join(SLOW)
    status, refused = person.call("POST", f"{path}/retry")
    assert (status, refused["error"]["code"]) == (409, "done")


@pytest.mark.parametrize("fault", ["断", "忙"])
def test_a_model_that_fails_once_is_asked_again(
    person: Person, model: ModelServer, fault: str
) -> None:
    text = unique(fault)
    assert person.say(text)["content"] == USUAL
    assert len(model.asked(text)) == 2


def test_an_emoji_that_the_model_cuts_in_two_arrives_whole(person: Person) -> None:
    assert person.say(unique("半"))["content"] == "好🙂。嗯\ufffd。"


def test_a_refused_reply_is_said_to_have_failed_and_loses_no_word(
    person: Person, model: ModelServer
) -> None:
    refused, after = unique("拒"), unique("那换个说法")
    reply = person.say(refused)
    assert (reply["status"], reply["content"]) == ("failed", "")
    assert person.say(after)["status"] == "done"
    (question,) = model.asked(after)
    assert refused in question["messages"][-1]["content"]


def test_high_risk_stops_the_model_and_shows_help_lines_with_their_date(
    person: Person, model: ModelServer
) -> None:
    text = unique("我已经写好遗书了，今晚就走")
    reply = person.say(text)
    assert reply["kind"] == "preset"
    assert "12356" in reply["content"]
    assert "核对" in reply["content"]
    assert person.say("开玩笑的，我们接着说睡觉吧")["kind"] == "preset"
    assert model.asked(text) == []
    assert person.get()["risk"] == "high"
    assert person.call("POST", f"api/sessions/{person.session}/end")[1]["end_reason"] == "safety"


def test_medium_risk_goes_on_with_help_lines_beside(person: Person) -> None:
    reply = person.say("我以前有过轻生的念头，现在好了")
    assert reply["content"] == USUAL
    assert "12356" in reply["notice"]
    assert person.get()["risk"] == "medium"
    assert person.say("今天好多了")["notice"] == ""


def test_a_reply_that_is_asked_for_again_has_the_help_lines_beside_it_still(
    person: Person,
) -> None:
    message_id = person.send(unique("我以前有过轻生的念头，现在好了，慢停"))
    path = f"api/sessions/{person.session}/messages/{message_id}"
    person.wait_for_words(SLOW[0])
    assert person.call("POST", f"{path}/stop")[0] == 202
    assert "12356" in person.reply(message_id)["notice"]
    assert person.call("POST", f"{path}/retry")[0] == 202
    reply = person.reply(message_id)
    assert reply["content"] == "".join(SLOW)
    assert "12356" in reply["notice"]
    assert person.say(unique("今天好多了"))["notice"] == ""


def test_no_word_of_a_forbidden_reply_is_ever_sent(person: Person) -> None:
    message_id = person.send("给我开点药吧")
    path = f"api/sessions/{person.session}/messages/{message_id}/reply"
    _, events = person.call("GET", path)
    assert "舍曲林" not in events
    assert DRUG[:4] not in events
    reply = person.reply(message_id)
    assert reply["kind"] == "preset"
    assert SAID not in reply["content"]  # replaced, not edited


def test_deleted_sessions_leave_nothing_behind(person: Person, database: str) -> None:
    word = uuid.uuid4().hex
    person.say(f"记住{word}")
    person.say(f"我不想活了{word}")
    assert person.call("DELETE", f"api/sessions/{person.session}") == (200, {"deleted": 1})
    assert person.call("GET", f"api/sessions/{person.session}")[0] == 404
    assert person.call("DELETE", f"api/sessions/{person.session}") == (200, {"deleted": 0})
    if database.startswith("sqlite"):
        place = Path(database.removeprefix("sqlite:///"))
        for file in place.parent.iterdir():
            assert word.encode() not in file.read_bytes(), file.name
        with sqlite3.connect(place) as connection:
            for table in ("chat_messages", "chat_interventions"):
                count = f"SELECT count(*) FROM {table} WHERE session_id = ?"
                assert connection.execute(count, (person.session,)).fetchone() == (0,)


def test_all_of_a_person_s_sessions_are_deleted_and_nobody_else_s(
    chat: ChatServer, person: Person
) -> None:
    other = Person(chat.url)
    other.begin()
    person.begin()
    assert person.call("DELETE", "api/sessions") == (200, {"deleted": 2})
    assert person.call("GET", "api/sessions") == (200, {"sessions": []})
    assert other.say("你好")["status"] == "done"


def test_a_session_deleted_in_mid_reply_ends_it(person: Person) -> None:
    message_id = person.send(unique("慢慢来，停"))
    path = f"api/sessions/{person.session}"
    person.wait_for_words(SLOW[0])
    assert person.call("DELETE", path)[0] == 200
    assert person.call("GET", f"{path}/messages/{message_id}/reply")[0] == 404
    assert person.call("GET", "health")[0] == 200


def test_many_people_at_two_replicas_each_get_every_reply(
    chat: ChatServer, other: ChatServer
) -> None:
    def talk(url: str) -> None:
        someone = Person(url)
        someone.begin()
        for number in range(1, 5):
            assert f"第{number}轮" in someone.say(f"第{number}句话")["content"]
        assert len(someone.messages()) == 8

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(talk, [chat.url, other.url] * 12))


def test_replicas_that_start_together_migrate_once_and_to_the_tables_in_the_code(
    folder: Path, request: pytest.FixtureRequest
) -> None:
    async def start_together(url: str) -> list[object]:
        replicas = [Database(database_url(ChatSection(database=url))) for _ in range(4)]
        await asyncio.gather(*(replica.migrate() for replica in replicas))
        async with replicas[0].read() as transaction:
            connection = await transaction.connection()
            differences = await connection.run_sync(
                lambda sync: compare_metadata(MigrationContext.configure(sync), Base.metadata)
            )
        for replica in replicas:
            await replica.close()
        return differences

    fresh = [f"sqlite:///{folder / 'fresh.sqlite3'}"]
    if INSTALLED:
        # Another database of the same server.
        fresh.append(request.getfixturevalue("postgres").url.replace("/postgres", "/template1"))
    for url in fresh:
        assert asyncio.run(start_together(url)) == []


@pytest.mark.skipif(not INSTALLED, reason="needs PostgreSQL: apt-get install postgresql")
def test_a_crash_of_the_database_in_load_loses_and_doubles_nothing(
    postgres: Postgres, model: ModelServer
) -> None:
    def talk(number: int) -> None:
        someone = people[number]
        for said in range(4):
            message_id = uuid.uuid4().hex
            path = f"api/sessions/{someone.session}/messages"
            body = {"message_id": message_id, "content": f"{tag} {number} 第{said}句"}
            until(lambda: someone.call("POST", path, body), 202)  # noqa: B023
            events = until(lambda: someone.call("GET", f"{path}/{message_id}/reply"), 200)  # noqa: B023
            while '"end"' not in events:
                events = until(lambda: someone.call("GET", f"{path}/{message_id}/reply"), 200)  # noqa: B023

    def until(action, wanted: int):
        for _ in range(200):
            status, answer = action()
            if status == wanted:
                return answer
            assert status == 503, answer
            time.sleep(0.2)
        raise AssertionError("the service did not come back")

    tag = uuid.uuid4().hex[:8]
    with ChatServer(postgres.url, model) as server, ThreadPoolExecutor(8) as pool:
        people = [Person(server.url) for _ in range(8)]
        for someone in people:
            someone.begin()
        talks = [pool.submit(talk, number) for number in range(8)]
        time.sleep(1)
        postgres.stop()
        assert Person(server.url).call("GET", "health")[0] == 503
        time.sleep(1)
        postgres.start()
        for someone, done in zip(people, talks, strict=True):
            done.result(600)
            messages = someone.messages()
            assert [m["role"] for m in messages] == ["client", "counselor"] * 4
            assert {m["status"] for m in messages} == {"done"}


class Hook(BaseHTTPRequestHandler):
    """A takeover webhook that fails the first call."""

    calls: list[dict] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.calls.append(body)
        self.send_response(500 if len(self.calls) == 1 else 204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_human_is_called_until_the_hook_accepts_and_is_told_no_text(
    folder: Path, model: ModelServer
) -> None:
    hook = HTTPServer(("127.0.0.1", 0), Hook)
    Hook.calls.clear()
    threading.Thread(target=hook.serve_forever, daemon=True).start()
    # A call that is given up for its slowness would be made once more.
    takeover = {"url": f"http://127.0.0.1:{hook.server_port}/", "timeout_s": 120.0}
    with ChatServer(str(folder / "hook.sqlite3"), model, takeover=takeover) as server:
        someone = Person(server.url)
        someone.begin()
        someone.say("我想自杀，我叫王小明")
        for _ in range(600):
            if len(Hook.calls) == 2:
                break
            time.sleep(0.1)
        time.sleep(2)
    hook.shutdown()
    assert len(Hook.calls) == 2
    assert Hook.calls[0] == Hook.calls[1]
    call = Hook.calls[1]
    assert (call["session_id"], call["level"], call["category"]) == (
        someone.session,
        "high",
        "suicide",
    )
    assert "王小明" not in json.dumps(Hook.calls, ensure_ascii=False)


def test_a_study_hides_the_model_and_assigns_it_evenly(folder: Path, model: ModelServer) -> None:
    place = f"sqlite:///{folder / 'study.sqlite3'}"
    models = ["llama3", "llama3:mi"]
    with ChatServer(place, model, study=True, models=models) as server:
        seen, roles = "", []
        for _ in range(20):
            someone = Person(server.url)
            session = someone.begin(model="llama3", topic="exercise", motivation="high")
            roles.append((session["topic"], session["motivation"]))
            seen += json.dumps([session, someone.call("GET", "api/setting")], ensure_ascii=False)
        someone.say("你好")
        seen += json.dumps(someone.call("GET", f"api/sessions/{someone.session}/export"))
        assert someone.call("DELETE", f"api/sessions/{someone.session}")[0] == 200
    assert "llama3" not in seen
    with sqlite3.connect(place.removeprefix("sqlite:///")) as connection:
        asked = "SELECT model, topic FROM chat_sessions ORDER BY started_at"
        cells = connection.execute(asked).fetchall()
    assert set(Counter(cells[:10]).values()) == {1}  # each model with each topic once
    assert {motivation for _, motivation in roles} == {"low", "medium", "high"}


def test_bounds_are_refusals_that_say_when_to_come_back(folder: Path, model: ModelServer) -> None:
    place = str(folder / "bounds.sqlite3")
    bounds = {"max_replies": 1, "max_rounds": 2, "max_sessions_per_person": 2}
    with ChatServer(place, model, **bounds, max_message_chars=10) as server:
        someone, other = Person(server.url), Person(server.url)
        someone.begin()
        other.begin()
        path = f"api/sessions/{other.session}/messages"
        slow = someone.send(unique("慢停"))
        body = {"message_id": uuid.uuid4().hex, "content": "你好"}
        status, refused = other.call("POST", path, body)
        assert (status, refused["error"]["code"]) == (503, "overloaded")
        assert other.messages() == []
        stop = f"api/sessions/{someone.session}/messages/{slow}/stop"
        assert someone.call("POST", stop)[0] == 202
        assert someone.reply(slow)["status"] == "stopped"
        assert other.call("POST", path, body)[0] == 202
        other.reply(body["message_id"])
        assert other.say("你好呀")["status"] == "done"
        status, refused = other.call("POST", path, {**body, "message_id": uuid.uuid4().hex})
        assert (status, refused["error"]["code"]) == (409, "limit")
        assert other.get()["end_reason"] == "limit"
        other.begin()
        status, refused = other.call("POST", "api/sessions", {"session_id": uuid.uuid4().hex})
        assert (status, refused["error"]["code"]) == (429, "too_many_sessions")
        path = f"api/sessions/{other.session}/messages"
        status, refused = other.call("POST", path, {**body, "content": "长" * 11})
        assert (status, refused["error"]["code"]) == (422, "too_long")


def test_a_second_opinion_raises_the_level_and_a_late_one_is_not_waited_for(
    folder: Path, model: ModelServer
) -> None:
    place = str(folder / "opinion.sqlite3")
    opinion = {"model": "llama3", "timeout_s": 1.0}
    with ChatServer(place, model, second_opinion=opinion) as hurried:
        someone = Person(hurried.url)
        someone.begin()
        assert someone.say("慢慢说")["content"] == "".join(SLOW)
    opinion["timeout_s"] = 60.0
    with ChatServer(place, model, second_opinion=opinion) as server:
        someone = Person(server.url)
        someone.begin()
        assert someone.say("今天天气不错")["content"] == USUAL
        assert someone.say("一句暗语")["kind"] == "preset"
        assert someone.get()["risk"] == "high"
        assert someone.say("没事了，谢谢")["kind"] == "preset"
