"""Whatever is sent to the chat's routes: refusals, never a failure of the server."""

from __future__ import annotations

import http.client
import json
import socket
import uuid
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving.chat_processes import ChatServer, ModelServer, Person

pytestmark = pytest.mark.slow
TEXT = '{"message_id": "0123456789", "content": %s}'


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatServer]:
    folder = tmp_path_factory.mktemp("fuzz")
    with ModelServer(folder) as model, ChatServer(str(folder / "chat.sqlite3"), model) as server:
        yield server


@pytest.fixture(scope="module")
def schema(chat: ChatServer):
    return schemathesis.openapi.from_url(f"{chat.url}openapi.json")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe\x00",
        (TEXT % '"\xff"').encode("latin-1"),
        (TEXT % '"\\u0000"').encode(),
        (TEXT % '"\\ud800"').encode(),
        (TEXT % "null").encode(),
        (TEXT % '["你好"]').encode(),
        (TEXT % ("9" * 5000)).encode(),
        (TEXT % "NaN").encode(),
        (TEXT % '""').encode(),
        (TEXT % '"  \\n "').encode(),
        b'{"message_id": "x", "content": "y"}',
        b'{"message_id": "0123456789", "content": "y", "more": 1}',
        b'{"message_id": "../../../../etc", "content": "y"}',
        b"[" * 100_000,
        (TEXT % json.dumps("长" * 3000)).encode(),
        (TEXT % json.dumps("长" * 200_000)).encode(),
    ],
    ids=range(20),
)
def test_a_message_that_is_none_is_refused(chat: ChatServer, body: bytes) -> None:
    someone = Person(chat.url)
    someone.begin()
    status, answer = someone.call("POST", f"api/sessions/{someone.session}/messages", body)
    assert 400 <= status < 500, answer
    assert answer["error"]["message"]
    assert someone.messages() == []


@pytest.mark.parametrize(
    "path",
    ["api/sessions/%00", "api/sessions/%ff%fe%ff%fe%ff", "api/sessions/" + "x" * 7000, "%2e%2e/"],
)
def test_an_address_that_is_none_is_refused(chat: ChatServer, path: str) -> None:
    assert 400 <= Person(chat.url).call("GET", path)[0] < 500


def test_a_person_without_a_proper_secret_is_refused(chat: ChatServer) -> None:
    someone = Person(chat.url)
    for secret in ("", "short", "x" * 200, "密" * 0 + "a b" * 20):
        someone.headers["X-Person"] = secret
        assert someone.call("GET", "api/sessions")[0] == 422


def test_a_flood_of_headers_and_a_slow_client_hold_up_nobody(chat: ChatServer) -> None:
    slow = socket.create_connection(("127.0.0.1", chat.port))
    slow.sendall(b"POST /api/sessions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    flood = http.client.HTTPConnection("127.0.0.1", chat.port)
    flood.request("GET", "/", headers={f"X-{n}": "y" * 900 for n in range(60)})
    assert 400 <= flood.getresponse().status < 500
    someone = Person(chat.url)
    someone.begin()
    assert someone.say("你好")["status"] == "done"
    slow.close()


# Only what is broken is looked for: what made-up ids are answered with is not the schema's matter.
def test_no_made_up_request_breaks_a_route(schema, chat: ChatServer) -> None:
    routes = [found.ok() for found in schema.get_all_operations()]
    assert len(routes) >= 12

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=st.sampled_from(routes).flatmap(lambda route: route.as_strategy()))
    def ask(case) -> None:
        case.headers = {**(case.headers or {}), "X-Person": "0123456789abcdef" * 3}
        response = case.call(timeout=300)
        # Told apart from a failure: the database did not answer in time, as on a disk that is slow.
        if case.path == "/health" and response.status_code == 503:
            assert response.json() == {"status": "no database"}
        else:
            assert response.status_code < 500, response.text

    ask()


def test_the_server_is_well_after_all_that(chat: ChatServer) -> None:
    someone = Person(chat.url)
    someone.begin()
    assert someone.say(f"你好 {uuid.uuid4().hex}")["status"] == "done"
