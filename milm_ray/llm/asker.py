"""The asking process: an actor of a Ray Data pipeline that keeps many calls in flight."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from milm_ray.config import LLMSection
from milm_ray.errors import UserError
from milm_ray.llm.client import BudgetReached, LLMClient, Rejected, find_key
from milm_ray.llm.exchange import Answer, Row, Task, exchange
from milm_ray.llm.limits import SharedLimits
from milm_ray.llm.replies import Reply
from milm_ray.llm.reply_store import ReplyStore
from milm_ray.workspace import Workspace

OUTCOME = pa.schema(
    {
        "number": pa.int64(),
        "outcome": pa.string(),  # answered | rejected | failed | stopped
        "reason": pa.string(),
        "detail": pa.string(),
        "tokens": pa.int64(),
        "cost": pa.float64(),
    }
)


class Secrets:
    """The key and the address on their way to the asking processes; shows nothing of itself."""

    __slots__ = ("_values",)

    def __init__(self, settings: LLMSection) -> None:
        values = {
            settings.api_key_env: find_key(settings) if settings.api_key_env else None,
            "OPENAI_BASE_URL": os.environ.get("OPENAI_BASE_URL"),
        }
        self._values = {name: value for name, value in values.items() if value}

    def __repr__(self) -> str:
        return "<secrets>"

    def install(self) -> None:
        os.environ.update(self._values)


class Asker:
    """All rows of all its blocks at once, as far as the shared limits allow.

    In: number, row (see `blocks`). Out, 1:1: OUTCOME. A reply that came is in the store by then.
    """

    def __init__(
        self,
        settings: LLMSection,
        workspace: Workspace,
        task: Task,
        limits: SharedLimits,
        secrets: Secrets,
    ) -> None:
        secrets.install()
        self._task = task
        self._store = ReplyStore(workspace, settings.recorded)
        self._client = LLMClient(settings, self._store, limits)
        self._stopped: UserError | None = None

    async def __call__(self, batch: pa.Table) -> Any:
        # After a crash another process's block may come here: its replies are not asked for again.
        await asyncio.to_thread(self._store.refresh)
        numbers = batch.column("number").to_pylist()
        rows = [json.loads(packed) for packed in batch.column("row").to_pylist()]
        outcomes = await asyncio.gather(*map(self._outcome, numbers, rows))
        yield pa.Table.from_pylist(outcomes, schema=OUTCOME)

    async def _outcome(self, number: int, row: Row) -> Row:
        outcome: Row = {"number": number, "outcome": "stopped", "tokens": 0, "cost": None}
        replies: list[Reply] = []
        try:
            if self._stopped is not None:
                raise self._stopped
            answer = await self._answer(row, replies)
        except Rejected as error:
            outcome |= {"outcome": "failed", "reason": error.reason, "detail": error.detail}
        except UserError as error:
            self._stopped = error
            return {**outcome, "reason": error.cause, "detail": error.fix}
        else:
            how = "answered" if answer.ok else "rejected"
            outcome |= {"outcome": how, "reason": answer.reason, "detail": answer.detail}
        for reply in replies:
            outcome["tokens"] += (reply.prompt_tokens or 0) + (reply.completion_tokens or 0)
            if reply.cost is not None:
                outcome["cost"] = (outcome["cost"] or 0.0) + reply.cost
        return outcome

    async def _answer(self, row: Row, replies: list[Reply]) -> Answer:
        """replies: where each is put as it comes, so that none is lost if a later one fails."""
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
            replies.append(reply)
            try:
                request = steps.send(reply)
            except StopIteration as end:
                return end.value


def blocks(rows: Sequence[Row], wanted: Sequence[int], size: int) -> list[pa.Table]:
    """The wanted rows, by place, packed into tables of `size` rows for the asking processes."""
    starts = range(0, len(wanted), size)
    return [_block(rows, wanted[start : start + size]) for start in starts]


def _block(rows: Sequence[Row], numbers: Sequence[int]) -> pa.Table:
    packed = [json.dumps(rows[number], ensure_ascii=False).encode() for number in numbers]
    return pa.table({"number": pa.array(numbers, pa.int64()), "row": pa.array(packed, pa.binary())})


def shape(rows: int, concurrency: int) -> tuple[int, int, int]:
    """Rows per block, blocks in flight per actor, actors: at least twice what may be in flight.

    Small blocks, many of them at once: no call waits for the slowest of a batch. One event loop
    serves some hundred calls a second, so more actors only at a high concurrency.
    """
    actors = max(1, min(concurrency // 256 + 1, rows))
    size = max(1, min(8, concurrency // 4))
    per_actor = -(-2 * concurrency // (size * actors)) + 1
    return size, per_actor, actors
