"""One replica of the chat as a process of its own, without Ray."""

from __future__ import annotations

import asyncio
import os
import socket
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvicorn

from milm_ray.serve_settings import ChatSection
from milm_ray.serving.chat import store
from milm_ray.serving.chat.app import create_app


def run(options: dict[str, Any], started: Connection) -> None:
    """Serve until killed; the port, or 0 where it does not start, goes through `started`."""
    try:
        asyncio.run(_serve(options, started))
    finally:
        started.send(0)


async def _serve(options: dict[str, Any], started: Connection) -> None:
    store.LEASE_S = options.get("lease_s", store.LEASE_S)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", options.get("port", 0)))
    default = options.get("default_database")
    app = create_app(
        ChatSection.model_validate(options["settings"]),
        options.get("keys_file"),
        Path(default) if default else None,
    )
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.02)
    if server.started:
        started.send(listener.getsockname()[1])
    parent = os.getppid()
    while os.getppid() == parent and not serving.done():  # do not outlive the test
        await asyncio.sleep(0.2)
