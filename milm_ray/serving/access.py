"""The gate in front of an app: keys, their rate limits, and bounds on what a request may hold.

Every route but /health asks for a key, as `Authorization: Bearer KEY` or, in a browser, as the
cookie that the gate's own sign-in page sets. Without a keys file the gate answers this machine
only.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import resources
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from milm_ray.serving.errors import error_body
from milm_ray.serving.keys import KeyRing

COOKIE = "milm_key"
_MAX_HEADER_BYTES = 32 << 10
_MAX_URL_BYTES = 8 << 10
_DRAIN_BYTES = 16 << 20
_DRAIN_S = 2.0
_HAS_BODY = (b"content-length", b"transfer-encoding")
_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")
_NO_KEYS = (
    "no API keys are set up, so only this machine is answered; make one with "
    "`python jobs/keys.py add NAME` and set access.keys_file"
)
_NO_KEY = "an API key is needed: Authorization: Bearer KEY"


class Bucket:
    """A token bucket that holds a minute's requests."""

    def __init__(self, per_minute: float) -> None:
        self._size = max(1.0, per_minute)
        self._rate = per_minute / 60
        self._level = self._size
        self._at = time.monotonic()

    def take(self) -> float:
        """Take one request; 0.0 if it may pass, else the seconds until it may."""
        now = time.monotonic()
        self._level = min(self._size, self._level + (now - self._at) * self._rate)
        self._at = now
        if self._level >= 1:
            self._level -= 1
            return 0.0
        return (1 - self._level) / self._rate


class Gate:
    """ASGI middleware. replicas: how many share the requests; each grants its part of a limit.

    sign_in: whether browsers are offered the sign-in page. max_body_bytes: 413 beyond it.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys_file: str | None,
        *,
        replicas: int = 1,
        sign_in: bool = False,
        max_body_bytes: int,
    ) -> None:
        self._app = app
        self._keys = KeyRing(keys_file) if keys_file is not None else None
        self._replicas = replicas
        self._sign_in = sign_in
        self._max_body = max_body_bytes
        self._buckets: dict[tuple[str, int], Bucket] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # there is no websocket here
        refusal = self._refusal(scope)
        if refusal is not None:
            if any(name in _HAS_BODY for name, _ in scope["headers"]):
                await _drain(receive)
            await refusal(scope, receive, send)
        elif self._sign_in and _path(scope) == "/sign-in":
            await (await self._signed_in(scope, receive))(scope, receive, send)
        else:
            await self._bounded(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        """Why a request may not pass, as the response that says so."""
        headers = Headers(scope=scope)
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size > _MAX_HEADER_BYTES:
            return _error(431, "the request's headers are too long")
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > _MAX_URL_BYTES:
            return _error(414, "the request's address is too long")
        declared = headers.get("content-length", "0")
        if not declared.isdecimal():
            return _error(400, "Content-Length is no number")
        if int(declared) > self._max_body:
            return self._too_long()
        path = _path(scope)
        if path == "/health":
            return None
        if self._keys is None:
            return None if _is_local(scope, headers) else _error(401, _NO_KEYS)
        if path == "/sign-in" and self._sign_in:
            return None
        key = self._keys.find(_secret(headers))
        if key is None:
            if self._sign_in and "text/html" in headers.get("accept", ""):
                return _sign_in_page(scope)
            return _error(401, _NO_KEY, {"WWW-Authenticate": "Bearer"})
        bucket = self._buckets.get((key.sha256, key.requests_per_minute))
        if bucket is None:
            bucket = Bucket(key.requests_per_minute / self._replicas)
            self._buckets[key.sha256, key.requests_per_minute] = bucket
        wait = bucket.take()
        if wait:
            message = f"over this key's limit of {key.requests_per_minute} requests a minute"
            return _error(429, message, {"Retry-After": str(math.ceil(wait))})
        return None

    async def _signed_in(self, scope: Scope, receive: Receive) -> Response:
        """The answer to the sign-in form: the cookie, or the form again."""
        if scope["method"] != "POST":
            return _sign_in_page(scope)
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > 4096:
                return _error(413, "that is no key")
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                break
        secret = parse_qs(body.decode("ascii", "replace")).get("key", [""])[0].strip()
        if self._keys is None or self._keys.find(secret) is None:
            return _sign_in_page(scope, failed=True)
        root = scope.get("root_path", "").rstrip("/")
        response = RedirectResponse(f"{root}/", 303)
        # For /chat too, which is no part of /chat/.
        response.set_cookie(
            COOKIE, secret, path=root or "/", httponly=True, samesite="strict",
            secure=scope["scheme"] == "https", max_age=30 * 86400,
        )  # fmt: skip
        return response

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, its body cut off where it grows over the limit."""
        taken, started, over, more = 0, False, False, False

        async def counted() -> Message:
            nonlocal taken, over, more
            message = await receive()
            more = message.get("more_body", False)
            taken += len(message.get("body", b""))
            if taken > self._max_body:
                over = True
                return {"type": "http.disconnect"}
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            if over and not started:
                return
            started = True
            await send(message)

        try:
            await self._app(scope, counted, watched)
        except Exception:
            if not over:
                raise
        if over and not started:
            if more:
                await _drain(receive)
            await self._too_long()(scope, receive, send)

    def _too_long(self) -> Response:
        return _error(413, f"the request is longer than {self._max_body:,} bytes")


async def _drain(receive: Receive) -> None:
    """Read on for a while what will not be used: many clients hear an answer only after that."""
    taken = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_S):
            while taken < _DRAIN_BYTES:
                message = await receive()
                taken += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return


def _path(scope: Scope) -> str:
    """The request's path inside the app."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    return (path.removeprefix(root) if path.startswith(root) else path) or "/"


def _is_local(scope: Scope, headers: Headers) -> bool:
    """Whether the request comes from this machine, and not through a proxy on it."""
    client = scope.get("client")
    if not client or any(name in headers for name in _FORWARDED):
        return False
    try:
        address = ipaddress.ip_address(client[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _secret(headers: Headers) -> str:
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return secret.strip()
    return cookie_parser(headers.get("cookie", "")).get(COOKIE, "")


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    body = error_body(status, message)
    return Response(body, status, dict(headers or {}), media_type="application/json")


def _sign_in_page(scope: Scope, failed: bool = False) -> Response:
    page = resources.files(__package__).joinpath("sign_in.html").read_text(encoding="utf-8")
    shown = page.replace("{failed}", "" if failed else "hidden")
    shown = shown.replace("{action}", scope.get("root_path", "") + "/sign-in")
    headers: dict[str, Any] = {
        "WWW-Authenticate": "Bearer",
        "Cache-Control": "no-store",
        "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
        "form-action 'self'; frame-ancestors 'none'",
    }
    return Response(shown, 401, headers, media_type="text/html")
