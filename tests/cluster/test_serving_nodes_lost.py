"""Nodes that serve go dark: every prediction is there, and no word of a live chat is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from milm_ray.config import load_config
from milm_ray.serving.chat.build import ChatArgs
from milm_ray.serving.endpoints import prepared_bases
from milm_ray.serving.running import running_chat
from milm_ray.workspace import Workspace
from tests.cluster.cluster import Job, Nodes, free_port, wait_for
from tests.serving.chat_processes import ModelServer
from tests.serving.conftest import MODELS, RANK, commit, random_adapter, sample_rounds
from tests.serving.test_chat_serve import talk, whole

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(1800)]

GENERATE = {
    "models": {"llama3": {"path": str(MODELS / "tiny-llama3"), "chat_format": "llama3"}},
    "finetune": {"lora": {"rank": RANK}},
    "serve": {
        "dtype": "float32",
        "max_model_len": 512,
        "gpus_per_replica": 0,
        "cpus_per_replica": 0.5,
        "engine": {"kv_cache_memory_bytes": 128 << 20},
    },
    "generate": {"max_new_tokens": 48, "concurrency": 2},
}


def test_in_generate(nodes: Nodes, tmp_path: Path) -> None:
    """The node of the only engine is lost in mid-prediction: another starts elsewhere, goes on."""
    home, config = tmp_path / "work", tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({**GENERATE, "workspace": str(home)}), encoding="utf-8")
    workspace = Workspace.open(str(home))
    (base,) = prepared_bases(load_config(config), workspace).values()
    random_adapter(base, workspace.local("adapters", "llama3"), "llama3", 0)
    commit(workspace, "adapters/llama3")
    rounds = sample_rounds(12, 5)
    workspace.write_table(rounds, "test_rounds")
    commit(workspace, "test_rounds")
    wanted = sorted(
        (row["dialogue_id"], row["round_index"], "llama3", variant)
        for row in rounds.to_pylist()
        for variant in ("base", "adapter")
    )

    def replies() -> list[str]:
        """The stored replies, a line each."""
        files = home.glob("replies/*.jsonl")
        text = "".join(file.read_text(encoding="utf-8") for file in files)
        return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]

    nodes.add("a", "b")
    with Job(nodes, "generate", "--config", config) as job:
        engine = job.wait_for(lambda: nodes.where("model-llama3"))
        job.wait_for(lambda: len(replies()) >= 4)
        nodes.kill(engine)
        before = replies()
        assert len(before) < len(wanted), "all was said before the node was lost"
        output = job.end()

    after = replies()
    keys = [json.loads(line)["key"] for line in after]
    assert len(set(keys)) == len(keys) == len(wanted), output
    assert set(before) <= set(after)
    rows = workspace.read_table("predictions").to_pylist()
    named = ("dialogue_id", "round_index", "model", "variant")
    assert sorted(tuple(row[name] for name in named) for row in rows) == wanted, output
    assert not workspace.manifest("predictions")["counts"]["rejected"]


SERVES = """
import time
import ray
from ray import serve
from milm_ray.serving.caretaker import removed_at_end

@serve.deployment
class Hello:
    pass

ray.init(address="auto")
serve.start(http_options={"location": "NoServer"})
with removed_at_end("hello", ours=True):
    serve.run(Hello.bind(), name="hello", route_prefix=None)
    print("up", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_driver_served_is_taken_off_the_cluster(nodes: Nodes) -> None:
    nodes.add("a")
    driver = subprocess.Popen(
        [sys.executable, "-c", SERVES],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_ADDRESS": nodes.address},
    )
    assert driver.stdout is not None
    try:
        assert "up\n" in iter(driver.stdout.readline, "")
        assert nodes.where("ServeReplica:hello") == "a"
    finally:
        driver.kill()
        driver.wait()
        driver.stdout.close()
    # A replica that is in use by nobody holds no GPU: within seconds there is none.
    wait_for(lambda: nodes.where("ServeReplica") is None, 240)
    wait_for(lambda: not nodes.holds("head", "ServeController"), 240)
    wait_for(lambda: not nodes.holds("head", "Caretaker"), 240)


def test_in_live_chat(nodes: Nodes, tmp_path: Path) -> None:
    """The node of the chat's replica is lost while people talk; no word of theirs is."""
    import ray
    from ray import serve

    nodes.add("a", "b")
    ray.init(address=nodes.address, logging_level="WARNING", log_to_driver=False)
    try:
        with ModelServer(tmp_path, pause=0.2) as model:
            port = free_port()
            serve.start(http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly"})
            args = ChatArgs(
                models_url=model.url,
                models=["llama3:mi"],
                default_database=str(tmp_path / "sessions.sqlite3"),
            )
            with (
                running_chat(args, f"http://127.0.0.1:{port}/v1") as url,
                ThreadPoolExecutor(4) as pool,
            ):
                talks = [pool.submit(talk, f"{url}/", 6) for _ in range(4)]
                time.sleep(3)
                serving = nodes.where("ServeReplica:chat")
                assert serving is not None
                nodes.kill(serving)
                assert all(whole(done.result(900), 6) for done in talks)
    finally:
        serve.shutdown()
        ray.shutdown()
