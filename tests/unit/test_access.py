"""Keys and the gate in front of the apps."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milm_ray.errors import UserError
from milm_ray.serving import access, keys
from milm_ray.serving.access import COOKIE, Bucket, Gate
from milm_ray.serving.ingress import ChatBody, CompletionBody, Ingress
from milm_ray.serving.models import IngressArgs


async def echo(scope, receive, send) -> None:
    """An app that reads its request to the end and says how long it was."""
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RuntimeError("the client has gone")
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


def asked(
    app, *requests: tuple[str, str, dict], client: str = "127.0.0.1", root: str = ""
) -> list[httpx.Response]:
    """The app's responses to (method, path, httpx options), one after the other."""

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, client=(client, 1), root_path=root)
        async with httpx.AsyncClient(transport=transport, base_url="http://chat") as http:
            return [await http.request(method, path, **more) for method, path, more in requests]

    return asyncio.run(ask())


INGRESS = Ingress(IngressArgs().model_dump(), None, {}).__serve_build_asgi_app__()
FIELDS = st.sampled_from(
    [*ChatBody.model_fields, *CompletionBody.model_fields, "role", "content", "include_usage", "x"]
)


def bearer(key: str) -> dict:
    return {"headers": {"Authorization": f"Bearer {key}"}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "keys.json"


def test_a_key_is_shown_once_and_kept_as_a_digest_nobody_else_can_read(file: Path) -> None:
    secret = keys.add(file, "clinic", 30)
    assert secret not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    assert [(key.name, key.requests_per_minute) for key in keys.read(file)] == [("clinic", 30)]
    assert keys.add(file, "other") != secret
    with pytest.raises(UserError, match="clinic"):
        keys.add(file, "clinic")


@pytest.mark.parametrize("name", ["", "a b", "名字", "x" * 65, "-x", "a\nb"])
def test_a_name_that_is_none_is_refused(file: Path, name: str) -> None:
    with pytest.raises(UserError):
        keys.add(file, name)
    assert not file.exists()


def test_a_broken_keys_file_is_an_error_and_opens_nothing(file: Path) -> None:
    file.parent.mkdir()
    file.write_text('{"keys": [{"name": 1}]')
    with pytest.raises(UserError, match=r"keys\.json"):
        keys.read(file)
    gate = Gate(echo, str(file), max_body_bytes=100)
    assert [r.status_code for r in asked(gate, ("GET", "/x", bearer("")))] == [401]


def test_the_command_adds_lists_and_removes(file: Path, capsys) -> None:
    assert keys.main("", ["--file", str(file), "add", "clinic", "--rpm", "5"]) == 0
    secret = capsys.readouterr().out.strip()
    assert keys.KeyRing(str(file)).find(secret).name == "clinic"
    assert keys.main("", ["--file", str(file), "list"]) == 0
    listed = capsys.readouterr().out
    assert "clinic" in listed
    assert secret not in listed
    assert keys.main("", ["--file", str(file), "remove", "clinic"]) == 0
    assert keys.main("", ["--file", str(file), "remove", "clinic"]) == 1
    assert "fix:" in capsys.readouterr().err


def test_only_a_key_opens_the_door_and_health_needs_none(file: Path) -> None:
    secret = keys.add(file, "clinic")
    gate = Gate(echo, str(file), max_body_bytes=100)
    answers = asked(
        gate,
        ("GET", "/health", {}),
        ("GET", "/v1/models", bearer(secret)),
        ("GET", "/v1/models", {}),
        ("GET", "/v1/models", bearer(secret[:-1])),
        ("GET", "/v1/models", {"headers": {"Authorization": f"Basic {secret}"}}),
        ("GET", "/healthy", {}),
        client="203.0.113.9",
    )
    assert [r.status_code for r in answers] == [200, 200, 401, 401, 401, 401]
    assert answers[2].headers["www-authenticate"] == "Bearer"
    assert answers[2].json()["error"]["message"]


def test_a_removed_key_is_refused_and_a_new_one_admitted_without_a_restart(
    file: Path, monkeypatch
) -> None:
    monkeypatch.setattr(keys, "_LOOK_AGAIN_S", 0)
    first = keys.add(file, "first")
    gate = Gate(echo, str(file), max_body_bytes=100)
    assert asked(gate, ("GET", "/x", bearer(first)))[0].status_code == 200
    keys.remove(file, "first")
    second = keys.add(file, "second")
    answers = asked(gate, ("GET", "/x", bearer(first)), ("GET", "/x", bearer(second)))
    assert [r.status_code for r in answers] == [401, 200]
    file.unlink()
    assert asked(gate, ("GET", "/x", bearer(second)))[0].status_code == 401


def test_a_key_s_limit_is_its_own_and_says_when_to_come_back(file: Path, monkeypatch) -> None:
    # Nothing is granted anew while this runs, however long it takes.
    monkeypatch.setattr(access, "time", SimpleNamespace(monotonic=lambda: 0.0))
    busy, calm = keys.add(file, "busy", 4), keys.add(file, "calm", 4)
    gate = Gate(echo, str(file), max_body_bytes=100)
    answers = asked(gate, *[("GET", "/x", bearer(busy))] * 6, ("GET", "/x", bearer(calm)))
    assert [r.status_code for r in answers] == [200] * 4 + [429] * 2 + [200]
    assert 1 <= int(answers[4].headers["retry-after"]) <= 15
    halved = Gate(echo, str(file), replicas=2, max_body_bytes=100)
    answers = asked(halved, *[("GET", "/x", bearer(busy))] * 3)
    assert [r.status_code for r in answers] == [200, 200, 429]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10_000), st.integers(1, 30_000))
