"""The transcription job against a misbehaving server, killed in the middle, run again.

`MILM_FAULT_ROUNDS=20 pytest tests/jobs/test_llm_faults.py` kills at 20 random moments.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from milm_ray.config import load_config
from milm_ray.dataset.transcribe import Transcription
from milm_ray.llm.ask import Asking
from milm_ray.llm.exchange import Answer, exchange
from milm_ray.schema import DIALOGUES, Dialogue, Turn
from milm_ray.workspace import Workspace
from tests.llm_server_process import KEY, ServerProcess

ROOT = Path(__file__).parents[2]
ROWS = 48
pytestmark = [pytest.mark.scenario, pytest.mark.timeout(1800)]

CONFIG = """
workspace: {workspace}
ray: {{num_cpus: 2}}
teacher:
  model: teacher
  base_url: {url}
  api_key_env: TEST_LLM_KEY
  concurrency: 8
  max_attempts: {attempts}
  prompt_price: 1.0
  completion_price: 2.0
transcribe: {{max_reject_rate: 0.5}}
"""


def workspace_with_dialogues(root: Path) -> Workspace:
    """`dialogues/` of one corpus and a `selection/` of it."""
    workspace = Workspace.open(str(root / "ws"))
    rows = [
        Dialogue(
            "smilechat",
            str(number),
            [
                Turn("client", f"第{number}位：我总是熬夜。"),
                Turn("counselor", "早点睡就好了。"),
                Turn("client", "睡不着。"),
                Turn("counselor", "试试数羊。"),
            ],
        ).row()
        for number in range(ROWS)
    ]
    workspace.write_table(pa.Table.from_pylist(rows, schema=DIALOGUES), "dialogues")
    for artifact in ("dialogues", "selection"):
        workspace.commit(
            artifact,
            stage="test",
            settings={},
            fingerprint={},
            counts={},
            started=time.time(),
            selected=["smilechat"],
        )
    return workspace


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One cluster for all jobs here, as in production: it outlives the jobs that are killed."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for last in (False, False, True):
        try:
            started = ray.init(address="local", num_cpus=2, include_dashboard=False)
            break
        except Exception:  # a busy machine may need more than Ray's own 30 seconds
            ray.shutdown()
            if last:
                raise
    os.environ["RAY_ADDRESS"] = started.address_info["gcs_address"]
    yield
    del os.environ["RAY_ADDRESS"]
    ray.shutdown()


def job(config: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "jobs" / "transcribe.py"), "--config", str(config)]
    environment = {**os.environ, "TEST_LLM_KEY": KEY}
    return subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def check_result(workspace: Workspace, server_log: ServerProcess, lost: int) -> None:
    """Every dialogue once; totals equal what the server says it sent, but for `lost` replies."""
    manifest = workspace.manifest("mi_dialogues")
    done = workspace.read_table("mi_dialogues")["source_dialogue_id"].to_pylist()
    rejects = workspace.read_table("rejects/transcribe")["dialogue_id"].to_pylist()
    wanted = workspace.read_table("dialogues")["dialogue_id"].to_pylist()
    assert sorted(done + rejects) == sorted(wanted)
    assert manifest["counts"]["asked"] == ROWS
    usage = manifest["usage"]
    answered = {event["question"]: event for event in server_log.events("answered")}
    assert usage["replies"] == len(answered)
    for name in ("prompt_tokens", "completion_tokens"):
        assert usage[name] == sum(event[name] for event in answered.values())
    expected = (usage["prompt_tokens"] + 2 * usage["completion_tokens"]) / 1e6
    assert usage["cost_usd"] == pytest.approx(expected, abs=1e-6)
    times = Counter(event["question"] for event in server_log.events("answered"))
    assert sum(number - 1 for number in times.values()) <= lost


def test_a_misbehaving_server_leaves_every_row_accounted_for(tmp_path: Path) -> None:
    workspace = workspace_with_dialogues(tmp_path)
    faults = {"rate_limited": 0.3, "failing": 0.1, "cut": 0.05, "broken": 0.1, "truncated": 0.02}
    with ServerProcess(tmp_path / "log.jsonl", **faults) as server:
        config = tmp_path / "c.yaml"
        config.write_text(CONFIG.format(workspace=workspace.root, url=server.url, attempts=12))
        process = job(config)
        output, _ = process.communicate()
        assert process.returncode == 0, output
        assert KEY not in output
        check_result(workspace, server, lost=0)
        assert workspace.manifest("mi_dialogues")["counts"]["repaired"] > 0
        assert f"{ROWS}/{ROWS} done" in output
        asked = len(server.events("asked"))
        again = job(config)
        output, _ = again.communicate()
        assert again.returncode == 0, output
        assert len(server.events("asked")) == asked
    stored = "".join(path.read_text() for path in Path(workspace.root).rglob("*.json*"))
    assert KEY not in stored


def asker_processes() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [child for child in found if "Asker" in " ".join(child.cmdline())]


def wait_for_replies(server: ServerProcess, process: subprocess.Popen[str], number: int) -> bool:
    """True when so many replies have been sent, False when the job ended before."""
    while len(server.events("answered")) < number:
        if process.poll() is not None:
            return False
        time.sleep(0.05)
    return True


def test_killed_at_random_moments_it_finishes_and_asks_nothing_twice(tmp_path: Path) -> None:
    kills = int(os.environ.get("MILM_FAULT_ROUNDS", "3"))
    pick = random.Random(7)
    workspace = workspace_with_dialogues(tmp_path)
    slow: dict[str, Any] = {"latency": 0.4, "jitter": 0.3, "failing": 0.05}
    server = ServerProcess(tmp_path / "log.jsonl", **slow)
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG.format(workspace=workspace.root, url=server.url, attempts=3))
    moments = sorted(pick.sample(range(1, ROWS), kills))
    victims = [("driver", "actor", "server")[n % 3] for n in range(kills)]
    process = job(config)
    try:
        for moment, victim in zip(moments, victims, strict=True):
            if not wait_for_replies(server, process, moment):
                process = job(config)
                assert wait_for_replies(server, process, moment)
            time.sleep(pick.uniform(0, 0.4))
            if victim == "actor":
                for child in asker_processes():
                    child.kill()
                continue
            if victim == "server":
                server.kill()
                output, _ = process.communicate()
                assert process.returncode == 1, output
                assert "does not answer" in output
                server = ServerProcess(tmp_path / "log.jsonl", port=server.port, **slow)
            else:
                os.kill(process.pid, signal.SIGKILL)
                process.communicate()
                # The cluster ends the dead job's actors; what reaches them before that is stored.
                psutil.wait_procs(asker_processes(), timeout=60)
            process = job(config)
        output, _ = process.communicate()
        assert process.returncode == 0, output
        # A reply sent to a process at the moment of its death never arrived: those in flight.
        check_result(workspace, server, lost=8 * kills)
        assert_nothing_that_arrived_was_asked_again(workspace, config, server)
    finally:
        server.kill()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def assert_nothing_that_arrived_was_asked_again(
    workspace: Workspace, config: Path, server: ServerProcess
) -> None:
    """No question was asked after the time at which its reply was stored."""
    loaded = load_config(config)
    asking = Asking(loaded, loaded.teacher, workspace, Transcription(loaded.transcribe), "check")
    asked: dict[str, list[float]] = {}
    for event in server.events("asked"):
        asked.setdefault(event["question"], []).append(event["at"])
    checked = 0
    for row in workspace.read_table("dialogues").to_pylist():
        steps = exchange(asking.task, row)
        request = next(steps)
        answer = asking.from_store(row)
        assert isinstance(answer, Answer)
        for reply in answer.replies:
            messages = [dict(message) for message in request.messages]
            question = json.dumps(messages, ensure_ascii=False, sort_keys=True)
            times = asked[hashlib.sha256(question.encode()).hexdigest()]
            assert max(times) <= reply.time
            checked += 1
            with contextlib.suppress(StopIteration):
                request = steps.send(reply)
    lines = [
        line
        for path in Path(workspace.path("replies")).glob("*.jsonl")
        for line in path.read_bytes().splitlines()
    ]
    assert len(lines) == checked, "a reply is stored twice, or one was asked for that no row needs"
