"""What batch prediction holds in memory as the rounds become many: it should not grow with them.

    python benchmarks/batch_memory.py                # 100 times the paper's 367 rounds
    python benchmarks/batch_memory.py --scale 10
    python benchmarks/batch_memory.py --instant      # a server that answers at once, no engine

The shipped tiny Llama-3 replies to every round with 16 new tokens, through real endpoints, and
`generate`'s own code writes the predictions. After each tenth of the rounds: rounds a second, and
the private memory (USS) of the driver and of the process that asks. The engine is left out: what it
holds is a setting. At the end the same command is run again on the finished replies, which reads
the whole reply store.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

ROUNDS, PER_DIALOGUE = 367, 8
ASKED = "我想少刷手机，可是一到晚上就忍不住，第二天又后悔。"
SAID = "听起来您一面想把晚上还给自己，一面又觉得只有那段时间属于您。您想先说哪一样？"
MIB = 2**20


def write_rounds(workspace: Any, count: int) -> None:
    """Rounds of made-up dialogues, their turns as long as real ones."""
    import pyarrow as pa

    from milm_ray.dataset.rounds import ROUNDS_PER_GROUP, rounds
    from milm_ray.schema import ROUNDS as SCHEMA

    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        number = len(rows)
        turns = []
        for place in range(PER_DIALOGUE):
            asked = f"第{number + place}天了，{ASKED}"
            turns += [{"role": "client", "content": asked}, {"role": "counselor", "content": SAID}]
        dialogue = {"dialogue_id": f"{number:064x}", "topic": "", "turns": turns}
        rows += rounds(dialogue)
    table = pa.Table.from_pylist(rows[:count], SCHEMA)
    workspace.write_table(table, "test_rounds", rows_per_group=ROUNDS_PER_GROUP)


def private_memory() -> dict[str, float]:
    """USS in MiB of this process and of the processes that ask, by name."""
    import psutil

    found = {"driver": psutil.Process().memory_full_info().uss / MIB}
    for process in psutil.process_iter(["cmdline"]):
        name = " ".join(process.info["cmdline"] or ())
        if "_Predictor" in name and psutil.Process().pid in [p.pid for p in process.parents()]:
            found["asking"] = found.get("asking", 0.0) + process.memory_full_info().uss / MIB
    return found


def watched(tables: Iterator[Any], total: int, what: str) -> Iterator[Any]:
    """The tables as they come, with a line of figures after each tenth of their rows."""
    done, shown, started = 0, 0, time.perf_counter()
    for table in tables:
        yield table
        done += table.num_rows
        if done * 10 // total > shown:
            shown = done * 10 // total
            held = ", ".join(f"{name} {size:,.0f} MiB" for name, size in private_memory().items())
            rate = done / (time.perf_counter() - started)
            print(
                f"{what} | {done:,} of {total:,} rounds, {rate:.0f} a second | {held}", flush=True
            )


@contextmanager
def instant() -> Iterator[str]:
    """The URL of a server in a process of its own that answers every question with one reply."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, __file__, "--serve", str(port)])
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


def serve(port: int) -> None:
    """Answer chat completions on a port until killed."""
    from aiohttp import web

    choice = {"index": 0, "finish_reason": "stop"}
    choice |= {"message": {"role": "assistant", "content": SAID}}
    usage = {"prompt_tokens": 500, "completion_tokens": 16, "total_tokens": 516}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "x"}
    text = json.dumps({**body, "choices": [choice], "usage": usage})

    async def chat(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(text=text, content_type="application/json")

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    web.run_app(app, host="127.0.0.1", port=port, print=None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=float, default=100, help="times 367 rounds")
    parser.add_argument("--instant", action="store_true", help="no engine: the job's side alone")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    from milm_ray.config import Config
    from milm_ray.serving import batch, predict
    from milm_ray.serving.endpoints import app_args, prepared_bases
    from milm_ray.serving.running import running_models
    from milm_ray.workspace import Workspace

    total = round(options.scale * ROUNDS)
    with tempfile.TemporaryDirectory() as place:
        config = Config.model_validate(
            {
                "workspace": place,
                "models": {
                    "llama3": {
                        "path": str(ROOT / "milm_ray/samples/models/tiny-llama3"),
                        "chat_format": "llama3",
                    }
                },
                "serve": {
                    "dtype": "float32",
                    "max_model_len": 1024,
                    "gpus_per_replica": 0,
                    "cpus_per_replica": 0.3,
                },
                "generate": {"max_new_tokens": 16, "concurrency": 256, "variants": ["base"]},
            }
        )
        workspace = Workspace.open(place)
        write_rounds(workspace, total)
        bases = prepared_bases(config, workspace)
        ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="WARNING")
        models = (
            instant() if options.instant else running_models(app_args(config, workspace, bases))
        )
        with models as url:
            wanted = batch.runs(config, workspace, bases)
            for what in ("asked", "asked again"):
                tables = batch.predict(config, workspace, wanted, url)
                tally = predict.write(workspace, watched(tables, total, what))
                print(f"{what} | {tally.counts()}", flush=True)
        ray.shutdown()


if __name__ == "__main__":
    main()
