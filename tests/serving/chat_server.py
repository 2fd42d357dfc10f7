"""One replica of the chat as a process of its own, without Ray.

    python tests/serving/chat_server.py '{"port": 0, "settings": {…}, "keys_file": null, …}'

Prints its port when it listens. `root` mounts it as Serve does.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from pathlib import Path

import uvicorn

from milm_ray.serve_settings import ChatSection
from milm_ray.serving.chat.app import create_app


async def main(options: dict) -> None:
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
        print(listener.getsockname()[1], flush=True)
    parent = os.getppid()
    while os.getppid() == parent and not serving.done():
        await asyncio.sleep(0.2)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
