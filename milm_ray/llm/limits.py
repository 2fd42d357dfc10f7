"""Limits that hold for all callers together: requests in flight, rates, and money.

`Limits` is the plain object; `shared_limits` puts one into a named Ray actor, so that every process
of the cluster draws on the same allowance. Without Ray the object itself is used.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from milm_ray.config import LLMSection


@dataclass
class _Lease:
    tokens: int
    cost: float
    expires: float


class Gate(Protocol):
    """What a caller needs of the limits, wherever they live."""

    async def acquire(self, tokens: int, cost: float) -> int | None: ...

    async def release(self, lease: int, tokens: int | None, cost: float | None) -> None: ...


class Limits:
    """Concurrency, requests and tokens per minute, and a budget.

    A call takes a lease before it is sent and gives it back with what it really used. A lease whose
    holder died expires, so that a lost process does not narrow the others for good.
    """

    def __init__(self, settings: LLMSection, spent: float = 0.0) -> None:
        """spent: USD that replies of earlier runs have cost already."""
        self._settings = settings
        self._spent = spent
        self._leases: dict[int, _Lease] = {}
        self._last = 0
        self._window: deque[tuple[float, int]] = deque()  # (sent at, tokens), the last minute
        self._changed = asyncio.Event()

    async def acquire(self, tokens: int, cost: float) -> int | None:
        """Wait for a place; returns a lease, or None when the budget does not allow the call.

        tokens: estimate of prompt and completion together; cost: the most the call can cost in USD.
        """
        while True:
            now = time.monotonic()
            self._expire(now)
            wait = self._blocked_for(now, tokens, cost)
            if wait is None:
                return None
            if wait <= 0:
                self._last += 1
                expires = now + 2 * self._settings.timeout_s + 30
                self._leases[self._last] = _Lease(tokens, cost, expires)
                self._window.append((now, tokens))
                return self._last
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), wait)
            except TimeoutError:
                continue

    async def release(self, lease: int, tokens: int | None, cost: float | None) -> None:
        """Give a lease back; tokens and cost are what the call used, None where unknown."""
        held = self._leases.pop(lease, None)
        self._spent += cost or 0.0
        if held is not None and tokens is not None and self._window:
            # The window holds an estimate; put the difference on the newest entry.
            sent, counted = self._window[-1]
            self._window[-1] = (sent, max(0, counted + tokens - held.tokens))
        self._changed.set()

    def _expire(self, now: float) -> None:
        for number in [n for n, lease in self._leases.items() if lease.expires < now]:
            del self._leases[number]
        while self._window and self._window[0][0] <= now - 60:
            self._window.popleft()

    def _blocked_for(self, now: float, tokens: int, cost: float) -> float | None:
        """Seconds after which to look again: 0 when free now, None when never (budget)."""
        limits = self._settings
        if limits.max_cost is not None:
            reserved = sum(lease.cost for lease in self._leases.values())
            if self._spent + reserved + cost > limits.max_cost:
                # Calls in flight reserve the most that they can cost: look again when they end.
                return 5.0 if self._leases else None
        if len(self._leases) >= limits.concurrency:
            return 5.0
        if limits.requests_per_minute and len(self._window) >= limits.requests_per_minute:
            return self._window[0][0] + 60 - now + 0.001
        if limits.tokens_per_minute and self._window:
            used = sum(counted for _, counted in self._window)
            if used + tokens > limits.tokens_per_minute:
                return self._window[0][0] + 60 - now + 0.001
        return 0.0


class _RemoteGate:
    """The limits in a Ray actor, as seen from a calling process."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def acquire(self, tokens: int, cost: float) -> int | None:
        return await self._actor.acquire.remote(tokens, cost)

    async def release(self, lease: int, tokens: int | None, cost: float | None) -> None:
        await self._actor.release.remote(lease, tokens, cost)


def shared_limits(settings: LLMSection, spent: float = 0.0) -> Any:
    """The actor that holds the cluster's limits for one endpoint; it lives while it is referenced.

    Every call with the same settings reaches the same actor while one is alive. Hand it to the
    asking processes, which use it through `reach_limits`.
    """
    import ray

    name = "milm_ray-limits-" + hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:16]
    return (
        ray.remote(Limits)
        .options(
            name=name,
            namespace="milm_ray",
            get_if_exists=True,
            num_cpus=0,
            max_concurrency=100_000,
            max_restarts=-1,
            max_task_retries=-1,
        )
        .remote(settings, spent)
    )


def reach_limits(actor: Any) -> Gate:
    """The gate to limits held by `actor`, for a process that was handed it."""
    return _RemoteGate(actor)
