"""What one row needs of an LLM: its question, perhaps one repair, and the answer made of them."""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from milm_ray.llm.replies import Reply, Request

Row = dict[str, Any]
# Why a row has no reply: nothing was paid for it, so the next run asks again.
WITHOUT_REPLY = {"no_reply", "bad_request"}


class Unusable(Exception):
    """A reply that cannot be used: a short reason to count by, and what exactly is wrong."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


class Task(Protocol):
    """How a row becomes a request and a reply becomes a value. Pickled to every asking process.

    reply_tokens: about how long a reply is, for estimates before any reply is in the store.
    """

    reply_tokens: int

    def request(self, row: Row) -> Request:
        """What is asked about a row; a pure function."""
        ...

    def parse(self, row: Row, text: str) -> Any:
        """The value in a reply; raises Unusable."""
        ...


@dataclass
class Answer:
    """What became of one row.

    reply: the last reply, None when none came; replies: all of them (a repaired row has two);
    value: what `Task.parse` made of it, None for a reject; reason, detail: why it was rejected;
    repairable: whether asking again, with what is wrong, may help.
    """

    row: Row
    reply: Reply | None = None
    replies: list[Reply] = field(default_factory=list)
    value: Any = None
    reason: str = ""
    detail: str = ""
    repairable: bool = False

    @property
    def ok(self) -> bool:
        return not self.reason

    @property
    def why(self) -> str:
        """Reason and detail of a reject; of a server's words, which each try may word anew (a
        request's number), the status alone: a table that holds it stays the same."""
        status = re.search(r"HTTP \d+", self.detail)
        if self.reason in WITHOUT_REPLY:
            return f"{self.reason}: {status.group()}" if status else self.reason
        return f"{self.reason}: {self.detail}"


# Finish reasons after which the text is not a result, and the name each is counted under.
_UNUSABLE_FINISH = {"length": "truncated", "content_filter": "filtered", "refusal": "refused"}


def exchange(task: Task, row: Row) -> Generator[Request, Reply | None, Answer]:
    """The questions that one row needs: its own, and one attempt at repairing an unusable reply.

    Yields each request, takes its reply (None for a repair that cannot be had), returns the answer.
    The same steps serve the asking processes and the reading of the store.
    """
    request = task.request(row)
    reply = yield request
    if reply is None:
        return Answer(row, reason="no_reply")
    answer = _judge(task, Answer(row, reply, [reply]))
    if not answer.repairable:
        return answer
    mended = yield _repair(request, reply, f"{answer.reason}: {answer.detail}")
    return answer if mended is None else _judge(task, Answer(row, mended, [reply, mended]))


def _judge(task: Task, answer: Answer) -> Answer:
    """Parse the last reply of an answer; fills its value, or the reason why there is none."""
    reply = answer.replies[-1]
    if reply.finish_reason in _UNUSABLE_FINISH:
        answer.reason = _UNUSABLE_FINISH[reply.finish_reason]
        answer.detail = f"finish reason {reply.finish_reason}"
        return answer
    try:
        answer.value = task.parse(answer.row, reply.text)
    except Unusable as error:
        answer.reason, answer.detail, answer.repairable = error.reason, error.detail, True
    return answer


def _repair(request: Request, reply: Reply, fault: str) -> Request:
    """The same question with the unusable reply and what is wrong with it."""
    complaint = (
        f"上面的回复不能使用（{fault}）。请按原来的要求重新输出：只输出一个完整、合法的 JSON 对象，"
        "不要输出任何其他文字。"
    )
    return Request(
        messages=[
            *request.messages,
            {"role": "assistant", "content": reply.text[:8000]},
            {"role": "user", "content": complaint},
        ],
        schema=request.schema,
        subject=replace(request.subject, prompt=f"repair of {request.subject.prompt}"),
        version=request.version,
    )


@dataclass
class Usage:
    """What the replies behind a result used. Unknown figures are counted, never taken as zero."""

    replies: int = 0
    recorded_by_name: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tokens_unknown: int = 0
    cost: float = 0.0
    cost_unknown: int = 0

    def add(self, reply: Reply) -> None:
        self.replies += 1
        self.recorded_by_name += reply.finish_reason == "recorded"
        if reply.prompt_tokens is None or reply.completion_tokens is None:
            self.tokens_unknown += 1
        else:
            self.prompt_tokens += reply.prompt_tokens
            self.completion_tokens += reply.completion_tokens
        if reply.cost is None:
            self.cost_unknown += 1
        else:
            self.cost += reply.cost

    def facts(self) -> dict[str, Any]:
        """For a manifest: totals over the replies whose figures are known, and how many are not.

        cost_usd is None when no reply's cost is known.
        """
        known = self.replies - self.cost_unknown
        return {
            "replies": self.replies,
            "recorded_by_name": self.recorded_by_name,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "replies_with_unknown_tokens": self.tokens_unknown,
            "cost_usd": round(self.cost, 6) if known else None,
            "replies_with_unknown_cost": self.cost_unknown,
        }
