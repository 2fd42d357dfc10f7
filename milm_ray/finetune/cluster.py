"""Several models trained at once on one cluster, each as soon as there is room for it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from milm_ray.config import Config, FinetuneSection
from milm_ray.errors import UserError
from milm_ray.finetune.admission import Admission, Demand

log = logging.getLogger("milm_ray")


def demand_of(settings: FinetuneSection) -> Demand:
    """What one model's workers take together."""
    workers = settings.workers_per_model
    return Demand(workers * settings.cpus_per_worker, workers * settings.gpus_per_worker)


def resources_text(config: Config) -> str:
    """What all models would take, for a plan."""
    workers = config.finetune.workers_per_model
    return (
        f"{len(config.models)} models at once, each {workers} worker(s) with "
        f"{demand_of(config.finetune).text()} in all"
    )


def run_all(models: Sequence[str], demand: Demand, one: Callable[[str], None]) -> None:
    """Call `one` for every model, one thread each; all get their chance before an error is raised.

    Ray must be up. Raises UserError when a local cluster has no room for a single model.
    """
    import ray

    capacity = ray.cluster_resources()
    check_capacity(capacity, demand)
    admission = Admission(capacity)

    def admitted(model: str) -> None:
        with admission.admitted(model, demand):
            one(model)

    with ThreadPoolExecutor(max_workers=len(models)) as pool:
        futures = {model: pool.submit(admitted, model) for model in models}
    failures = {model: f.exception() for model, f in futures.items() if f.exception()}
    for model, error in failures.items():
        log.error("finetune %s | failed: %s", model, error)
    for error in failures.values():
        assert error is not None
        raise error


def check_capacity(capacity: Mapping[str, float], demand: Demand) -> None:
    """One model alone must fit a local cluster; a remote one may still grow, and is only told."""
    have = Demand(capacity.get("CPU", 0.0), capacity.get("GPU", 0.0))
    if demand.cpus <= have.cpus and demand.gpus <= have.gpus:
        return
    cause = f"one model's workers take {demand.text()}, the cluster has {have.text()}"
    if not os.environ.get("RAY_ADDRESS"):
        raise UserError(
            cause,
            "lower finetune.workers_per_model, finetune.cpus_per_worker or "
            "finetune.gpus_per_worker, or use a larger cluster",
        )
    log.warning("finetune | %s: waits until nodes are added", cause)
