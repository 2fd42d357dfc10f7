"""Takes off the cluster what a job serves, also when the job itself no longer can.

Serve's applications outlive the driver that started them. An actor on the head node waits for the
driver's end and removes them, so that a job that was stopped or killed holds no GPUs.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from milm_ray.nodes import ON_HEAD

_NAMESPACE = "milm_ray"
_PREFIX = "caretaker-"
_POLL_S = 2.0


@contextmanager
def removed_at_end(app: str, ours: bool) -> Iterator[None]:
    """Serve's application `app` is removed when the block ends, or soon after this process did.

    ours: this job started Serve itself, which is shut down too once it serves nothing else.
    """
    keeper: Any = None
    # A cluster of the driver's own ends with it.
    if os.environ.get("RAY_ADDRESS"):
        import ray

        options = {"lifetime": "detached", "num_cpus": 0, "resources": dict(ON_HEAD)}
        keeper = (
            ray.remote(Caretaker)
            .options(name=f"{_PREFIX}{app}", namespace=_NAMESPACE, max_concurrency=2, **options)
            .remote(ray.get_runtime_context().get_job_id(), app, ours)
        )
        keeper.watch.remote()
    try:
        yield
    finally:
        _remove(app, ours)
        if keeper is not None:
            ray.kill(keeper)


def finish_for_others() -> None:
    """Wait until nothing is served any more for jobs that have ended."""
    import ray
    from ray.util import list_named_actors

    for actor in list_named_actors(all_namespaces=True):
        if actor["namespace"] == _NAMESPACE and actor["name"].startswith(_PREFIX):
            with suppress(ValueError, ray.exceptions.RayActorError):  # it has just finished
                ray.get(ray.get_actor(actor["name"], _NAMESPACE).remove_if_orphaned.remote())


class Caretaker:
    """An actor that waits for a job's end."""

    def __init__(self, job: str, app: str, ours: bool) -> None:
        self._job, self._app, self._ours = job, app, ours
        self._done = False
        self._lock = threading.Lock()

    def watch(self) -> None:
        import ray

        while not self.remove_if_orphaned():
            time.sleep(_POLL_S)
        ray.actor.exit_actor()

    def remove_if_orphaned(self) -> bool:
        """Remove the application if the job is gone; returns whether it was."""
        from ray._private import state

        with self._lock:
            ended = {job["JobID"] for job in state.jobs() if job["IsDead"]}
            if self._job in ended and not self._done:
                _remove(self._app, self._ours)
                self._done = True
            return self._done


def _remove(app: str, ours: bool) -> None:
    from ray import serve

    serve.delete(app)
    if ours and not serve.status().applications:
        serve.shutdown()
