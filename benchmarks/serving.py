"""Model endpoints and chat: what the layers around the engine cost, on the shipped tiny Llama-3.

    python benchmarks/serving.py                     # everything, about six minutes on two cores
    python benchmarks/serving.py --parts batch http  # some of it
    python benchmarks/serving.py --parts batch --llamafactory lf/bin/python

batch: 328 rounds of 41 dialogues in order, 128 new tokens each, by base and by adapter: rounds a
second, and the share of prompt tokens that the prefix cache had; with --llamafactory (the python of
its environment, see docs/finetuning.md) beside its predict_with_generate, 8 at a time.
http: output tokens a second at 32 requests in flight, through the endpoints and by the bare engine
(a process of its own, the same options). first: time to the first token through the endpoints, and
to the first text in the chat, which a person sees when its sentence has been checked. All in one
run on one machine; greedy, the end of a reply ignored, so that everybody writes equally much.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

DIALOGUES, ROUNDS, NEW_TOKENS = 41, 8, 128
IN_FLIGHT = 32
CORES = os.cpu_count() or 1
MODELS = ("llama3", "llama3:mi")
QUESTIONS = 4 * IN_FLIGHT
ENGINE = {"kv_cache_memory_bytes": 256 << 20}
SAID = "我最近总是熬夜刷手机，第二天很累，想改又改不掉。"


async def pooled(jobs: list[Callable[[], Awaitable[Any]]], in_flight: int) -> list[Any]:
    """The results of the jobs, begun in order, so many at a time."""
    gate = asyncio.Semaphore(in_flight)

    async def one(job: Callable[[], Awaitable[Any]]) -> Any:
        async with gate:
            return await job()

    return await asyncio.gather(*(one(job) for job in jobs))


def client(url: str) -> Any:
    import openai

    return openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)


async def chat(http: Any, model: str, messages: list[dict[str, str]]) -> Any:
    """A greedy reply of NEW_TOKENS, asked for as the product's jobs do (see llm/client.py)."""
    from openai.types.chat import ChatCompletion

    body = {
        "model": model,
        "messages": messages,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    return await http.post("/chat/completions", cast_to=ChatCompletion, body=body)


async def batch(url: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Rounds a second by model id."""
    from milm_ray.models.messages import round_messages

    async def ask(model: str, row: dict[str, Any]) -> tuple[int, int]:
        reply = await chat(http, model, round_messages(row))
        details = reply.usage.prompt_tokens_details
        return reply.usage.prompt_tokens, (details.cached_tokens or 0) if details else 0

    found = {}
    for model in MODELS:
        async with client(url) as http:
            # Both engines have answered, and hold the adapter, before the clock starts.
            warm = [dict(row, instruction=f"{n}") for n, row in enumerate(rows[:16])]
            await pooled([lambda row=row: ask(model, row) for row in warm], 16)  # noqa: B023
            started = time.perf_counter()
            jobs = [lambda row=row: ask(model, row) for row in rows]  # noqa: B023
            counts = await pooled(jobs, 192)
        found[model] = len(rows) / (time.perf_counter() - started)
        cached = sum(c for _, c in counts) / sum(p for p, _ in counts)
        print(f"batch {model}: {found[model]:.1f} rounds/s, prefix cache {cached:.0%}", flush=True)
    return found


def llamafactory(
    interpreter: Path, folder: Path, base: Path, adapter: Path, rows: list[dict[str, Any]]
) -> dict[str, float]:
    """Rounds a second of LLaMA-Factory's batch prediction on the same rounds, by model id."""
    from milm_ray.models.messages import round_messages

    folder.mkdir()
    lasting = folder / "base"
    shutil.copytree(base, lasting)
    generation = lasting / "generation_config.json"
    known = json.loads(generation.read_text()) if generation.exists() else {}
    generation.write_text(json.dumps({**known, "min_new_tokens": NEW_TOKENS}))
    talks = [
        {"messages": [*round_messages(row), {"role": "assistant", "content": row["output"]}]}
        for row in rows
    ]
    (folder / "data.json").write_text(json.dumps(talks, ensure_ascii=False))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user"}
    info = {
        "file_name": "data.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {**tags, "assistant_tag": "assistant", "system_tag": "system"},
    }
    (folder / "dataset_info.json").write_text(json.dumps({"bench": info}))
    found = {}
    for model in MODELS:
        out = folder / model.replace(":", "-")
        arguments = {
            "stage": "sft",
            "do_predict": True,
            "predict_with_generate": True,
            "model_name_or_path": str(lasting),
            "finetuning_type": "lora",
            "template": "llama3",
            "dataset_dir": str(folder),
            "eval_dataset": "bench",
            "cutoff_len": 1024,
            "max_new_tokens": NEW_TOKENS,
            "do_sample": False,
            "per_device_eval_batch_size": 8,
            "output_dir": str(out),
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
        }
        if model.endswith(":mi"):
            arguments["adapter_name_or_path"] = str(adapter)
        (folder / "arguments.yaml").write_text(json.dumps(arguments))
        code = "from llamafactory.train.tuner import run_exp; run_exp()"
        offline = dict.fromkeys(("HF_HUB_OFFLINE", "DISABLE_VERSION_CHECK"), "1")
        with (folder / "log").open("w") as log:
            done = subprocess.run(
                [str(interpreter), "-c", code, str(folder / "arguments.yaml")],
                env={**os.environ, **offline, "PYTHONWARNINGS": "ignore"},
                stdout=log,
                stderr=log,
                check=False,
            )
        if done.returncode:
            raise SystemExit(f"LLaMA-Factory failed:\n{(folder / 'log').read_text()[-3000:]}")
        figures = json.loads((out / "predict_results.json").read_text())
        found[model] = len(rows) / figures["predict_runtime"]
        print(f"LLaMA-Factory {model}: {found[model]:.1f} rounds/s", flush=True)
    return found


async def http_speed(url: str) -> float:
    """Output tokens a second at IN_FLIGHT requests through the endpoints."""

    async def ask(number: int) -> None:
        await chat(http, "llama3", [{"role": "user", "content": f"{number}：{SAID}"}])

    async with client(url) as http:
        started = time.perf_counter()
        await pooled([lambda n=n: ask(n) for n in range(QUESTIONS)], IN_FLIGHT)
    return QUESTIONS * NEW_TOKENS / (time.perf_counter() - started)


async def first_tokens(url: str, chat_url: str) -> None:
    import httpx

    async def token(number: int) -> float:
        started = time.perf_counter()
        stream = await http.chat.completions.create(
            model="llama3",
            messages=[{"role": "user", "content": f"{number}：{SAID}"}],
            max_tokens=64,
            stream=True,
        )
        first = 0.0
        async for chunk in stream:
            if not first and chunk.choices and chunk.choices[0].delta.content:
                first = time.perf_counter() - started
        return first

    async def sentence(number: int) -> float:
        headers = {"X-Person": uuid.uuid4().hex * 2}
        async with httpx.AsyncClient(base_url=chat_url, headers=headers, timeout=300) as person:
            session, message = uuid.uuid4().hex, uuid.uuid4().hex
            await person.post("api/sessions", json={"session_id": session, "model": "llama3"})
            started = time.perf_counter()
            path = f"api/sessions/{session}/messages"
            body = {"message_id": message, "content": f"{number}：{SAID}"}
            (await person.post(path, json=body)).raise_for_status()
            first = 0.0
            async with person.stream("GET", f"{path}/{message}/reply") as events:
                async for line in events.aiter_lines():
                    if not first and line.startswith("data: ") and json.loads(line[6:]).get("text"):
                        first = time.perf_counter() - started
            return first

    for name, job in (("token at the endpoints", token), ("text in the chat", sentence)):
        async with client(url) as http:
            jobs = [lambda n=n: job(n) for n in range(QUESTIONS)]  # noqa: B023
            times = await pooled(jobs, IN_FLIGHT)
        cuts = statistics.quantiles(times, n=20)
        print(f"first {name}: p50 {cuts[9]:.3f} s, p95 {cuts[18]:.3f} s", flush=True)


def bare_engine(path: str) -> None:
    """The engine alone, no server: the same questions, options and number in flight."""
    from vllm import LLM, SamplingParams

    from milm_ray.serving.cpu_engine import WORKER_CLS

    engine = LLM(
        model=path,
        dtype="float32",
        max_model_len=2048,
        max_num_seqs=IN_FLIGHT,
        enforce_eager=True,
        block_size=32,
        worker_cls=WORKER_CLS,
        **ENGINE,
    )
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    asked = [[{"role": "user", "content": f"{n}：{SAID}"}] for n in range(QUESTIONS)]
    engine.chat(asked[:IN_FLIGHT], sampling, use_tqdm=False)
    started = time.perf_counter()
    engine.chat(asked, sampling, use_tqdm=False)
    print("tokens/s:", QUESTIONS * NEW_TOKENS / (time.perf_counter() - started), flush=True)


def served(config: Any, changes: dict[str, int]) -> Any:
    """The configuration with other settings of `serve`."""
    return config.model_copy(update={"serve": config.serve.model_copy(update=changes)})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("batch", "http", "first")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--llamafactory", type=Path, help="python of LLaMA-Factory's environment")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        bare_engine(options.bare)
        return
    import ray

    from milm_ray.config import Config
    from milm_ray.serving.endpoints import app_args, chat_args, prepared_bases
    from milm_ray.serving.running import running_chat, running_models
    from milm_ray.workspace import Workspace
    from tests.serving.conftest import RANK, random_adapter, sample_rounds

    model = {"path": str(ROOT / "milm_ray/samples/models/tiny-llama3"), "chat_format": "llama3"}
    serve = {"dtype": "float32", "max_model_len": 2048, "gpus_per_replica": 0, "engine": ENGINE}
    with tempfile.TemporaryDirectory() as folder:
        config = Config.model_validate(
            {
                "workspace": folder,
                "models": {"llama3": model},
                "finetune": {"lora": {"rank": RANK}},
                "serve": serve,
                "chat": {"max_tokens": 64},
            }
        )
        workspace = Workspace.open(folder)
        bases = prepared_bases(config, workspace)
        random_adapter(bases["llama3"], workspace.local("adapters", "llama3"), "llama3", 0)
        # For batches an engine of one thread per core; else one with as many threads as there are
        # cores, which the bare one has too. The rest of Serve is counted beside them.
        by_core = {"cpus_per_replica": 1, "replicas": CORES}
        whole = {"cpus_per_replica": CORES, "replicas": 1}
        cluster = {"num_cpus": CORES + 2, "include_dashboard": False}
        ray.init(address="local", logging_level="WARNING", **cluster)
        rows = sample_rounds(DIALOGUES, ROUNDS).to_pylist()
        speed, rates = 0.0, {}
        try:
            if "batch" in options.parts:
                with running_models(app_args(served(config, by_core), workspace, bases)) as url:
                    rates = asyncio.run(batch(url, rows))
            if {"http", "first"} & set(options.parts):
                with running_models(app_args(served(config, whole), workspace, bases)) as url:
                    if "http" in options.parts:
                        speed = asyncio.run(http_speed(url))
                    if "first" in options.parts:
                        with running_chat(chat_args(config, workspace, url), url) as chat_url:
                            asyncio.run(first_tokens(url, f"{chat_url}/"))
        finally:
            ray.shutdown()
        if rates and options.llamafactory:
            adapter = Path(workspace.local("adapters", "llama3"))
            peer = llamafactory(
                options.llamafactory, Path(folder) / "peer", bases["llama3"], adapter, rows
            )
            for model in MODELS:
                print(f"batch {model}: {rates[model] / peer[model]:.1f} times LLaMA-Factory")
        if "http" in options.parts:
            command = [sys.executable, __file__, "--bare", str(bases["llama3"])]
            # As the endpoints' replica runs: as many threads as there are cores.
            threads = {"OMP_NUM_THREADS": str(CORES), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
            env = {**os.environ, **threads}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
            # The engine prints to the same place, also as it ends.
            bare = float(done.stdout.rsplit("tokens/s: ", 1)[1].split()[0])
            print(
                f"http at {IN_FLIGHT} in flight: {speed:,.0f} tokens/s; bare engine {bare:,.0f}; "
                f"{speed / bare:.2f} of it"
            )


if __name__ == "__main__":
    main()
