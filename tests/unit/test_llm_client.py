"""The client against a real server in another process that misbehaves on purpose."""

import asyncio
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from milm_ray.config import LLMSection
from milm_ray.errors import UserError
from milm_ray.llm.client import BudgetReached, LLMClient, Rejected, find_key
from milm_ray.llm.limits import SILENT, Limits
from milm_ray.llm.replies import Reply, Request, json_object
from milm_ray.llm.reply_store import ReplyStore
from milm_ray.workspace import Workspace
from tests.llm_server_process import KEY, ServerProcess

Start = Callable[..., tuple[LLMClient, ServerProcess]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """A server with these faults and a client of it; `settings` go to the client."""
    monkeypatch.setenv("TEST_LLM_KEY", KEY)
    servers: list[ServerProcess] = []

    def begin(
        settings: dict[str, Any] | None = None, **faults: Any
    ) -> tuple[LLMClient, ServerProcess]:
        server = ServerProcess(tmp_path / f"log-{len(servers)}.jsonl", **faults)
        servers.append(server)
        known = {"model": "m", "base_url": server.url, "api_key_env": "TEST_LLM_KEY"}
        section = LLMSection.model_validate(known | (settings or {}))
        return LLMClient(section, ReplyStore(Workspace.open(str(tmp_path / "ws")))), server

    yield begin
    for server in servers:
        server.kill()


def question(number: int, schema: bool = False) -> Request:
    messages = [
        {"role": "system", "content": "comprehensiveness"},
        {"role": "user", "content": f"对话{number}"},
    ]
    return Request(messages, schema={"type": "object"} if schema else None)


def ask(client: LLMClient, *numbers: int, schema: bool = False) -> list[Reply | BaseException]:
    async def all_of_them() -> list[Reply | BaseException]:
        tasks = (client.complete(question(n, schema)) for n in numbers)
        return await asyncio.gather(*tasks, return_exceptions=True)

    return asyncio.run(all_of_them())


def test_a_reply_is_stored_with_its_facts_and_asked_for_once(start: Start) -> None:
    client, server = start({"prompt_price": 10.0, "completion_price": 20.0})
    (first,) = ask(client, 1)
    assert isinstance(first, Reply)
    assert client.recall(question(1)) == first
    assert ask(client, 1, 1) == [first, first]
    assert len(server.events("asked")) == 1
    (answered,) = server.events("answered")
    assert first.prompt_tokens == answered["prompt_tokens"]
    assert first.cost == pytest.approx(
        (10 * answered["prompt_tokens"] + 20 * answered["completion_tokens"]) / 1e6
    )
    assert first.latency_s is not None
    assert first.time > 0


def test_the_same_question_in_flight_is_asked_once(start: Start) -> None:
    client, server = start(latency=0.2)
    first, second = ask(client, 5, 5)
    assert first == second
    assert len(server.events("asked")) == 1


def test_every_row_is_answered_by_a_server_that_fails_often(start: Start) -> None:
    client, server = start(
        {"max_attempts": 12}, rate_limited=0.3, failing=0.1, cut=0.05, latency=0.01
    )
    replies = ask(client, *range(40))
    assert all(isinstance(reply, Reply) for reply in replies)
    assert {event["status"] for event in server.events("failed")} == {429, 500, 0}
    # A reply that was cut is the only one that may be answered twice.
    assert len(server.events("answered")) == 40
    assert any(reply.attempts > 1 for reply in replies if isinstance(reply, Reply))


def test_retry_after_is_honoured(start: Start) -> None:
    client, server = start({"max_attempts": 12}, rate_limited=0.6, retry_after=1.5, latency=0)
    ask(client, *range(6))
    by_question: dict[str, list[dict[str, Any]]] = {}
    for event in server.events():
        by_question.setdefault(event["question"], []).append(event)
    pauses = [
        later["at"] - earlier["at"]
        for events in by_question.values()
        for earlier, later in itertools.pairwise(events)
        if earlier["event"] == "failed"
    ]
    assert pauses
    assert min(pauses) >= 1.5


def test_concurrency_holds(start: Start) -> None:
    client, server = start({"concurrency": 3}, latency=0.05, concurrency=3)
    assert all(isinstance(reply, Reply) for reply in ask(client, *range(20)))
    assert max(event["in_flight"] for event in server.events("asked")) == 3
    assert server.events("failed") == []


def test_a_wrong_key_stops_at_once_and_is_not_shown(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client, server = start()
    monkeypatch.setenv("TEST_LLM_KEY", "sk-secret-0123456789")
    with caplog.at_level(logging.DEBUG):
        (error,) = ask(client, 1)
    assert isinstance(error, UserError)
    assert "TEST_LLM_KEY" in error.fix
    assert "401" in error.cause
    assert "secret" not in f"{error}{error!r}{caplog.text}"
    assert server.events("asked") == []


def test_a_missing_key_is_named(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    client, _ = start()
    monkeypatch.delenv("TEST_LLM_KEY")
    (error,) = ask(client, 1)
    assert isinstance(error, UserError)
    assert "TEST_LLM_KEY is not set" in error.cause


def test_the_key_may_lie_in_a_file(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client, server = start()
    key = tmp_path / "key"
    key.write_text(os.environ["TEST_LLM_KEY"] + "\n")
    monkeypatch.delenv("TEST_LLM_KEY")
    monkeypatch.setenv("TEST_LLM_KEY_FILE", str(key))
    (reply,) = ask(client, 1)
    assert not isinstance(reply, Exception)
    assert len(server.events("answered")) == 1


def test_a_key_file_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOME_KEY_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="SOME_KEY_FILE"):
        find_key(LLMSection(api_key_env="SOME_KEY"))


def test_a_server_without_structured_output_is_asked_without(start: Start) -> None:
    client, server = start({"concurrency": 1}, no_schema=True)
    replies = ask(client, 1, 2, 3, schema=True)
    assert all(isinstance(reply, Reply) for reply in replies)
    assert len(server.events("refused")) == 2  # by schema, then any JSON; then it is known


def test_rows_that_a_server_refuses_cost_themselves_only(start: Start) -> None:
    """As content filters do; even where they come first, or are all that is left."""
    client, server = start({"concurrency": 1}, refuse="对话[1-5]$")
    for _ in range(2):
        replies = ask(client, 1, 2, 3, 4, 5, schema=True)
        assert [getattr(reply, "reason", "") for reply in replies] == ["bad_request"] * 5
        client = LLMClient(client.settings, client.store)
    assert len(server.events("answered")) == 2  # once a process, something harmless
    assert isinstance(ask(client, 6, schema=True)[0], Reply)
    assert server.events("asked")[-1]["format"] == "json_schema"


def test_settings_that_a_server_refuses_stop_the_job(start: Start) -> None:
    client, server = start({"concurrency": 2}, refuse=".")
    replies = ask(client, 1, 2, 3, 4)
    assert any(isinstance(reply, UserError) for reply in replies)
    (error,) = {str(reply) for reply in replies if isinstance(reply, UserError)}
    assert "refused the request (HTTP 400): " in error
    assert "check model" in error
    assert server.events("answered") == []


def test_a_used_up_balance_stops_the_job_and_rejects_nothing(start: Start) -> None:
    client, _ = start({"concurrency": 1}, refuse="对话2", refuse_status=402)
    reply, error = ask(client, 1, 2)
    assert isinstance(reply, Reply)
    assert isinstance(error, UserError)
    assert "add credit" in error.fix


def test_half_a_character_in_a_reply_is_stored_as_its_escape(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = start()
    message = SimpleNamespace(content='{"a": "好的\ud83d"}', refusal=None)
    choices = [SimpleNamespace(message=message, finish_reason="stop")]
    completion = SimpleNamespace(choices=choices, usage=None, model="m")

    async def answer(request: Request) -> SimpleNamespace:
        return completion

    monkeypatch.setattr(client, "_call", answer)
    (reply,) = ask(client, 1)
    assert isinstance(reply, Reply)
    assert client.recall(question(1)) == reply
    with pytest.raises(ValueError, match="surrogate"):
        json_object(reply.text)


def test_a_server_that_is_gone_stops_the_job_instead_of_rejecting_rows(start: Start) -> None:
    client, server = start({"max_attempts": 2})
    assert isinstance(ask(client, 1)[0], Reply)
    server.kill()
    (error,) = ask(LLMClient(client.settings, client.store), 2)
    assert isinstance(error, UserError)
    assert "does not answer" in error.cause
    assert client.recall(question(1)) is not None


def test_a_row_that_always_fails_is_rejected_though_no_other_is_left(start: Start) -> None:
    client, server = start({"max_attempts": 2}, refuse="对话1$", refuse_status=500)
    (reply,) = ask(client, 1)
    assert isinstance(reply, Rejected)
    assert reply.reason == "no_reply"
    assert len(server.events("answered")) == 1  # something harmless


def test_a_row_that_always_fails_is_rejected_while_others_are_answered(start: Start) -> None:
    client, _ = start({"max_attempts": 3, "concurrency": 50}, failing=0.7, latency=0.3, jitter=0.3)
    replies = ask(client, *range(50))
    rejected = [reply for reply in replies if isinstance(reply, Rejected)]
    assert rejected
    assert rejected[0].reason == "no_reply"
    assert "HTTP 500" in rejected[0].detail


def test_the_budget_is_never_exceeded_and_a_higher_one_goes_on(
    start: Start, tmp_path: Path
) -> None:
    prices = {"prompt_price": 1000.0, "completion_price": 1000.0, "max_tokens": 200}
    client, server = start({**prices, "max_cost": 1.0}, latency=0.01)
    replies = ask(client, *range(30))
    done = [reply for reply in replies if isinstance(reply, Reply)]
    assert any(isinstance(reply, BudgetReached) for reply in replies)
    spent = sum(reply.cost or 0 for reply in done)
    assert 0.5 < spent <= 1.0
    more = LLMClient(client.settings.model_copy(update={"max_cost": 50.0}), client.store)
    assert all(isinstance(reply, Reply) for reply in ask(more, *range(30)))
    assert len(server.events("answered")) == 30


def test_offline_a_miss_is_an_error_that_names_it(tmp_path: Path) -> None:
    store = ReplyStore(Workspace.open(str(tmp_path)))
    client = LLMClient(LLMSection(offline=True), store)
    (error,) = ask(client, 1)
    assert isinstance(error, UserError)
    assert "recorded:" in error.fix


def test_a_dead_process_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its leases end when it is silent, and what it waited for is not granted to it."""
    monkeypatch.setattr("milm_ray.llm.limits._DEAD_S", 0.3)

    async def scenario() -> tuple[int | None, int | None]:
        limits = Limits(LLMSection(concurrency=1))
        assert await limits.acquire(1, 0.0, holder="killed") is not None
        waiting = asyncio.ensure_future(limits.acquire(1, 0.0, holder="killed"))
        await asyncio.sleep(0.4)
        async with asyncio.timeout(60):  # the lease itself would last for minutes
            return await limits.acquire(1, 0.0, holder="successor"), await waiting

    lease, granted_to_the_dead = asyncio.run(scenario())
    assert lease is not None
    assert granted_to_the_dead == SILENT


def test_requests_per_minute_and_tokens_per_minute_hold() -> None:
    async def granted(settings: LLMSection, tokens: int) -> int:
        limits, number = Limits(settings), 0
        for _ in range(20):
            try:
                lease = await asyncio.wait_for(limits.acquire(tokens, 0.0), 0.05)
            except TimeoutError:
                break
            assert lease is not None
            await limits.release(lease, tokens, None)
            number += 1
        return number

    assert asyncio.run(granted(LLMSection(requests_per_minute=7), 10)) == 7
    assert asyncio.run(granted(LLMSection(tokens_per_minute=100), 30)) == 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1}', {"a": 1}),
        ('```json\n{"a": 1}\n```', {"a": 1}),
        ('<think>{"a": 2}</think>\n{"a": 1}', {"a": 1}),
        ('{"a": "\\ud83d\\ude00"}', {"a": "😀"}),
    ],
)
def test_a_json_object_is_read_bare_fenced_or_after_reasoning(text: str, value: object) -> None:
    assert json_object(text) == value


@pytest.mark.parametrize(
    "text",
    [
        *["", "[1]", '好的：{"a": 1}', '{"a": 1', '{"a": 1} 完', "null"],
        '{"a": ["好的\\ud83d"]}',  # half of a surrogate pair
    ],
)
def test_anything_else_is_not_a_json_object(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        json_object(text)
