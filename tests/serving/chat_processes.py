"""The chat and a model behind it as processes that a test can kill."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

from tests.serving import chat_server

# Replicas are forked from a process that has imported everything: they start in a moment.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["milm_ray.serving.chat.app", "uvicorn"])


class ModelServer:
    """tests/serving/chat_model.py as a process."""

    def __init__(self, folder: Path, pause: float = 0.02) -> None:
        self.log = folder / f"asked-{uuid.uuid4().hex[:6]}.jsonl"
        self.log.touch()
        command = [sys.executable, str(Path(__file__).with_name("chat_model.py"))]
        command += ["--log", str(self.log), "--pause", str(pause)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        port = int(self.process.stdout.readline() or 0)
        assert port, "the model did not start"
        self.url = f"http://127.0.0.1:{port}/v1"

    def asked(self, about: str = "") -> list[dict[str, Any]]:
        """The questions that came, whole, of which the last message holds `about`."""
        lines = self.log.read_text(encoding="utf-8").splitlines()
        questions = [json.loads(line) for line in lines]
        return [q for q in questions if about in q["messages"][-1]["content"]]

    def __enter__(self) -> ModelServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


class ChatServer:
    """One replica of the chat. Settings as in ChatSection; options: keys_file, port, lease_s."""

    def __init__(self, database: str, model: ModelServer, **options: Any) -> None:
        names = ("keys_file", "port", "lease_s")
        known = {name: options.pop(name) for name in names if name in options}
        settings = {"models_url": model.url, **options}
        if database.startswith(("sqlite:", "postgresql:")):
            settings["database"] = database
        else:
            known["default_database"] = database
        ours, theirs = FORKS.Pipe()
        self.process = FORKS.Process(
            target=chat_server.run, args=({"settings": settings, **known}, theirs), daemon=True
        )
        self.process.start()
        self.port = ours.recv()
        assert self.port, "the chat did not start"
        self.url = f"http://127.0.0.1:{self.port}/"

    def kill(self) -> None:
        self.process.kill()
        self.process.join(20)

    def terminate(self) -> None:
        self.process.terminate()
        self.process.join(120)
        assert self.process.exitcode is not None, "the chat did not end"

    def __enter__(self) -> ChatServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Person:
    """Somebody who uses the chat's API, at any replica."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url
        self.secret = uuid.uuid4().hex + uuid.uuid4().hex
        self.headers = {"X-Person": self.secret}
        if key is not None:
            self.headers["Authorization"] = f"Bearer {key}"
        self.session = ""

    def call(self, method: str, path: str, body: Any = None, timeout: float = 60) -> Any:
        """(status, JSON or text). Where the service asks for patience it is given half a minute."""
        for _ in range(30):
            status, answer = self._call(method, path, body, timeout)
            if not _asks_for_patience(status, answer):
                break
            time.sleep(1)
        return status, answer

    def _call(self, method: str, path: str, body: Any, timeout: float) -> Any:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = {**self.headers, "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return response.status, _decoded(response.read())
        except urllib.error.HTTPError as error:
            return error.code, _decoded(error.read())

    def begin(self, **wanted: Any) -> dict[str, Any]:
        self.session = uuid.uuid4().hex
        body = {"session_id": self.session, **wanted}
        status, session = self.call("POST", "api/sessions", body)
        assert status == 201, session
        return session

    def send(self, text: str, message_id: str | None = None) -> str:
        """Send a message and return its id, without waiting for the reply."""
        message_id = message_id or uuid.uuid4().hex
        body = {"message_id": message_id, "content": text}
        status, answer = self.call("POST", f"api/sessions/{self.session}/messages", body)
        assert status == 202, answer
        return message_id

    def reply(self, message_id: str) -> dict[str, Any]:
        """Follow a reply to its end; the reply as the session then holds it."""
        path = f"api/sessions/{self.session}/messages/{message_id}/reply"
        status, events = self.call("GET", path)
        assert status == 200, events
        assert '"end"' in events, events
        found = [m for m in self.messages() if m["message_id"] == message_id]
        assert [message["role"] for message in found] == ["client", "counselor"]
        return found[1]

    def say(self, text: str) -> dict[str, Any]:
        return self.reply(self.send(text))

    def wait_for_words(self, words: str) -> None:
        """Wait until the last reply, which is still being written, holds these words."""
        while words not in self.messages()[-1]["content"]:
            time.sleep(0.05)

    def get(self) -> dict[str, Any]:
        status, session = self.call("GET", f"api/sessions/{self.session}")
        assert status == 200, session
        return session

    def messages(self) -> list[dict[str, Any]]:
        return self.get()["messages"]


def _asks_for_patience(status: int, answer: Any) -> bool:
    """The database, or the model's list, did not answer in time: as on a disk that is slow."""
    if isinstance(answer, str):
        return 'data: {"error": "database"}' in answer
    error = answer.get("error", {}) if status == 503 else {}
    return error.get("code") in ("database", "no_model")


def _decoded(data: bytes) -> Any:
    text = data.decode("utf-8")
    try:
        return json.loads(text)
    except ValueError:
        return text
