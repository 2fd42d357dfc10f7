"""Ask an LLM about every row of a table: all cores of a cluster asking, one result per row.

Two passes. The first sends what the reply store does not hold, from actors of a Ray Data pipeline,
and keeps every reply as it arrives; it is skipped when there is nothing to send. The second reads
the store in the order of the rows. So the results do not depend on who asked what when, and a run
that was killed at any moment goes on by running again.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import pyarrow as pa

from milm_ray.config import Config, LLMSection
from milm_ray.errors import UserError
from milm_ray.job import connect
from milm_ray.llm.client import BudgetReached, LLMClient, Rejected, not_recorded
from milm_ray.llm.limits import reach_limits, shared_limits
from milm_ray.llm.prices import cost_of, price_of
from milm_ray.llm.progress import Progress
from milm_ray.llm.replies import Reply, Request, request_key
from milm_ray.llm.reply_store import ReplyStore
from milm_ray.llm.tokens import estimate_tokens
from milm_ray.workspace import Workspace

Row = dict[str, Any]


class Unusable(Exception):
    """A reply that cannot be used: a short reason to count by, and what exactly is wrong."""

    def __init__(self, reason: str, detail: str = "", repairable: bool = True) -> None:
        self.reason = reason
        self.detail = detail
        self.repairable = repairable
        super().__init__(f"{reason}: {detail}")


class Task(Protocol):
    """How a row becomes a request and a reply becomes a value. Pickled to every asking process."""

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
        answer.reason, answer.detail = error.reason, error.detail
        answer.repairable = error.repairable
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


class Asking:
    """Questions about rows to one LLM, over one reply store."""

    def __init__(
        self, config: Config, settings: LLMSection, workspace: Workspace, task: Task, what: str
    ) -> None:
        """settings: the section of `config` to ask; what: the stage's name, for messages.

        Ray is started (or joined) only when there is something to ask.
        """
        self._config = config
        self.settings = settings
        self.task = task
        self.what = what
        self._workspace = workspace
        self._store = ReplyStore(workspace, settings.recorded)
        self.usage = Usage()

    def from_store(self, row: Row) -> Answer | Request:
        """The answer to a row if the store holds it, else the first request still to be sent."""
        steps = exchange(self.task, row)
        request = next(steps)
        first = True
        while True:
            key = request_key(self.settings, request)
            reply = self._store.get(key, request.subject)
            if reply is None and (first or not self.settings.offline):
                return request
            try:
                request = steps.send(reply)
            except StopIteration as end:
                return end.value
            first = False

    def not_recorded(self, row: Row) -> str:
        """ "not_recorded" where no store holds the reply to a row's own request, else ""."""
        request = self.task.request(row)
        key = request_key(self.settings, request)
        return "" if self._store.get(key, request.subject) else "not_recorded"

    def missing(self, rows: Sequence[Row]) -> list[tuple[int, Request]]:
        """The rows that need a call, by position, each with its next request."""
        found = ((number, self.from_store(row)) for number, row in enumerate(rows))
        return [(number, step) for number, step in found if isinstance(step, Request)]

    def estimate(self, missing: Sequence[tuple[int, Request]]) -> tuple[int, int, float | None]:
        """Prompt tokens, completion tokens and USD of the calls still to be made.

        Scaled by what this model's replies in the store used; without any, by the estimate of
        `llm.tokens` and a reply as long as the client's own question.
        """
        asked = [sum(estimate_tokens(m["content"]) for m in r.messages) for _, r in missing]
        prompt = sum(asked)
        last = [estimate_tokens(r.messages[-1]["content"]) for _, r in missing]
        completion = sum(min(self.settings.max_tokens, tokens) for tokens in last)
        return prompt, completion, cost_of(price_of(self.settings), prompt, completion)

    def run(self, rows: Sequence[Row]) -> Iterator[Answer]:
        """Answers in the order of the rows; asks first for whatever is missing.

        Raises UserError: a miss while offline, `max_cost` reached, the server refuses, the store
        cannot be written. What has arrived by then is kept.
        """
        missing = self.missing(rows)
        failed: dict[int, tuple[str, str]] = {}
        if missing:
            if self.settings.offline:
                raise not_recorded(self.settings, missing[0][1], len(missing))
            failed = self._send(rows, missing)
            self._store.refresh()
        seen: set[str] = set()
        for number, row in enumerate(rows):
            if number in failed:
                reason, detail = failed[number]
                yield Answer(row, reason=reason, detail=detail)
                continue
            answer = self.from_store(row)
            if isinstance(answer, Request):
                raise RuntimeError(f"the reply to {answer.subject} is not in the store")
            for reply in answer.replies:
                if reply.key not in seen:
                    seen.add(reply.key)
                    self.usage.add(reply)
            yield answer

    def _spent(self, rows: Sequence[Row], missing: set[int]) -> float:
        """USD that the rows answered already have cost."""
        total = 0.0
        for number, row in enumerate(rows):
            answer = self.from_store(row) if number not in missing else None
            if isinstance(answer, Answer):
                total += sum(reply.cost or 0.0 for reply in answer.replies)
        return total

    def _send(
        self, rows: Sequence[Row], missing: Sequence[tuple[int, Request]]
    ) -> dict[int, tuple[str, str]]:
        """Ask for what is missing; returns reason and detail of rows that got no reply."""
        import ray

        connect(self._config)
        if self.settings.max_cost is not None and price_of(self.settings) is None:
            raise UserError(
                f"max_cost is set, but no price is known for {self.settings.model}",
                "give prompt_price and completion_price (USD per million tokens) beside max_cost",
            )
        # The same question is asked once, whichever rows share it.
        first_with: dict[str, int] = {}
        for number, request in missing:
            first_with.setdefault(request_key(self.settings, request), number)
        wanted = list(first_with.values())
        spent = self._spent(rows, {number for number, _ in missing})
        _, actor = shared_limits(self.settings, spent)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        size, per_actor, actors = _shape(len(wanted), self.settings.concurrency)
        blocks = [
            pa.table(
                {
                    "number": pa.array(numbers, pa.int64()),
                    "row": pa.array([_pack(rows[n]) for n in numbers], pa.binary()),
                }
            )
            for numbers in (wanted[i : i + size] for i in range(0, len(wanted), size))
        ]
        outcomes = ray.data.from_arrow(blocks).map_batches(
            _Asker,
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=actors,
                max_tasks_in_flight_per_actor=per_actor,
                max_concurrent_calls_per_actor=per_actor,
            ),
            num_cpus=0.5,
            fn_constructor_kwargs={
                "settings": self.settings,
                "workspace": self._workspace,
                "task": self.task,
                "limits": actor,
                "secrets": _Secrets(self.settings),
            },
        )
        failed: dict[int, tuple[str, str]] = {}
        stopped: dict[str, Any] | None = None
        known = len(rows) - len(wanted)
        with Progress(self.what, len(rows), known, spent if price_of(self.settings) else None) as p:
            for outcome in outcomes.iter_rows():
                if outcome["outcome"] == "stopped":
                    stopped = stopped or outcome
                    continue
                if outcome["outcome"] == "failed":
                    failed[outcome["number"]] = (outcome["reason"], outcome["detail"])
                p.add(
                    rejected=outcome["outcome"] != "answered",
                    tokens=outcome["tokens"],
                    cost=outcome["cost"],
                )
        del actor
        if stopped is not None:
            raise UserError(stopped["reason"], stopped["detail"])
        keys = {number: key for key, number in first_with.items()}
        failed_keys = {keys[number]: why for number, why in failed.items()}
        return {
            number: failed_keys[key]
            for number, request in missing
            if (key := request_key(self.settings, request)) in failed_keys
        }


