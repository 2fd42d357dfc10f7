"""Limits that hold for all callers together: requests in flight, rates, and money.

`Limits` is the plain object; `shared_limits` puts one into a named Ray actor, so that every process
and every job of the cluster draws on the same allowance. Without Ray the object itself is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import time
import uuid
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from milm_ray.config import LLMSection
from milm_ray.errors import UserError
from milm_ray.nodes import ON_HEAD

log = logging.getLogger("milm_ray")

_IDLE_S = 600.0  # after so long without a call the actor ends; the next job starts another
_BEAT_S = 5.0  # how often a process that asks says that it lives
_LOOK_S = 5.0  # how often those who wait are looked at, whatever happens
_DEAD_S = 30.0  # silent for so long: its places in flight are given to others
SILENT = -1


@dataclass
class _Sent:
    at: float
    tokens: int


@dataclass
class _Lease:
    account: str
    cost: float
    expires: float
    sent: _Sent
    holder: str


@dataclass
class _Asked:
    """A call that waits for a place, and what it will be told."""

    tokens: int
    cost: float
    account: str
    holder: str
    answer: asyncio.Future[int | None]


@dataclass
class _Account:
    """One run's money: USD spent so far, and the most that it may spend."""

    spent: float
    most: float | None


class Gate(Protocol):
    """What a caller needs of the limits, wherever they live."""

    async def acquire(self, tokens: int, cost: float) -> int | None: ...

    async def release(self, lease: int, tokens: int | None, cost: float | None) -> None: ...


class Limits:
    """Concurrency, requests and tokens per minute of one endpoint, and each run's budget.

    A call takes a lease before it is sent and gives it back with what it really used. A holder is a
    process that says at intervals that it lives (`beat`); once it is silent its leases end, and
    what it waits for is not granted, so that a killed run does not keep its successor waiting.
    """

    def __init__(self, settings: LLMSection) -> None:
        self._settings = settings
        self._accounts = {"": _Account(0.0, settings.max_cost)}
        self._leases: dict[int, _Lease] = {}
        self._window: deque[_Sent] = deque()  # the calls of the last minute
        self._asked: deque[_Asked] = deque()  # first come, first served
        self._again: asyncio.TimerHandle | None = None
        self._last_call = time.monotonic()
        self._beats: dict[str, float] = {}

    def beat(self, holder: str) -> None:
        """A process that holds leases, or wants some, is alive."""
        self._beats[holder] = time.monotonic()

    def open_account(self, account: str, settings: LLMSection, spent: float) -> None:
        """Begin a run: its limits hold from now on; spent: USD that its earlier replies cost."""
        self._settings = settings
        self._accounts[account] = _Account(spent, settings.max_cost)

    async def acquire(
        self, tokens: int, cost: float, account: str = "", holder: str = ""
    ) -> int | None:
        """Wait for a place; returns a lease, or None when the budget does not allow the call.

        tokens: estimate of prompt and completion together; cost: the most the call can cost in USD;
        holder: the process that asks, "" for this one; SILENT when it did not say that it lives.
        """
        if holder:
            self.beat(holder)
        asked = _Asked(tokens, cost, account, holder, asyncio.get_running_loop().create_future())
        self._asked.append(asked)
        self._serve()
        return await asked.answer

    async def release(
        self, lease: int, tokens: int | None, cost: float | None, account: str = ""
    ) -> None:
        """Give a lease back; tokens and cost are what the call used, None where unknown."""
        held = self._leases.pop(lease, None)
        if account in self._accounts:
            self._accounts[account].spent += cost or 0.0
        if held is not None and tokens is not None:
            held.sent.tokens = tokens
        self._serve()

    async def end_when_idle(self) -> None:
        """As an actor that outlives its job: end when nobody has called for a while."""
        import ray

        while time.monotonic() - self._last_call < _IDLE_S:
            await asyncio.sleep(_IDLE_S / 10)
        ray.actor.exit_actor()

    def _serve(self) -> None:
        """Answer those who wait, in their order, as far as the limits allow.

        One who waits for money of its own run only lets others pass.
        """
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if not self._asked:
            return
        now = self._last_call = time.monotonic()
        self._expire(now)
        later: deque[_Asked] = deque()
        look_again = 0.0
        while self._asked and not look_again:
            asked = self._asked.popleft()
            if asked.answer.done():  # cancelled
                continue
            if not self._lives(asked.holder, now):
                asked.answer.set_result(SILENT)
            elif not self._affords(asked):
                if any(lease.account == asked.account for lease in self._leases.values()):
                    later.append(asked)
                else:
                    asked.answer.set_result(None)
            elif wait := self._full_for(now, asked.tokens):
                later.append(asked)
                look_again = wait
            else:
                asked.answer.set_result(self._grant(asked, now))
        self._asked = later + self._asked
        if self._asked:
            wait = min(look_again or _LOOK_S, _LOOK_S)
            self._again = asyncio.get_running_loop().call_later(wait, self._serve)

    def _grant(self, asked: _Asked, now: float) -> int:
        # Not a counter: after a restart of the actor an old lease must not match a new one.
        lease = random.getrandbits(62)
        sent = _Sent(now, asked.tokens)
        expires = now + 2 * self._settings.timeout_s + 30
        self._leases[lease] = _Lease(asked.account, asked.cost, expires, sent, asked.holder)
        self._window.append(sent)
        return lease

    def _lives(self, holder: str, now: float) -> bool:
        return not holder or now - self._beats[holder] <= _DEAD_S

    def _expire(self, now: float) -> None:
        ended = [
            number
            for number, lease in self._leases.items()
            if lease.expires < now or not self._lives(lease.holder, now)
        ]
        for number in ended:
            del self._leases[number]
        while self._window and self._window[0].at <= now - 60:
            self._window.popleft()

    def _affords(self, asked: _Asked) -> bool:
        """Whether a run's money does; calls in flight reserve the most that they can cost."""
        money = self._accounts.get(asked.account)
        if money is None or money.most is None:
            return True
        mine = (lease.cost for lease in self._leases.values() if lease.account == asked.account)
        return money.spent + sum(mine) + asked.cost <= money.most

    def _full_for(self, now: float, tokens: int) -> float:
        """Seconds after which to look again for a place; 0 when there is one now."""
        limits = self._settings
        if len(self._leases) >= limits.concurrency:
            return _LOOK_S
        next_slot = self._window[0].at + 60 - now + 0.001 if self._window else 0.0
        if limits.requests_per_minute and len(self._window) >= limits.requests_per_minute:
            return next_slot
        if limits.tokens_per_minute and self._window:
            used = sum(sent.tokens for sent in self._window)
            if used + tokens > limits.tokens_per_minute:
                return next_slot
        return 0.0


