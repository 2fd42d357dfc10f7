"""The transcription job against a misbehaving server, killed in the middle, run again.

`MILM_FAULT_ROUNDS=20 pytest tests/jobs/test_llm_faults.py` kills at 20 random moments.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from milm_ray.job import start_ray
from tests.llm_server_process import KEY, ServerProcess
from tests.processes import command_of
from tests.transcription_job import (
    CONFIG,
    ROWS,
    assert_nothing_that_arrived_was_asked_again,
    check_result,
    workspace_with_dialogues,
)

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.scenario, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One cluster for all jobs here, as in production: it outlives the jobs that are killed."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    started = start_ray(num_cpus=2, include_dashboard=False)
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
    return [child for child in found if "Asker" in command_of(child)]


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
    # So much is answered and no more: the job cannot have ended when its server is killed.
    ends = (m for m, victim in zip(moments, victims, strict=True) if victim == "server")
    server.most(next(ends, None))
    process = job(config)
    try:
        for moment, victim in zip(moments, victims, strict=True):
            if not wait_for_replies(server, process, moment):
                process = job(config)
                assert wait_for_replies(server, process, moment)
            time.sleep(pick.uniform(0, 0.4))
            if victim == "actor":
                for child in asker_processes():
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
                continue
            if victim == "server":
                server.kill()
                output, _ = process.communicate()
                assert process.returncode == 1, output
                assert "does not answer" in output
                server = ServerProcess(tmp_path / "log.jsonl", port=server.port, **slow)
                server.most(next(ends, None))
            else:
                os.kill(process.pid, signal.SIGKILL)
                process.communicate()
                # The cluster ends the dead job's actors; what reaches them before that is stored.
                psutil.wait_procs(asker_processes(), timeout=300)
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
