"""An OpenAI-compatible chat server that misbehaves as told, for tests and benchmarks.

    python tests/llm_server.py --log requests.jsonl --rate-limited 0.3 --broken 0.1

Prints its port when it listens. It answers the product's own prompts with well-formed JSON made
from the question, so the same question always has the same right answer. Faults are drawn per
request from a seed: HTTP 429 and 500, a connection cut in the middle of the reply, malformed and
off-schema JSON. Every request is logged with what was done to it. While there is a file LOG.most
with a number in it, so many answers are given over all restarts, and then everybody waits.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import os
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

from aiohttp import web

SENTENCE = "我这阵子总是睡不好，想慢慢把作息调回来，又怕自己坚持不住。"
ANSWER = "您很想把作息调回来，也担心半途而废，这份在意本身就是力量。您愿意先说说最难的是哪一段吗？"


def right_answer(messages: list[dict[str, str]]) -> str:
    """A well-formed reply to a judge's or a teacher's question; the same for the same question."""
    question = "\n".join(message["content"] for message in messages)
    number = int(hashlib.sha256(question.encode()).hexdigest()[:8], 16)
    if "comprehensiveness" in messages[0]["content"]:
        verdict = {
            "comprehensiveness": number % 3,
            "professionalism": number // 3 % 4,
            "authenticity": number // 12 % 4,
            "safety": number // 48 % 2,
            "reason": f"第{number % 1000}号",
        }
        return json.dumps(verdict, ensure_ascii=False)
    if "MITI 4.2.1 编码员" in messages[0]["content"]:
        spoken = re.findall(r"\[(\d+)\] 咨询师", messages[1]["content"])
        scores = ("cultivating_change_talk", "softening_sustain_talk", "partnership", "empathy")
        return json.dumps(
            {
                "target_behavior": "早睡",
                "codes": [{"volley": int(v), "utterance": 1, "code": "SR"} for v in spoken],
                "global_scores": dict.fromkeys(scores, 1 + number % 5),
            },
            ensure_ascii=False,
        )
    if "met_belief" in messages[0]["content"]:
        actions = list(json.loads(re.search(r"可选动作：(.*)", question).group(1)))
        return json.dumps(
            {
                "engagement": 1 + number % 5,
                "touches_reason": number % 3 == 0,
                "met_belief": number % 3,
                "offers_plan": number % 2 == 0,
                "weights": {action: number % (7 + n) for n, action in enumerate(actions)},
            }
        )
    if "扮演一位来做心理咨询的来访者" in messages[0]["content"]:
        return f"{SENTENCE}{number % 9973}"
    if "给来访者的每一轮" in messages[0]["content"]:
        turns_ = messages[1]["content"].count("来访者：") - 1
        return json.dumps({"actions": ["inform"] * turns_})
    turns = []
    for k in range(7 + number % 4):
        turns.append({"role": "client", "content": f"{SENTENCE}{number % 9973}之{k}"})
        turns.append({"role": "counselor", "content": ANSWER})
    return json.dumps({"dialogue": turns}, ensure_ascii=False)


class Server:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.random = random.Random(options.seed)
        self.in_flight = 0
        self.sending = 0
        self.answered = 0
        self.log = None
        if options.log:
            self.log = Path(options.log).open("a", buffering=1)  # noqa: SIM115
            self.answered = Path(options.log).read_text().count('"event": "answered"')

    def note(self, event: str, body: dict[str, Any], **facts: Any) -> None:
        if self.log is None:
            return
        question = json.dumps(body["messages"], ensure_ascii=False, sort_keys=True)
        digest = hashlib.sha256(question.encode()).hexdigest()
        entry = {"event": event, "question": digest, "at": time.time(), **facts}
        self.log.write(json.dumps(entry) + "\n")

    def most(self) -> float:
        """How many answers may be given in all, those before a restart included."""
        try:
            return int(Path(f"{self.options.log}.most").read_text())
        except FileNotFoundError:
            return math.inf

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if request.headers.get("Authorization") != f"Bearer {self.options.key}":
            shown = request.headers.get("Authorization", "")
            return error(401, f"Incorrect API key provided: {shown.removeprefix('Bearer ')}")
        if "response_format" in body and self.options.no_schema:
            self.note("refused", body)
            return error(400, "response_format is not supported by this model")
        if not body.get("messages"):  # some clients ask this way for the server's limits
            return error(400, "messages: expected at least one")
        self.in_flight += 1
        try:
            return await self.answer(request, body)
        finally:
            self.in_flight -= 1

    async def answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        options = self.options
        sampling = {name: body.get(name) for name in ("temperature", "top_p", "top_k", "seed")}
        form = body.get("response_format", {}).get("type", "")
        self.note("asked", body, in_flight=self.in_flight, sampling=sampling, format=form)
        if options.refuse and re.search(options.refuse, body["messages"][-1]["content"]):
            return error(options.refuse_status, "we will not have this")
        if options.concurrency and self.in_flight > options.concurrency:
            self.note("failed", body, status=429)
            return error(429, "too many requests in flight", {"Retry-After": "1"})
        draw = self.random.random()
        if draw < options.rate_limited:
            self.note("failed", body, status=429)
            return error(429, "rate limited", {"Retry-After": str(options.retry_after)})
        draw -= options.rate_limited
        if draw < options.failing:
            self.note("failed", body, status=500)
            return error(500, "internal error")
        draw -= options.failing
        low, high = options.latency - options.jitter, options.latency + options.jitter
        await asyncio.sleep(self.random.uniform(max(0.0, low), high))
        while self.answered + self.sending >= self.most():
            await asyncio.sleep(0.05)
        self.sending += 1
        try:
            return await self.send(request, body, draw)
        finally:  # where it was cut, or could not be sent, another may be answered in its place
            self.sending -= 1

    async def send(
        self, request: web.Request, body: dict[str, Any], draw: float
    ) -> web.StreamResponse:
        """The answer, or what the draw makes of it."""
        options = self.options
        text, finish = right_answer(body["messages"]), "stop"
        if options.cut <= draw < options.cut + options.broken:
            off_schema = '{"comprehensiveness": "very", "dialogue": [{"role": "nurse"}]}'
            text = self.random.choice([text[: len(text) // 2], off_schema, "好的，如下：" + text])
        elif options.unusable and self.random.random() < options.unusable:
            text = text[: len(text) // 2]
        elif draw >= 1 - options.rate_limited - options.failing - options.truncated:
            text, finish = text[:40], "length"
        usage = {
            "prompt_tokens": sum(len(message["content"]) for message in body["messages"]),
            "completion_tokens": len(text),
        }
        usage["total_tokens"] = sum(usage.values())
        reply = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": finish,
                }
            ],
            "usage": usage,
        }
        data = json.dumps(reply, ensure_ascii=False).encode()
        if draw < options.cut:
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            response.content_length = len(data)
            await response.prepare(request)
            await response.write(data[: len(data) // 2])
            self.note("failed", body, status=0)
            if request.transport:
                request.transport.close()
            return response
        response = web.Response(body=data, content_type="application/json")
        await response.prepare(request)
        if request.transport is not None and not request.transport.is_closing():
            # Noted before it leaves: whoever has the reply may read the log at once.
            self.answered += 1
            self.note("answered", body, finish=finish, **usage)
        await response.write_eof()
        return response


def error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response(
        {"error": {"message": message, "type": "error"}}, status=status, headers=headers
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--key", default="test-key-123456")
    parser.add_argument("--log", help="file to append one JSON line per event to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.02, help="seconds, the mean")
    parser.add_argument("--jitter", type=float, default=0.01, help="seconds either way")
    parser.add_argument("--concurrency", type=int, default=0, help="429 above so many in flight")
    parser.add_argument("--retry-after", type=float, default=0)
    parser.add_argument("--rate-limited", type=float, default=0.0, help="share answered by 429")
    parser.add_argument("--failing", type=float, default=0.0, help="share answered by 500")
    parser.add_argument("--cut", type=float, default=0.0, help="share cut in mid-reply")
    parser.add_argument("--broken", type=float, default=0.0, help="malformed or off-schema JSON")
    parser.add_argument("--unusable", type=float, default=0.0, help="JSON cut in half")
    parser.add_argument("--truncated", type=float, default=0.0, help="finish reason length")
    parser.add_argument("--refuse", default="", help="a pattern of questions that are refused")
    parser.add_argument("--refuse-status", type=int, default=400, help="with this status")
    parser.add_argument("--no-schema", action="store_true", help="refuse response_format")
    return parser.parse_args()


async def main() -> None:
    server = Server(arguments())
    app = web.Application(client_max_size=1 << 24)
    app.router.add_post("/v1/chat/completions", server.chat)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, server.options.host, server.options.port, backlog=4096)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    parent = os.getppid()
    while os.getppid() == parent:  # do not outlive the test that started it
        await asyncio.sleep(1)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        sys.exit(0)
