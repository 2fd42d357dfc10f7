"""Asking about rows over the store alone: repairs, usage, estimates (the sending: tests/jobs)."""

import json
from pathlib import Path

import pytest

from milm_ray.config import Config
from milm_ray.dataset.curate import Judging
from milm_ray.errors import UserError
from milm_ray.llm.ask import Asking
from milm_ray.llm.asker import Secrets, shape
from milm_ray.llm.exchange import Answer, exchange
from milm_ray.llm.replies import Reply, Request, request_key
from milm_ray.llm.reply_store import ReplyStore
from milm_ray.workspace import Workspace

GOOD = json.dumps(
    {"comprehensiveness": 1, "professionalism": 2, "authenticity": 2, "safety": 1, "reason": "可"}
)
CONFIG = Config.model_validate({"judge": {"prompt_price": 10.0, "completion_price": 30.0}})


def row(number: int, words: int = 4) -> dict[str, object]:
    turns = [
        {"role": "client", "content": f"第{number}位：" + "我睡不着。" * words},
        {"role": "counselor", "content": "慢慢说。" * words},
    ]
    return {"corpus": "efaqa", "source_id": str(number), "turns": turns}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(str(tmp_path / "ws"))


def asking(workspace: Workspace, config: Config = CONFIG) -> Asking:
    return Asking(config, config.judge, workspace, Judging(), "test")


def keep(workspace: Workspace, request: Request, text: str, **facts: object) -> Reply:
    reply = Reply(request_key(CONFIG.judge, request), text, **facts)  # type: ignore[arg-type]
    ReplyStore(workspace).put([reply])
    return reply


def test_a_stored_reply_is_an_answer_and_a_missing_one_a_request(workspace: Workspace) -> None:
    keep(workspace, Judging().request(row(1)), GOOD)
    answer = asking(workspace).from_store(row(1))
    assert isinstance(answer, Answer)
    assert answer.ok
    assert answer.value["professionalism"] == 2
    missing = asking(workspace).missing([row(1), row(2)])
    assert [call.number for call in missing] == [1]


def test_an_unusable_reply_is_mended_once_and_both_are_paid_for(workspace: Workspace) -> None:
    keep(workspace, Judging().request(row(1)), "不是JSON", prompt_tokens=5, completion_tokens=2)
    step = asking(workspace).from_store(row(1))
    assert isinstance(step, Request)
    assert step.messages[-2]["content"] == "不是JSON"
    assert "not_json" in step.messages[-1]["content"]
    keep(workspace, step, GOOD, prompt_tokens=9, completion_tokens=3)
    found = asking(workspace)
    (answer,) = found.run([row(1)])
    assert answer.ok
    assert len(answer.replies) == 2
    facts = found.usage.facts()
    assert (facts["prompt_tokens"], facts["completion_tokens"]) == (14, 5)


def test_a_repair_that_is_unusable_too_is_a_reject_not_another_question(
    workspace: Workspace,
) -> None:
    keep(workspace, Judging().request(row(1)), "不是JSON")
    step = asking(workspace).from_store(row(1))
    assert isinstance(step, Request)
    keep(workspace, step, GOOD.replace("2", "7"))
    answer = asking(workspace).from_store(row(1))
    assert isinstance(answer, Answer)
    assert answer.reason == "score_out_of_range"


@pytest.mark.parametrize(
    ("finish", "reason"),
    [("length", "truncated"), ("content_filter", "filtered"), ("refusal", "refused")],
)
def test_a_cut_filtered_or_refused_reply_is_a_reject_even_where_it_parses(
    workspace: Workspace, finish: str, reason: str
) -> None:
    keep(workspace, Judging().request(row(1)), GOOD, finish_reason=finish)
    answer = asking(workspace).from_store(row(1))
    assert isinstance(answer, Answer)
    assert (answer.ok, answer.reason, answer.value) == (False, reason, None)


def test_offline_nothing_is_repaired_and_a_miss_says_how_many(workspace: Workspace) -> None:
    config = Config.model_validate({"judge": {**CONFIG.judge.model_dump(), "offline": True}})
    keep(workspace, Judging().request(row(1)), "不是JSON")
    (answer,) = asking(workspace, config).run([row(1)])
    assert answer.reason == "not_json"
    with pytest.raises(UserError, match=r"efaqa/2 \(and 1 more\)"):
        list(asking(workspace, config).run([row(1), row(2), row(3)]))


def test_the_same_reply_behind_two_rows_is_counted_once(workspace: Workspace) -> None:
    keep(
        workspace, Judging().request(row(1)), GOOD, prompt_tokens=10, completion_tokens=1, cost=0.5
    )
    found = asking(workspace)
    assert len(list(found.run([row(1), row(1)]))) == 2
    assert found.usage.facts()["cost_usd"] == 0.5


