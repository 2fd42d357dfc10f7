"""Ask an LLM about every row of a table: the whole cluster asking, one result per row.

Two passes. The first sends what the reply store does not hold, from actors of a Ray Data pipeline,
and keeps every reply as it arrives; it is skipped when there is nothing to send. The second reads
the store in the order of the rows. So the results do not depend on who asked what when, and a run
that was killed at any moment goes on by running again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from milm_ray.config import Config, LLMSection
from milm_ray.errors import UserError
from milm_ray.job import Plan, connect, finished, log
from milm_ray.llm.asker import Asker, Secrets, blocks, shape
from milm_ray.llm.client import not_recorded
from milm_ray.llm.exchange import WITHOUT_REPLY, Answer, Row, Task, Usage, exchange
from milm_ray.llm.limits import shared_limits
from milm_ray.llm.prices import cost_of, price_of
from milm_ray.llm.progress import Progress
from milm_ray.llm.replies import Reply, Request, request_key
from milm_ray.llm.reply_store import ReplyStore
from milm_ray.llm.tokens import estimate_tokens
from milm_ray.workspace import Workspace


class Call(NamedTuple):
    """A call still to be made: for which row, the key of its reply, about how long its prompt is.

    Not the request itself: those of a million rows are longer than the rows.
    """

    number: int
    key: str
    prompt_tokens: int


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
        return self._recall(row)[0]

    def _recall(self, row: Row) -> tuple[Answer | Request, list[Reply]]:
        """As `from_store`, and the replies up to there: a row whose repair is missing has one."""
        steps = exchange(self.task, row)
        request = next(steps)
        replies: list[Reply] = []
        while True:
            key = request_key(self.settings, request)
            reply = self._store.get(key, request.subject)
            if reply is not None:
                replies.append(reply)
            elif not replies or not self.settings.offline:
                return request, replies
            try:
                request = steps.send(reply)
            except StopIteration as end:
                return end.value, replies

    def not_recorded(self, row: Row) -> str:
        """`not_recorded` where no store holds the reply to a row's own request, else empty."""
        request = self.task.request(row)
        key = request_key(self.settings, request)
        return "" if self._store.get(key, request.subject) else "not_recorded"

    def missing(self, rows: Sequence[Row]) -> list[Call]:
        """The next call of each row that needs one."""
        found = ((number, self.from_store(row)) for number, row in enumerate(rows))
        return [
            Call(number, request_key(self.settings, step), _prompt_estimate(step))
            for number, step in found
            if isinstance(step, Request)
        ]

    def estimate(
        self, rows: Sequence[Row], missing: Sequence[Call]
    ) -> tuple[int, int, float | None]:
        """Prompt tokens, completion tokens and USD of the calls still to be made.

        Scaled by what this model's replies to the other rows used, repairs included; before there
        is any, by `llm.tokens` and the task's usual length of a reply.
        """
        asked = sum(call.prompt_tokens for call in missing)
        numbers = {call.number for call in missing}
        known = (self.from_store(row) for number, row in enumerate(rows) if number not in numbers)
        used, estimated, answered = Usage(), 0, 0
        for answer in known:
            if isinstance(answer, Answer) and answer.replies[0].prompt_tokens is not None:
                estimated += _prompt_estimate(self.task.request(answer.row))
                answered += 1
                for reply in answer.replies:
                    used.add(reply)
        prompt, completion = asked, len(missing) * self.task.reply_tokens
        if answered and estimated:
            prompt = round(asked * used.prompt_tokens / estimated)
            completion = round(len(missing) * used.completion_tokens / answered)
        return prompt, completion, cost_of(price_of(self.settings), prompt, completion)

    def plan(self, rows: Sequence[Row], *notes: str, count: int | None = None) -> Plan:
        """What answering the rows would take. count: what to call their number, where a row here is
        not a row of the stage."""
        missing = self.missing(rows)
        prompt, completion, cost = self.estimate(rows, missing)
        shown = len(rows) if count is None else count
        return Plan(shown, len(missing), prompt, completion, cost, notes=notes)

    def run(self, rows: Sequence[Row]) -> Iterator[Answer]:
        """Answers in the order of the rows; asks first for whatever is missing.

        Raises UserError: a miss while offline, `max_cost` reached, the server refuses or is gone,
        the store cannot be written. What has arrived by then is kept.
        """
        missing = self.missing(rows)
        failed: dict[int, tuple[str, str]] = {}
        if missing:
            if self.settings.offline:
                request = self.from_store(rows[missing[0].number])
                assert isinstance(request, Request)
                raise not_recorded(self.settings, request, len(missing))
            failed = self._send(rows, missing)
            self._store.refresh()
        seen: set[str] = set()
        for number, row in enumerate(rows):
            answer, replies = self._recall(row)
            for reply in replies:
                if reply.key not in seen:
                    seen.add(reply.key)
                    self.usage.add(reply)
            if number in failed:
                reason, detail = failed[number]
                last = replies[-1] if replies else None
                answer = Answer(row, last, replies, reason=reason, detail=detail)
            if isinstance(answer, Request):
                raise RuntimeError(f"the reply to {answer.subject} is not in the store")
            yield answer

    def _spent(self, rows: Iterable[Row]) -> float:
        """USD that the replies to these rows have cost so far."""
        costs: dict[str, float] = {}
        for row in rows:
            costs.update((reply.key, reply.cost or 0.0) for reply in self._recall(row)[1])
        return sum(costs.values())

    def _send(self, rows: Sequence[Row], missing: Sequence[Call]) -> dict[int, tuple[str, str]]:
        """Ask for what is missing; returns reason and detail of rows that got no reply."""
        priced = price_of(self.settings) is not None
        if self.settings.max_cost is not None and not priced:
            raise UserError(
                f"max_cost is set, but no price is known for {self.settings.model}",
                "give prompt_price and completion_price (USD per million tokens) beside max_cost",
            )
        # The same question is asked once, whichever rows share it.
        keys = {call.number: call.key for call in missing}
        first_with: dict[str, int] = {}
        for number, key in keys.items():
            first_with.setdefault(key, number)
        wanted = list(first_with.values())
        # A missing row's first reply, which waits for its repair, is paid for too; the asking
        # processes report it together with the repair.
        spent = self._spent(row for number, row in enumerate(rows) if number not in keys)
        waiting = self._spent(rows[number] for number in wanted)
        connect(self._config)
        failed: dict[str, tuple[str, str]] = {}
        stopped: Mapping[str, Any] | None = None
        known = len(rows) - len(wanted)
        with Progress(self.what, len(rows), known, spent if priced else None) as progress:
            for outcome in self._outcomes(rows, wanted, spent + waiting):
                if outcome["outcome"] == "stopped":
                    stopped = stopped or outcome
                    continue
                if outcome["outcome"] == "failed":
                    failed[keys[outcome["number"]]] = (outcome["reason"], outcome["detail"])
                progress.add(
                    rejected=outcome["outcome"] != "answered",
                    tokens=outcome["tokens"],
                    cost=outcome["cost"],
                )
        if stopped is not None:
            raise UserError(stopped["reason"], stopped["detail"])
        return {number: failed[key] for number, key in keys.items() if key in failed}

    def _outcomes(
        self, rows: Sequence[Row], wanted: Sequence[int], spent: float
    ) -> Iterator[Mapping[str, Any]]:
        """One row of OUTCOME per wanted row, in the order in which they are done."""
        import ray.data

        _quiet()
        limits = shared_limits(self.settings, spent)
        size, per_actor, actors = shape(len(wanted), self.settings.concurrency)
        outcomes = ray.data.from_arrow(blocks(rows, wanted, size)).map_batches(
            Asker,
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
                "limits": limits,
                "secrets": Secrets(self.settings),
            },
        )
        yield from outcomes.iter_rows()


def unasked(reasons: Iterable[str]) -> bool:
    """Whether some row was rejected without a reply (reasons: those in an artifact's counts)."""
    return not WITHOUT_REPLY.isdisjoint(reasons)


def make_or_ask_again(
    workspace: Workspace,
    artifact: str,
    fingerprint: Mapping[str, Any],
    has_unasked: Callable[[Workspace], bool],
    make: Callable[[], Any],
) -> None:
    """Make an artifact that is not there, or anew for the rows of it that have no reply.

    A few of them must not hold up what needs the artifact: where the server is gone, it stays.
    """
    if not (workspace.is_done(artifact, fingerprint) and has_unasked(workspace)):
        if not finished(workspace, artifact, fingerprint):
            make()
        return
    log.info("some rows of %s/ have no reply; they are asked for again", artifact)
    try:
        make()
    except UserError as error:
        if not workspace.is_done(artifact, fingerprint):
            raise
        log.warning("%s/ stays as it is; asked again, some rows got no reply: %s", artifact, error)


def _prompt_estimate(request: Request) -> int:
    return sum(estimate_tokens(message["content"]) for message in request.messages)


def _quiet() -> None:
    """Leave the progress to `Progress`: Ray Data's own lines go to its log file."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