class _Secrets:
    """The key and the address on their way to the asking processes; shows nothing of itself."""

    __slots__ = ("_values",)

    def __init__(self, settings: LLMSection) -> None:
        names = (settings.api_key_env, "OPENAI_BASE_URL")
        self._values = {name: os.environ[name] for name in names if name in os.environ}

    def __repr__(self) -> str:
        return "<secrets>"

    def install(self) -> None:
        os.environ.update(self._values)


_OUTCOME = pa.schema(
    {
        "number": pa.int64(),
        "outcome": pa.string(),  # answered | rejected | failed | stopped
        "reason": pa.string(),
        "detail": pa.string(),
        "tokens": pa.int64(),
        "cost": pa.float64(),
    }
)


class _Asker:
    """An asking process: all rows of all its blocks at once, as the limits allow.

    In: number, row. Out (1:1): _OUTCOME.
    """

    def __init__(
        self,
        settings: LLMSection,
        workspace: Workspace,
        task: Task,
        limits: Any,
        secrets: _Secrets,
    ) -> None:
        secrets.install()
        self._task = task
        self._store = ReplyStore(workspace, settings.recorded)
        self._client = LLMClient(settings, self._store, reach_limits(limits))
        self._stopped: UserError | None = None

    async def __call__(self, batch: pa.Table) -> Any:
        # After a crash another process's block may come here: its replies are not asked for again.
        await asyncio.to_thread(self._store.refresh)
        numbers = batch.column("number").to_pylist()
        rows = [_unpack(packed) for packed in batch.column("row").to_pylist()]
        outcomes = await asyncio.gather(*map(self._outcome, numbers, rows))
        yield pa.Table.from_pylist(outcomes, schema=_OUTCOME)

    async def _outcome(self, number: int, row: Row) -> Row:
        outcome: Row = {"number": number, "outcome": "stopped", "tokens": 0, "cost": None}
        try:
            if self._stopped is not None:
                raise self._stopped
            answer = await self._answer(row)
        except Rejected as error:
            return {**outcome, "outcome": "failed", "reason": error.reason, "detail": error.detail}
        except UserError as error:
            self._stopped = error
            return {**outcome, "reason": error.cause, "detail": error.fix}
        for reply in answer.replies:
            outcome["tokens"] += (reply.prompt_tokens or 0) + (reply.completion_tokens or 0)
            if reply.cost is not None:
                outcome["cost"] = (outcome["cost"] or 0.0) + reply.cost
        outcome["outcome"] = "answered" if answer.ok else "rejected"
        return {**outcome, "reason": answer.reason, "detail": answer.detail}

    async def _answer(self, row: Row) -> Answer:
        steps = exchange(self._task, row)
        request = next(steps)
        while True:
            try:
                reply = await self._client.complete(request)
            except BudgetReached:
                limit = self._client.settings.max_cost
                raise UserError(
                    f"max_cost of ${limit:,.2f} is reached; the replies so far are kept",
                    "raise max_cost and run the same command again to go on",
                ) from None
            try:
                request = steps.send(reply)
            except StopIteration as end:
                return end.value


def _shape(rows: int, concurrency: int) -> tuple[int, int, int]:
    """Rows per block, blocks in flight per actor, actors: at least twice what may be in flight.

    Small blocks, many of them at once: no call waits for the slowest of a batch. One event loop
    serves some hundred calls a second, so more actors only at a high concurrency.
    """
    actors = max(1, min(concurrency // 256 + 1, rows))
    size = max(1, min(8, concurrency // 4))
    per_actor = -(-2 * concurrency // (size * actors)) + 1
    return size, per_actor, actors


def _pack(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def _unpack(packed: bytes) -> Row:
    return json.loads(packed)
