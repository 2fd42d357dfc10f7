"""What the jobs do, as Prometheus metrics: every Ray node exports them beside Ray's own, with the
prefix `ray_`. deploy/grafana.json draws them.

Outside a Ray session there is nobody to export to, and the calls do nothing.
"""

from __future__ import annotations

from functools import cache
from typing import Any

# name -> (what it says, its tags)
COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "milm_dialogues": ("Dialogues read from raw corpora", ("corpus",)),
    "milm_replies": ("Rows with a reply (answered) or without a usable one", ("stage", "outcome")),
    "milm_tokens": ("Tokens of prompts and replies", ("stage",)),
    "milm_cost_usd": ("Money spent on replies whose price is known", ("stage",)),
}
GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "milm_train_step": ("Optimizer steps done", ("model",)),
    "milm_train_loss": ("Training loss, mean since the last log row", ("model",)),
    "milm_train_learning_rate": ("Learning rate", ("model",)),
    "milm_train_grad_norm": ("Gradient norm before clipping", ("model",)),
    "milm_train_tokens_per_s": ("Tokens trained per second", ("model",)),
}


def count(name: str, value: float = 1.0, **tags: str) -> None:
    """Add to one of COUNTERS."""
    if value > 0 and _session():
        _metric(name).inc(value, tags=tags)


def gauge(name: str, value: float, **tags: str) -> None:
    """Set one of GAUGES."""
    if _session():
        _metric(name).set(value, tags=tags)


def _session() -> bool:
    import ray

    return ray.is_initialized()


@cache
def _metric(name: str) -> Any:
    from ray.util import metrics

    kind = metrics.Counter if name in COUNTERS else metrics.Gauge
    description, tags = (COUNTERS if name in COUNTERS else GAUGES)[name]
    return kind(name, description, tag_keys=tags)
