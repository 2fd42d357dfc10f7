"""How near the LLM client comes to the ideal: calls x latency / concurrency.

    python benchmarks/llm_calls.py                  # 2,040 calls, 64 in flight: about a minute
    python benchmarks/llm_calls.py --concurrency 16 # about four and a half
    python benchmarks/llm_calls.py --peers          # beside distilabel and curator

Starts tests/llm_server.py (2 s +- 1 s a reply, an error above the concurrency limit) and asks it
to transcribe synthetic dialogues, each tool in a process of its own. Printed: seconds from the
first request to the last reply as the server saw them, the ratio to the ideal, start-up apart, and
the most requests in flight. Peers are found by `import`; install them into an environment of their
own and pass its Python: --peer-python /path/to/python.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

PEERS = ("distilabel", "curator")


def dialogue(number: int) -> list[dict[str, str]]:
    """A synthetic dialogue of eight rounds."""
    turns = []
    for k in range(8):
        turns.append(
            {"role": "client", "content": f"第{number}位第{k}句：我最近总是熬夜，白天没精神。"}
        )
        turns.append({"role": "counselor", "content": "您说的我听到了，早睡早起身体好，要坚持。"})
    return turns


def ours(options: argparse.Namespace) -> None:
    """Ask through the product's own stage: Ray Data actors, shared limits, reply store."""
    from milm_ray.config import Config
    from milm_ray.dataset.transcribe import Transcription
    from milm_ray.llm.ask import Asking
    from milm_ray.workspace import Workspace

    teacher = {
        "model": "teacher",
        "base_url": options.url,
        "api_key_env": "LLM_BENCHMARK_KEY",
        "concurrency": options.concurrency,
        "structured_output": False,
    }
    config = Config.model_validate({"teacher": teacher, "ray": {"num_cpus": 2}})
    rows = [
        {"corpus": "smilechat", "source_id": str(n), "turns": dialogue(n)}
        for n in range(options.calls)
    ]
    with tempfile.TemporaryDirectory() as folder:
        task = Transcription(config.transcribe)
        asking = Asking(config, config.teacher, Workspace.open(folder), task, "benchmark")
        done = sum(answer.ok for answer in asking.run(rows))
    print(json.dumps({"done": done}))


def distilabel(options: argparse.Namespace) -> None:
    from distilabel.models import OpenAILLM
    from distilabel.pipeline import Pipeline
    from distilabel.steps import LoadDataFromDicts
    from distilabel.steps.tasks import TextGeneration

    rows = [
        {"instruction": json.dumps(dialogue(n), ensure_ascii=False)} for n in range(options.calls)
    ]
    with Pipeline() as pipeline:
        load = LoadDataFromDicts(data=rows, batch_size=options.concurrency)
        llm = OpenAILLM(
            model="teacher", base_url=options.url, api_key=os.environ["LLM_BENCHMARK_KEY"]
        )
        generate = TextGeneration(llm=llm, input_batch_size=options.concurrency)
        load >> generate
    result = pipeline.run(use_cache=False)
    print(json.dumps({"done": len(result["default"]["train"])}))


def _tiktoken_without_network() -> None:
    """curator counts tokens with a vocabulary that tiktoken downloads; where it cannot be had, one
    token a byte: only its own estimates are the worse for it."""
    import tiktoken

    try:
        tiktoken.get_encoding("cl100k_base")
    except OSError:
        ranks = {bytes([value]): value for value in range(256)}
        by_byte = tiktoken.Encoding(
            "bytes", pat_str=r"(?s).", mergeable_ranks=ranks, special_tokens={}
        )
        tiktoken.get_encoding = tiktoken.encoding_for_model = lambda name: by_byte


def curator(options: argparse.Namespace) -> None:
    os.environ.update(
        CURATOR_DISABLE_CACHE="1",
        TELEMETRY_ENABLED="0",
        OPENAI_API_KEY=os.environ["LLM_BENCHMARK_KEY"],
    )
    _tiktoken_without_network()
    from bespokelabs import curator as bespoke

    llm = bespoke.LLM(
        model_name="teacher",
        backend="openai",
        backend_params={
            "base_url": options.url,
            "max_concurrent_requests": options.concurrency,
            "max_requests_per_minute": 1_000_000,
            "max_tokens_per_minute": 1_000_000_000,
        },
    )
    prompts = [json.dumps(dialogue(n), ensure_ascii=False) for n in range(options.calls)]
    print(json.dumps({"done": len(llm(prompts).dataset)}))


TOOLS = {"milm_ray": ours, "distilabel": distilabel, "curator": curator}


def measure(tool: str, python: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one tool in its own process against a server of its own."""
    from tests.llm_server_process import KEY, ServerProcess

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        server = ServerProcess(
            log, latency=options.latency, jitter=options.jitter, concurrency=options.concurrency
        )
        with server:
            command = [python, __file__, "--tool", tool, "--url", server.url]
            command += ["--calls", str(options.calls), "--concurrency", str(options.concurrency)]
            started = time.time()
            run = subprocess.run(
                command,
                env={**os.environ, "LLM_BENCHMARK_KEY": KEY},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL if not options.verbose else None,
                text=True,
                check=False,
            )
            whole = time.time() - started
            asked, answered = server.events("asked"), server.events("answered")
    if run.returncode or not answered:
        return {"tool": tool, "error": f"exit code {run.returncode}, {len(answered)} replies"}
    seconds = answered[-1]["at"] - asked[0]["at"]
    ideal = options.calls * options.latency / options.concurrency
    return {
        "tool": tool,
        "calls": len(answered),
        "seconds": round(seconds, 1),
        "ratio": round(seconds / ideal, 3),
        "start-up and end": round(whole - seconds, 1),
        "most in flight": max(event["in_flight"] for event in asked),
        "refused": len(asked) - len(answered),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=2040)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--latency", type=float, default=2.0)
    parser.add_argument("--jitter", type=float, default=1.0)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--verbose", action="store_true", help="show the tools' own messages")
    parser.add_argument("--tool", choices=TOOLS, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tool:
        TOOLS[options.tool](options)
        return
    ideal = options.calls * options.latency / options.concurrency
    print(
        f"{options.calls:,} calls of {options.latency:g} s +- {options.jitter:g} s, "
        f"{options.concurrency} in flight: ideal {ideal:.1f} s",
        flush=True,
    )
    print(measure("milm_ray", sys.executable, options), flush=True)
    for peer in PEERS if options.peers else ():
        print(measure(peer, options.peer_python, options), flush=True)


if __name__ == "__main__":
    main()