class SharedLimits:
    """A run's access to the limits in a Ray actor; may be handed to other processes."""

    def __init__(self, actor: Any, account: str) -> None:
        self.actor = actor
        self.account = account
        self._holder = ""
        self._beating: asyncio.Task[None] | None = None

    def __reduce__(self) -> tuple[type[SharedLimits], tuple[Any, str]]:
        return SharedLimits, (self.actor, self.account)

    def _hold(self) -> str:
        """This process's name with the limits; from now on it says that it lives."""
        if self._beating is None or self._beating.done():
            self._holder = uuid.uuid4().hex
            self._beating = asyncio.ensure_future(self._beat(self._holder))
        return self._holder

    async def _beat(self, holder: str) -> None:
        while True:
            self.actor.beat.remote(holder)
            await asyncio.sleep(_BEAT_S)

    async def acquire(self, tokens: int, cost: float) -> int | None:
        """As Limits.acquire; UserError when the actor is lost, since the budget is lost with it."""
        from ray.exceptions import RayActorError

        try:
            lease = SILENT
            while lease == SILENT:  # this process was too busy to say that it lives: ask again
                lease = await self.actor.acquire.remote(tokens, cost, self.account, self._hold())
            return lease
        except RayActorError as error:
            raise UserError(
                f"the process that holds the LLM's limits was lost ({type(error).__name__})",
                "run the same command again; replies received so far are kept",
            ) from None

    async def release(self, lease: int, tokens: int | None, cost: float | None) -> None:
        from ray.exceptions import RayActorError

        with contextlib.suppress(RayActorError):  # the next acquire says so
            await self.actor.release.remote(lease, tokens, cost, self.account)


def shared_limits(settings: LLMSection, spent: float = 0.0) -> SharedLimits:
    """The cluster's limits for the endpoint of `settings`, with an account for one run.

    spent: USD that the run's earlier replies have cost. The actor is found by the endpoint's name,
    outlives the job, so that a killed one's successor meets the same rates, and ends when idle.
    """
    import ray

    endpoint = f"{settings.base_url}|{settings.model}"
    name = f"milm_ray-limits-{hashlib.sha256(endpoint.encode()).hexdigest()[:16]}"
    account = uuid.uuid4().hex
    for _ in range(3):
        actor: Any = (
            ray.remote(Limits)
            .options(
                name=name,
                namespace="milm_ray",
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,
                resources=dict(ON_HEAD),  # the loss of another node must not end every job
                max_concurrency=100_000,
            )
            .remote(settings)
        )
        try:
            ray.get(actor.open_account.remote(account, settings, spent))
        except ray.exceptions.RayActorError as error:  # it ended just then
            log.debug("limits: %s", error)
            time.sleep(1)
            continue
        actor.end_when_idle.remote()
        return SharedLimits(actor, account)
    raise UserError(
        "the actor that holds the LLM's limits could not be started",
        "see the Ray logs; run the same command again",
    )
