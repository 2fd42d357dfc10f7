"""Jobs submitted over the network with a token: one is stopped, one loses a node's link."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.cluster.cluster import RAY, ROOT, wait_for, wait_for_jobs
from tests.cluster.network import Network
from tests.llm_server_process import KEY, ServerProcess
from tests.transcription_job import (
    CONFIG,
    assert_nothing_that_arrived_was_asked_again,
    check_result,
    workspace_with_dialogues,
)

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(1800)]


def ray_job(network: Network, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [RAY, "job", *arguments],
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_ADDRESS": network.dashboard},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def submit(network: Network, name: str, config: Path) -> subprocess.Popen[str]:
    environment = json.dumps(
        {
            "excludes": ["milm_ray/samples"],
            "env_vars": {"TEST_LLM_KEY": KEY},
        }
    )
    return ray_job(
        network,
        *("submit", "--submission-id", name, "--working-dir", "."),
        *("--runtime-env-json", environment, "--"),
        *(sys.executable, "jobs/transcribe.py", "--config", str(config)),
    )


def test_a_stopped_job_and_a_broken_link_leave_nothing_lost_and_nothing_asked_twice(
    tmp_path: Path,
) -> None:
    # Makes the token in the home directory, as the README tells, unless there is one.
    subprocess.run([RAY, "get-auth-token", "--generate"], check=True, stdout=subprocess.DEVNULL)
    workspace = workspace_with_dialogues(tmp_path)
    config = tmp_path / "c.yaml"
    with Network() as network:
        network.start_head()
        for name in ("a", "b"):
            network.start_node(name)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{network.dashboard}/api/jobs/", timeout=300)
        wait_for_jobs(network.dashboard)
        with ServerProcess(
            tmp_path / "log.jsonl", host=network.host, latency=0.8, jitter=0.3
        ) as server:
            text = CONFIG.format(workspace=workspace.root, url=server.url, attempts=3)
            config.write_text(text)

            server.most(10)
            first = submit(network, "first", config)
            wait_for(lambda: len(server.events("answered")) >= 10 or first.poll() is not None, 400)
            stopped, _ = ray_job(network, "stop", "first").communicate(timeout=180)
            output, _ = first.communicate(timeout=180)
            assert "was stopped" in stopped, stopped + output
            log, _ = ray_job(network, "logs", "first").communicate(timeout=180)
            said = [line for line in log.splitlines() if line.strip()]
            assert "run the same command again to resume" in said[-1], log
            assert not workspace.exists("mi_dialogues", "manifest.json")

            # Ray ends a stopped job's actors a little later.
            wait_for(lambda: not any(network.holds(name, "Asker") for name in ("a", "b")), 120)
            server.most(18)
            second = submit(network, "second", config)
            wait_for(lambda: len(server.events("answered")) >= 18 or second.poll() is not None, 400)
            (asking,) = [name for name in ("a", "b") if network.holds(name, "Asker")]
            network.cut(asking)
            server.most(None)
            output, _ = second.communicate(timeout=400)
            assert second.returncode == 0, output
            # What was under way when the job was stopped and when the link broke never arrived.
            check_result(workspace, server, lost=16)
            assert_nothing_that_arrived_was_asked_again(workspace, config, server)