def test_a_bucket_never_grants_more_than_its_minute_at_once(per_minute: int, wanted: int) -> None:
    bucket = Bucket(per_minute)
    bucket._rate = 0.0001  # no refill while this runs
    assert sum(bucket.take() == 0 for _ in range(min(wanted, 2 * per_minute))) <= per_minute


@pytest.mark.parametrize(
    ("client", "headers", "status"),
    [
        ("127.0.0.1", {}, 200),
        ("127.8.8.8", {}, 200),
        ("::1", {}, 200),
        ("::ffff:127.0.0.1", {}, 200),
        ("192.168.0.7", {}, 401),
        ("", {}, 401),
        ("127.0.0.1", {"X-Forwarded-For": "203.0.113.9"}, 401),
        ("127.0.0.1", {"Forwarded": "for=203.0.113.9"}, 401),
    ],
)
def test_without_keys_only_this_machine_is_answered(
    client: str, headers: dict[str, str], status: int
) -> None:
    gate = Gate(echo, None, max_body_bytes=100)
    (answer,) = asked(gate, ("GET", "/x", {"headers": headers}), client=client)
    assert answer.status_code == status


async def pieces(count: int):
    for _ in range(count):
        yield b"x" * 10


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (("POST", "/x", {"content": b"x" * 100}), 200),
        (("POST", "/x", {"content": b"x" * 101}), 413),
        (("POST", "/x", {"content": pieces(10)}), 200),
        (("POST", "/x", {"content": pieces(11)}), 413),
        (("POST", "/x", {"headers": {"X-Long": "x" * 40_000}}), 431),
        (("GET", "/x?" + "y" * 9000, {}), 414),
        (("POST", "/x", {"headers": {"Content-Length": "-1"}}), 400),
        (("POST", "/x", {"headers": {"Content-Length": "１"}}), 400),
    ],
)
def test_what_is_too_long_is_refused(request_, status: int) -> None:
    if "Content-Length" in request_[2].get("headers", {}):
        value = request_[2]["headers"]["Content-Length"].encode()
        request_ = (*request_[:2], {"headers": [(b"content-length", value)]})
    gate = Gate(echo, None, max_body_bytes=100)
    assert asked(gate, request_)[0].status_code == status


