"""The live chat under load: many people at once, before real engines.

    python benchmarks/chat_load.py                          # 100 people, 5 minutes
    python benchmarks/chat_load.py --people 20 --seconds 60
    python benchmarks/chat_load.py --url http://host:8000/chat/   # a chat that is up already

Without --url it serves the shipped tiny Llama-3 and the chat on a local Ray cluster, with SQLite.
Everybody holds a conversation of their own: sends, reads the streamed reply to its end, thinks for
1 to 5 seconds, and sends again. At the end each session is read back: every message must be there
once, in order, with the reply that was seen. Printed: messages, errors, what was lost, and the
times to the first sentence and to the end of a reply.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

SAID = (
    "我最近总是熬夜刷手机，第二天很累。",
    "想改，可是一到晚上就忍不住。",
    "试过把手机放在客厅，坚持了三天。",
    "如果能早点睡，白天应该会好很多。",
    "周末的时候最难，没什么事做。",
)


class Tally:
    def __init__(self) -> None:
        self.first: list[float] = []
        self.whole: list[float] = []
        self.problems: Counter[str] = Counter()


async def converse(url: str, until: float, tally: Tally, number: int) -> None:
    """One person's conversation, and the check that the server kept all of it."""
    chance = random.Random(number)
    headers = {"X-Person": uuid.uuid4().hex * 2}
    session = uuid.uuid4().hex
    heard: list[str] = []
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120) as http:
        begun = await http.post("api/sessions", json={"session_id": session})
        if begun.status_code != 201:
            tally.problems[f"begin {begun.status_code}"] += 1
            return
        await asyncio.sleep(chance.uniform(0, 3))
        while time.monotonic() < until:
            message_id, started = uuid.uuid4().hex, time.monotonic()
            body = {"message_id": message_id, "content": chance.choice(SAID)}
            path = f"api/sessions/{session}/messages"
            sent = await http.post(path, json=body)
            if sent.status_code == 409:
                break  # the last round of a session
            if sent.status_code != 202:
                tally.problems[f"send {sent.status_code}"] += 1
                await asyncio.sleep(1)
                continue
            text, first, end = "", 0.0, ""
            async with http.stream("GET", f"{path}/{message_id}/reply") as events:
                async for line in events.aiter_lines():
                    if not line.startswith("data: "):
                        continue
                    news = json.loads(line[6:])
                    if "end" in news:
                        end = news["end"]
                    elif "text" in news:
                        text = news["text"] if news["reset"] else text + news["text"]
                        first = first or (time.monotonic() - started if text else 0.0)
            if end != "done":
                tally.problems[f"reply {end or 'broken off'}"] += 1
            tally.first.append(first)
            tally.whole.append(time.monotonic() - started)
            heard.append(text)
            await asyncio.sleep(chance.uniform(1, 5))
        kept = (await http.get(f"api/sessions/{session}")).json()["messages"]
        replies = [message["content"] for message in kept if message["role"] == "counselor"]
        if replies != heard or len(kept) != 2 * len(heard):
            tally.problems["lost or doubled"] += 1


async def load(url: str, people: int, seconds: float) -> Tally:
    tally, until = Tally(), time.monotonic() + seconds
    await asyncio.gather(*(converse(url, until, tally, number) for number in range(people)))
    return tally


@contextmanager
def served() -> Iterator[str]:
    """The shipped tiny Llama-3 and the chat, on a local cluster."""
    import ray

    from milm_ray.config import Config
    from milm_ray.serving.endpoints import app_args, chat_args, prepared_bases
    from milm_ray.serving.running import running_chat, running_models
    from milm_ray.workspace import Workspace

    model = {"path": str(ROOT / "milm_ray/samples/models/tiny-llama3"), "chat_format": "llama3"}
    with tempfile.TemporaryDirectory() as folder:
        config = Config.model_validate(
            {
                "workspace": folder,
                "models": {"llama3": model},
                "serve": {
                    "dtype": "float32",
                    "max_model_len": 2048,
                    "gpus_per_replica": 0,
                    "cpus_per_replica": 0.5,
                },
                "chat": {"max_tokens": 64},
            }
        )
        workspace = Workspace.open(folder)
        models = app_args(config, workspace, prepared_bases(config, workspace))
        ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="WARNING")
        try:
            with (
                running_models(models) as models_url,
                running_chat(chat_args(config, workspace, models_url), models_url) as url,
            ):
                yield f"{url}/"
        finally:
            ray.shutdown()


def report(tally: Tally) -> None:
    print(f"messages answered: {len(tally.whole):,}")
    print(f"problems: {dict(tally.problems) or 'none'}")
    for name, times in (("first sentence", tally.first), ("whole reply", tally.whole)):
        cuts = statistics.quantiles(times, n=20)
        print(f"{name}: p50 {cuts[9]:.2f} s, p95 {cuts[18]:.2f} s, most {max(times):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--url", help="a chat that is up, with its trailing slash")
    options = parser.parse_args()
    if options.url:
        report(asyncio.run(load(options.url, options.people, options.seconds)))
        return
    with served() as url:
        report(asyncio.run(load(url, options.people, options.seconds)))


if __name__ == "__main__":
    main()
