"""Who trains and who waits when the cluster is too small for all models at once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

log = logging.getLogger("milm_ray")

# CPUs are shared in fractions; sums of them carry rounding errors.
_SLACK = 1e-6


@dataclass(frozen=True)
class Demand:
    """What one model's workers take together."""

    cpus: float
    gpus: float

    def text(self) -> str:
        parts = [f"{self.cpus:g} CPU"] + ([f"{self.gpus:g} GPU"] if self.gpus else [])
        return " and ".join(parts)


class Admission:
    """Lets models train as the cluster's CPUs and GPUs allow, in the order in which they ask.

    capacity: Ray's cluster resources. A demand over the whole capacity is let in alone: on a
    cluster that grows on demand it is Ray that waits.
    """

    def __init__(self, capacity: Mapping[str, float]) -> None:
        self._capacity = Demand(capacity.get("CPU", 0.0), capacity.get("GPU", 0.0))
        self._running: dict[str, Demand] = {}
        self._queue: list[str] = []
        self._changed = threading.Condition()

    @contextmanager
    def admitted(self, model: str, demand: Demand) -> Iterator[None]:
        """Wait for room, hold it while the block runs; says what is waiting for what."""
        with self._changed:
            self._queue.append(model)
            told = False
            while not (self._queue[0] == model and self._fits(demand)):
                if not told:
                    held = ", ".join(f"{n} ({d.text()})" for n, d in self._running.items())
                    log.info(
                        "finetune %s | waits for %s; the cluster has %s, held by %s",
                        model,
                        demand.text(),
                        self._capacity.text(),
                        held or f"none yet, {self._queue[0]} is next",
                    )
                    told = True
                self._changed.wait()
            self._queue.remove(model)
            self._running[model] = demand
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                del self._running[model]
                self._changed.notify_all()

    def _fits(self, demand: Demand) -> bool:
        if not self._running:
            return True
        cpus = demand.cpus + sum(d.cpus for d in self._running.values())
        gpus = demand.gpus + sum(d.gpus for d in self._running.values())
        return cpus <= self._capacity.cpus + _SLACK and gpus <= self._capacity.gpus + _SLACK
