"""Model endpoints for as long as a block of code needs them, on the Ray cluster at hand."""

from __future__ import annotations

import argparse
import logging
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any
from urllib.parse import urlsplit

from milm_ray.config import load_config
from milm_ray.errors import ConfigError, UserError
from milm_ray.job import connect
from milm_ray.models.chat_format import FORMATS
from milm_ray.serving.caretaker import finish_for_others, removed_at_end
from milm_ray.serving.chat.build import ChatArgs, build_chat_app
from milm_ray.serving.endpoints import app_args, chat_args, check_access, prepared_bases
from milm_ray.serving.models import AppArgs, build_app
from milm_ray.workspace import Workspace

log = logging.getLogger("milm_ray")
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


class _Kept:
    """Models that stay up from one stage to the next, and what ends them."""

    def __init__(self) -> None:
        self.stack = ExitStack()
        self.urls: list[tuple[AppArgs, str]] = []


_kept: ContextVar[_Kept | None] = ContextVar("kept_models", default=None)


@contextmanager
def kept_models() -> Iterator[None]:
    """In this block, `models_in_use` starts models once and leaves them up until the block ends."""
    kept = _Kept()
    token = _kept.set(kept)
    try:
        with kept.stack:
            yield
    finally:
        _kept.reset(token)


@contextmanager
def models_in_use(args: AppArgs) -> Iterator[str]:
    """`running_models`, shared by the stages within one `kept_models` block."""
    kept = _kept.get()
    if kept is None:
        with running_models(args) as url:
            yield url
        return
    for known, url in kept.urls:
        if known == args:
            yield url
            return
    url = kept.stack.enter_context(running_models(args))
    kept.urls.append((args, url))
    yield url


@contextmanager
def running_models(
    args: AppArgs,
    port: int | None = None,
    start_timeout_s: float = 1800,
    host: str = "127.0.0.1",
    everywhere: bool = False,
) -> Iterator[str]:
    """Serve the models of `args` and yield the base URL of their OpenAI-compatible API.

    Ray must be connected. Where Serve runs already, the models become one more application beside
    what it serves, and only that is removed afterwards; else Serve itself is started at `host` on a
    port (None: a free one) and shut down. It ends with this process, however that ends.
    everywhere: answer on every node that serves something, else on the head node only. Raises
    UserError when a model does not come up.
    """
    from ray import serve

    finish_for_others()
    name = f"models-{uuid.uuid4().hex[:8]}"
    running = _port_of_running_serve()
    ours = running is None
    port = running or port or _free_port()
    if ours:
        serve.start(
            http_options={
                "host": host,
                "port": port,
                "location": "EveryNode" if everywhere else "HeadOnly",
            },
            logging_config=_QUIET,
        )
    prefix = "" if ours else f"/{name}"
    with removed_at_end(name, ours):
        target = serve.RunTarget(
            target=build_app(args), name=name, route_prefix=prefix or "/", logging_config=_QUIET
        )
        serve.run_many([target], wait_for_applications_running=False)
        _wait(name, start_timeout_s)
        url = f"http://127.0.0.1:{port}{prefix}/v1"
        _wait_for_http(f"http://127.0.0.1:{port}{prefix}/health")
        yield url


@contextmanager
def running_chat(args: ChatArgs, models_url: str, start_timeout_s: float = 300) -> Iterator[str]:
    """Serve the chat at /chat beside the models that `running_models` serves; yields its URL."""
    from ray import serve

    target = serve.RunTarget(
        target=build_chat_app(args), name="chat", route_prefix="/chat", logging_config=_QUIET
    )
    with removed_at_end("chat", ours=False):
        serve.run_many([target], wait_for_applications_running=False)
        _wait("chat", start_timeout_s)
        parts = urlsplit(models_url)
        url = f"{parts.scheme}://{parts.netloc}/chat"
        _wait_for_http(f"{url}/health")
        yield url


def _wait(name: str, timeout_s: float) -> None:
    """Until every deployment of the application is up; each is reported as it comes up."""
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    started, ready = time.monotonic(), set[str]()
    while True:
        application = serve.status().applications.get(name)
        waited = time.monotonic() - started
        if application is not None:
            up = {k for k, d in application.deployments.items() if d.status == "HEALTHY"}
            for deployment in sorted(up - ready):
                total = len(application.deployments)
                log.info("%s is up after %.0f s (%d of %d)", deployment, waited, len(up), total)
            ready = up
            if application.status == ApplicationStatus.RUNNING:
                return
            if application.status == ApplicationStatus.DEPLOY_FAILED:
                causes = [d.message for d in application.deployments.values() if d.message]
                raise UserError(
                    "the models did not come up: " + (" ".join(causes) or application.message),
                    "look at the cause above; memory, paths and engine options are the usual ones",
                )
        if waited > timeout_s:
            raise UserError(
                f"the models were not up after {timeout_s:.0f} s",
                "see whether the cluster has the CPUs or GPUs that the serve section asks for "
                "(`ray status`)",
            )
        time.sleep(0.5)


def _wait_for_http(url: str, timeout_s: float = 60) -> None:
    """The proxy learns of a new application a moment after it is up."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10):
                return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"the endpoint {url} does not answer: {error}",
                    "see Serve's log under the Ray session's logs/serve/",
                ) from error
            time.sleep(0.2)


def _port_of_running_serve() -> int | None:
    """The HTTP port of the cluster's Serve instance, None where none runs."""
    import ray
    from ray import serve

    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return None
    client: Any = serve.context._get_global_client()
    return int(client.get_serve_details()["http_options"]["port"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(description: str, argv: Sequence[str] | None = None) -> int:
    """`jobs/serve.py`: a configuration's endpoints until interrupted; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file, see jobs/configs/")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("override", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        config = load_config(options.config, options.override, ["models"], FORMATS)
        if not config.models:
            raise ConfigError(["models: name at least one model to serve"])
        check_access(config)
        workspace = Workspace.open(config.workspace)
        bases = prepared_bases(config, workspace)
        connect(config)
        models = app_args(config, workspace, bases, keys=True)
        with (
            # The chat asks the models at this address from whichever node it runs on.
            running_models(models, options.port, host=config.access.host, everywhere=True) as url,
            running_chat(chat_args(config, workspace, url), url) as chat_url,
        ):
            log.info("models at %s, chat at %s; interrupt to stop", url, chat_url)
            threading.Event().wait()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        log.info("stopped")
    return 0
