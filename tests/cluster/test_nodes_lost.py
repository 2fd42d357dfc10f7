"""Nodes that go dark in the middle of a stage: nothing is lost, nothing is asked for twice."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from milm_ray.workspace import Workspace
from tests.cluster.cluster import Job, Nodes
from tests.jobs.test_finetune_job import SEED, SETTINGS, TINY, make_workspace
from tests.llm_server_process import KEY, ServerProcess
from tests.transcription_job import (
    CONFIG,
    assert_nothing_that_arrived_was_asked_again,
    check_result,
    workspace_with_dialogues,
)

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(1800)]

FILES = 16_000
PACKED = 6_000


def corpus(folder: Path) -> Path:
    """SmileChat's layout: thousands of files, and a tar of longer ones that is cut into parts."""

    def dialogue(number: int, rounds: int) -> bytes:
        turns = [
            {"role": role, "content": f"第{number}次，第{k}句，{'想好好睡觉' * 10}。"}
            for k in range(rounds)
            for role in ("client", "counselor")
        ]
        return json.dumps(turns, ensure_ascii=False).encode()

    folder.mkdir()
    for number in range(FILES):
        (folder / f"{number}.json").write_bytes(dialogue(number, 5))
    with tarfile.open(folder / "more.tar", "w") as archive:
        for number in range(FILES, FILES + PACKED):
            data = dialogue(number, 25)
            entry = tarfile.TarInfo(f"data/{number}.json")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return folder


def test_in_ingest(nodes: Nodes, tmp_path: Path) -> None:
    raw = corpus(tmp_path / "raw")
    config = tmp_path / "c.yaml"
    config.write_text(f"ingest: {{corpora: {{smilechat: {{path: {raw}}}}}}}\n")
    nodes.add("a", "b")
    found = {}
    for name in ("undisturbed", "disturbed"):
        home = tmp_path / name
        with Job(nodes, "ingest", "--config", config, f"workspace={home}") as job:
            if name == "disturbed":
                job.wait_for(
                    lambda home=home: (
                        len(list(home.glob("dialogues/*.parquet"))) >= 2
                        and nodes.holds("b", "_read_row")
                    )
                )
                nodes.kill("b")
            job.end()
        found[name] = Workspace.open(str(home)).manifest("dialogues")
    assert found["undisturbed"]["counts"]["dialogues"] == FILES + PACKED
    assert found["disturbed"]["counts"] == found["undisturbed"]["counts"]
    assert found["disturbed"]["digest"] == found["undisturbed"]["digest"]


def test_in_transcribe(nodes: Nodes, tmp_path: Path) -> None:
    workspace = workspace_with_dialogues(tmp_path)
    nodes.add("a", "b")
    with ServerProcess(tmp_path / "log.jsonl", latency=0.6, jitter=0.3) as server:
        config = tmp_path / "c.yaml"
        config.write_text(CONFIG.format(workspace=workspace.root, url=server.url, attempts=3))
        server.most(12)
        with Job(nodes, "transcribe", "--config", config, TEST_LLM_KEY=KEY) as job:
            job.wait_for(lambda: len(server.events("answered")) >= 12)
            asking = nodes.where("Asker")
            assert asking is not None
            nodes.kill(asking)
            server.most(None)
            job.end()
        # Replies under way to a node that went dark never arrived: at most those in flight.
        check_result(workspace, server, lost=8)
        assert_nothing_that_arrived_was_asked_again(workspace, config, server)


def test_in_finetune(nodes: Nodes, tmp_path: Path) -> None:
    """Three models on three nodes; the one whose node is lost ends where the others end."""
    home = tmp_path / "work"
    make_workspace(home)
    names = ("one", "two", "three")
    settings = {
        "workspace": str(home),
        "seed": SEED,
        "models": {name: {"path": str(TINY), "chat_format": "llama3"} for name in names},
        "finetune": SETTINGS,
    }
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    nodes.add("a", "b", "c")

    def saved() -> bool:
        """Every model has a checkpoint that Ray Train knows of."""
        states = list(home.glob("checkpoints/*/checkpoint_manager_snapshot.json"))
        return len(states) == 3 and all("checkpoint_2" in s.read_text() for s in states)

    with Job(nodes, "finetune", "--config", config) as job:
        job.wait_for(saved)
        assert all(len(nodes.holds(name, "RayTrainWorker")) == 1 for name in ("a", "b", "c"))
        nodes.kill("b")
        nodes.add("d")  # the other two are full, as nodes with one GPU each would be
        job.wait_for(lambda: nodes.holds("d", "RayTrainWorker"))
        output = job.end()
    resumed = [line for line in output.splitlines() if "resumes after step" in line]
    assert len(resumed) == 1, output
    logs = {n: pq.read_table(home / "adapters" / n / "log.parquet").to_pylist() for n in names}
    (lost,) = [name for name in names if f"finetune {name} " in resumed[0]]
    (other, _) = [name for name in names if name != lost]
    steps = [row["step"] for row in logs[other]]
    assert steps == list(range(1, len(steps) + 1))
    for name in names:
        assert [row["step"] for row in logs[name]] == steps
        for row, expected in zip(logs[name], logs[other], strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], abs=1e-4)
