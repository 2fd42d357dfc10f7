"""A small OpenAI-compatible model server whose behaviour the client's words choose.

    python tests/serving/chat_model.py --log asked.jsonl

慢 answers slowly, and with 停 besides falls silent after four sentences, once; 药 names a drug, 断
breaks off once in mid-reply, 忙 is too busy once, 拒 refuses, 半 cuts an emoji in two and says
half of another.
Prints its port when it listens; every question is logged.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from pathlib import Path
from typing import Any

from aiohttp import web

SLOW = [f"第{n}句慢慢说。" for n in range(1, 13)]
SAID = "听起来这件事对你不容易。"
ASKED = "你愿意多说一点吗？"
DRUG = "建议你每天吃两片舍曲林。"


class Model:
    def __init__(self, log: Path, pause: float) -> None:
        self.log = log
        self.pause = pause
        self.seen: set[str] = set()

    async def models(self, _request: web.Request) -> web.Response:
        data = [{"id": name, "object": "model"} for name in ("llama3", "llama3:mi")]
        return web.json_response({"object": "list", "data": data})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body: dict[str, Any] = await request.json()
        said = body["messages"][-1]["content"].rpartition("\n")[2]
        again = said in self.seen
        self.seen.add(said)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(body, ensure_ascii=False) + "\n")
        if "拒" in said:
            return web.json_response({"error": {"message": "no"}}, status=400)
        if "忙" in said and not again:
            return web.json_response(
                {"error": {"message": "busy"}}, status=429, headers={"Retry-After": "1"}
            )
        if "只输出一行" in body["messages"][0]["content"]:  # asked for a second opinion
            if "慢" in said:
                await asyncio.sleep(5)
            answer = "high suicide" if "暗语" in said else "none none"
            return await self.stream(request, [answer])
        rounds = sum(message["role"] == "user" for message in body["messages"])
        sentences = [SAID, f"这是第{rounds}轮。", ASKED]
        if "慢" in said:
            sentences = SLOW
        if "药" in said:
            sentences = [SAID, DRUG, ASKED]
        if "半" in said:
            sentences = ["好\ud83d\ude42。", "嗯\ud83d。"]
        cut, stuck = (word in said and not again for word in "断停")
        return await self.stream(request, sentences, 10 if "慢" in said else 1, cut, stuck)

    async def stream(
        self,
        request: web.Request,
        sentences: list[str],
        slower: int = 1,
        cut: bool = False,
        stuck: bool = False,
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number, sentence in enumerate(sentences):
            # In pieces that are no sentences, as a model's tokens are.
            for piece in (sentence[:2], sentence[2:]):
                await self.write(response, {"content": piece}, None)
                await asyncio.sleep(self.pause * slower)
            if cut and number == 1 and request.transport:
                request.transport.close()
                return response
            if stuck and number == 3:  # whoever is being answered is still waiting, however late
                await asyncio.sleep(3600)
        await self.write(response, {}, "stop")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def write(
        self, response: web.StreamResponse, delta: dict[str, str], finish: str | None
    ) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        chunk = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "m"}
        event = json.dumps({**chunk, "choices": [choice]})
        await response.write(f"data: {event}\n\n".encode())


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--pause", type=float, default=0.02, help="seconds between pieces")
    options = parser.parse_args()
    model = Model(options.log, options.pause)
    app = web.Application()
    app.router.add_get("/v1/models", model.models)
    app.router.add_post("/v1/chat/completions", model.chat)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    print(runner.addresses[0][1], flush=True)
    parent = os.getppid()
    while os.getppid() == parent:  # do not outlive the test that started it
        await asyncio.sleep(1)


if __name__ == "__main__":
    asyncio.run(main())
