"""The chat on Ray Serve before real engines, while its parts are killed."""

from __future__ import annotations

import http.client
import os
import signal
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serving.chat_processes import Person
from tests.serving.conftest import Served

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chat_url(served: Served) -> Iterator[str]:
    from milm_ray.serving.endpoints import chat_args
    from milm_ray.serving.running import running_chat

    args = chat_args(served.config, served.workspace, served.url)
    short = args.model_copy(update={"max_tokens": 24, "models": ["glm4:mi", "baichuan2:mi"]})
    with running_chat(short, served.url) as url:
        yield f"{url}/"


def details() -> dict:
    from ray import serve

    return serve.context._get_global_client().get_serve_details()


def replica_pids(app: str, deployment: str) -> list[int]:
    (name,) = [name for name in details()["applications"] if name.startswith(app)]
    found = details()["applications"][name]["deployments"][deployment]["replicas"]
    return [replica["pid"] for replica in found if replica["state"] == "RUNNING"]


def until(someone: Person, wanted: int, method: str, path: str, body=None):
    """The answer with the wanted status, however often the service fails before."""
    for _ in range(1200):
        try:
            status, answer = someone.call(method, path, body)
        except (OSError, http.client.HTTPException):  # the proxy is gone, or the answer broke off
            status, answer = 503, ""
        if status == wanted:
            return answer
        assert status in (404, 500, 502, 503, 504), answer
        time.sleep(0.3)
    raise AssertionError("the service did not come back")


def talk(url: str, rounds: int) -> Person:
    """A conversation that goes on through every failure."""
    someone = Person(url)
    someone.session = uuid.uuid4().hex
    until(someone, 201, "POST", "api/sessions", {"session_id": someone.session})
    for number in range(rounds):
        message_id = uuid.uuid4().hex
        path = f"api/sessions/{someone.session}/messages"
        until(someone, 202, "POST", path, {"message_id": message_id, "content": f"第{number}句"})
        while '"end"' not in until(someone, 200, "GET", f"{path}/{message_id}/reply"):
            time.sleep(0.2)
    return someone


def whole(someone: Person, rounds: int) -> bool:
    messages = until(someone, 200, "GET", f"api/sessions/{someone.session}")["messages"]
    assert [m["role"] for m in messages] == ["client", "counselor"] * rounds
    assert [m["content"] for m in messages[::2]] == [f"第{n}句" for n in range(rounds)]
    return all(m["status"] == "done" and m["content"] for m in messages)


def test_the_page_and_the_chat_are_served_beside_the_models(chat_url: str) -> None:
    someone = Person(chat_url)
    status, page = someone.call("GET", "")
    assert status == 200
    assert "动机访谈对话" in page
    assert someone.call("GET", "api/setting")[1]["models"] == ["glm4:mi", "baichuan2:mi"]
    someone.begin(model="glm4:mi")
    reply = someone.say("我想戒烟，可是总忍不住。")
    assert reply["status"] == "done"
    assert reply["content"]
    assert someone.say("我不想活了，已经写好遗书")["kind"] == "preset"


@pytest.mark.parametrize("part", ["chat", "model", "proxy"])
def test_a_part_that_is_killed_in_load_comes_back_and_no_word_is_lost(
    chat_url: str, part: str
) -> None:
    import ray

    with ThreadPoolExecutor(6) as pool:
        talks = [pool.submit(talk, chat_url, 5) for _ in range(6)]
        time.sleep(1.5)
        if part == "proxy":
            (proxy,) = details()["proxies"].values()
            ray.kill(ray.get_actor(proxy["actor_name"], namespace="serve"), no_restart=False)
        else:
            app, deployment = ("chat", "chat") if part == "chat" else ("models", "model-glm4")
            killed = replica_pids(app, deployment)
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
            for _ in range(400):  # back without hands, for the tests after this one too
                if set(replica_pids(app, deployment)) - set(killed):
                    break
                time.sleep(0.3)
        assert all(whole(done.result(600), 5) for done in talks)