def test_a_browser_signs_in_with_a_key_and_keeps_it_from_scripts(file: Path) -> None:
    secret = keys.add(file, "clinic")
    gate = Gate(echo, str(file), sign_in=True, max_body_bytes=10_000)
    form, wrong, right = asked(
        gate,
        ("GET", "/", {"headers": {"Accept": "text/html"}}),
        ("POST", "/sign-in", {"data": {"key": "milm_wrong"}}),
        ("POST", "/sign-in", {"data": {"key": secret}}),
    )
    assert (form.status_code, wrong.status_code, right.status_code) == (401, 401, 303)
    assert 'action="/sign-in"' in form.text
    assert 'role="alert" hidden' in form.text
    assert 'role="alert" hidden' not in wrong.text
    cookie = right.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    again = {"headers": {"Cookie": f"{COOKIE}={right.cookies[COOKIE]}"}}
    assert asked(gate, ("GET", "/", again))[0].status_code == 200


@pytest.mark.parametrize("root", ["", "/chat"])
def test_a_browser_s_key_is_sent_to_the_address_without_a_slash_too(file: Path, root: str) -> None:
    gate = Gate(echo, str(file), sign_in=True, max_body_bytes=10_000)
    form = {"data": {"key": keys.add(file, "clinic")}}
    requests = ("POST", f"{root}/sign-in", form), ("GET", root, {}), ("GET", f"{root}/", {})
    answers = asked(gate, *requests, root=root)
    assert [answer.status_code for answer in answers] == [303, 200, 200]


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["GET", "POST", "PUT", "HEAD", "OPTIONS", "TRACE"]),
    st.lists(st.tuples(st.binary(min_size=1, max_size=20), st.binary(max_size=50)), max_size=4),
    st.binary(max_size=40),
)
def test_nothing_at_all_breaks_the_gate(method: str, headers, query: bytes) -> None:
    gate = Gate(echo, None, sign_in=True, max_body_bytes=100)
    scope = {
        "type": "http",
        "method": method,
        "path": "/sign-in",
        "raw_path": b"/sign-in",
        "query_string": query,
        "headers": [(name.lower(), value) for name, value in headers],
        "client": ("127.0.0.1", 1),
        "scheme": "http",
    }
    assert 200 <= status_of(gate, scope) < 500


def status_of(app: Callable[..., Awaitable[None]], scope: dict) -> int:
    sent: list[dict] = []

    async def receive() -> dict:
        return {"type": "http.request", "body": b"\xff&=", "more_body": False}

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent[0]["status"]


def test_the_model_endpoints_stand_behind_the_gate(file: Path) -> None:
    """The ingress itself, with no model behind it."""
    secret = keys.add(file, "clinic")
    args = IngressArgs(keys_file=str(file), max_body_bytes=2048).model_dump()
    app = Ingress(args, None, {}).__serve_build_asgi_app__()
    chat = {"model": "llama3", "messages": [{"role": "user", "content": "你好"}]}
    body = {"content": json.dumps(chat), **bearer(secret)}
    answers = asked(
        app,
        ("GET", "/health", {}),
        ("GET", "/v1/models", {}),
        ("POST", "/v1/chat/completions", {"content": json.dumps(chat)}),
        ("GET", "/v1/models", bearer(secret)),
        ("POST", "/v1/chat/completions", body),
        ("POST", "/v1/completions", {"content": b"{" * 3000, **bearer(secret)}),
        ("POST", "/v1/completions", {"content": pieces(300), **bearer(secret)}),
        client="203.0.113.9",
    )
    assert [r.status_code for r in answers] == [200, 401, 401, 200, 404, 413, 413]
    assert answers[3].json() == {"object": "list", "data": []}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(FIELDS, inner, max_size=5),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(
    path=st.sampled_from(["/v1/chat/completions", "/v1/completions"]),
    body=st.binary(max_size=60) | st.dictionaries(FIELDS, JSON, max_size=8).map(json.dumps),
)
def test_no_body_at_all_breaks_the_model_endpoints(path: str, body: bytes | str) -> None:
    """With no model behind them, whatever is well-formed asks for a model that is not there."""
    content = body if isinstance(body, bytes) else body.encode()
    (answer,) = asked(INGRESS, ("POST", path, {"content": content}))
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"]