def test_a_reply_whose_repair_is_refused_or_missing_is_paid_for(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"prompt_tokens": 10, "completion_tokens": 1, "cost": 0.5}
    keep(workspace, Judging().request(row(1)), "不是JSON", **facts)
    budgets = []

    def refused(asking: Asking, rows: object, wanted: list[int], spent: float) -> list[object]:
        budgets.append(spent)
        failed = {"outcome": "failed", "reason": "bad_request", "detail": "400"}
        return [{**failed, "number": number, "tokens": 0, "cost": None} for number in wanted]

    monkeypatch.setattr("milm_ray.llm.ask.connect", lambda config: None)
    monkeypatch.setattr(Asking, "_outcomes", refused)
    for _ in range(2):
        found = asking(workspace)
        answers = list(found.run([row(1), row(1)]))
        assert [answer.reason for answer in answers] == ["bad_request", "bad_request"]
        assert answers[0].reply is not None
        assert answers[0].reply.text == "不是JSON"
        assert found.usage.facts()["replies"] == 1
        assert found.usage.facts()["cost_usd"] == 0.5
    assert budgets == [0.5, 0.5]


def test_the_budget_counts_a_reply_behind_two_rows_once(workspace: Workspace) -> None:
    keep(workspace, Judging().request(row(1)), GOOD, cost=0.5)
    assert asking(workspace)._spent([row(1), row(1), row(2)]) == 0.5


def test_unknown_tokens_stay_unknown(workspace: Workspace) -> None:
    keep(workspace, Judging().request(row(1)), GOOD)
    found = asking(workspace)
    list(found.run([row(1)]))
    facts = found.usage.facts()
    assert facts["cost_usd"] is None
    assert (facts["replies_with_unknown_tokens"], facts["replies_with_unknown_cost"]) == (1, 1)


def test_an_estimate_after_a_few_replies_is_within_a_fifth(workspace: Workspace) -> None:
    """A server that counts tokens in its own way, with a repair now and then."""
    rows = [row(number, 3 + number % 17) for number in range(120)]
    prompt = completion = 0
    replies = []
    for number, item in enumerate(rows):
        steps = exchange(Judging(), item)
        request, texts = next(steps), ["啊"] if number % 10 == 0 else []
        for text in [*texts, GOOD]:
            used = round(0.63 * sum(len(m["content"]) for m in request.messages))
            facts = {"prompt_tokens": used, "completion_tokens": len(text) // 2}
            reply = Reply(request_key(CONFIG.judge, request), text, **facts)  # type: ignore[arg-type]
            if number < 30:
                replies.append(reply)
            else:
                prompt, completion = prompt + used, completion + len(text) // 2
            try:
                request = steps.send(reply)
            except StopIteration:
                break
    ReplyStore(workspace).put(replies)
    found = asking(workspace)
    missing = found.missing(rows)
    assert len(missing) == 90
    estimate = found.estimate(rows, missing)
    assert estimate[0] == pytest.approx(prompt, rel=0.2)
    assert estimate[1] == pytest.approx(completion, rel=0.2)
    assert estimate[2] == pytest.approx((10 * prompt + 30 * completion) / 1e6, rel=0.2)


@pytest.mark.parametrize("concurrency", [1, 2, 16, 64, 300, 1000])
def test_enough_is_in_flight_for_no_call_to_wait_for_another(concurrency: int) -> None:
    size, per_actor, actors = shape(10_000, concurrency)
    assert size * (per_actor - 1) * actors >= 2 * concurrency
    assert shape(1, concurrency)[2] == 1


def test_the_key_does_not_show_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    secrets = Secrets(CONFIG.judge)
    assert "secret" not in f"{secrets!r}{secrets}".replace("<secrets>", "")
    monkeypatch.delenv("OPENAI_API_KEY")
    secrets.install()
    import os

    assert os.environ["OPENAI_API_KEY"] == "sk-very-secret"


def test_a_table_says_why_without_what_a_server_words_anew_each_time() -> None:
    refused = [
        Answer({}, reason="bad_request", detail=f"HTTP 400: refused (request id: {number})")
        for number in range(2)
    ]
    assert [answer.why for answer in refused] == ["bad_request: HTTP 400"] * 2
    gone = Answer({}, reason="no_reply", detail="6 attempts; the last: APITimeoutError: timed out")
    assert gone.why == "no_reply"
    assert Answer({}, reason="not_json", detail="no brace").why == "not_json: no brace"
