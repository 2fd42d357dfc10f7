"""A live line about calls to an LLM: done, rejected, rates, cost, time left."""

from __future__ import annotations

import logging
import sys
import threading
import time

from milm_ray import metrics

log = logging.getLogger("milm_ray")

_INTERVAL_S = 10.0  # without a terminal: one line in a job's log
_REFRESH_S = 0.5  # on a terminal: the same line anew


class Progress:
    """Counts what has come back and says so from a thread of its own until closed."""

    def __init__(self, what: str, total: int, known: int = 0, cost: float | None = None) -> None:
        """what: the stage; total: rows; known: rows answered from the store; cost: spent before."""
        self.what = what
        self.total = total
        self.known = known
        self.answered = 0
        self.rejected = 0
        self.tokens = 0
        self.cost = cost
        self._started = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        log.info("%s", self.line())

    def add(self, *, rejected: bool, tokens: int, cost: float | None) -> None:
        """Count one more row: a usable reply or a reject, with what its calls used."""
        if rejected:
            self.rejected += 1
        else:
            self.answered += 1
        self.tokens += tokens
        if cost is not None:
            self.cost = (self.cost or 0.0) + cost
        outcome = "rejected" if rejected else "answered"
        metrics.count("milm_replies", stage=self.what, outcome=outcome)
        metrics.count("milm_tokens", tokens, stage=self.what)
        metrics.count("milm_cost_usd", cost or 0.0, stage=self.what)

    def line(self) -> str:
        """The progress as text."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        asked = self.answered + self.rejected
        left = self.total - self.known - asked
        rate = asked / seconds
        cost = "unknown" if self.cost is None else f"${self.cost:,.4f}"
        eta = _duration(left / rate) if rate > 0 else "unknown"
        return (
            f"{self.what}: {self.known + asked:,}/{self.total:,} done ({self.known:,} from the "
            f"store), {self.rejected:,} rejected, {rate:.1f} calls/s, "
            f"{self.tokens / seconds:,.0f} tokens/s, cost {cost}, left {eta}"
        )

    def _tick(self) -> None:
        while not self._stop.wait(_REFRESH_S if self._terminal else _INTERVAL_S):
            if self._terminal:
                print(f"\r\033[K{self.line()}", end="", file=sys.stderr, flush=True)
            else:
                log.info("%s", self.line())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
