"""How a job's process ends when it is told to, and what its log looks like to a machine."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

SLEEPER = """
import sys, time
from milm_ray.job import Plan, Stage, main

def run(*_):
    print("working", flush=True)
    try:
        time.sleep(60)
    finally:
        time.sleep(60)  # what would take longer than whoever stops the job will wait

sys.exit(main("d", [Stage("sleep", lambda *_: Plan(), run, uses_ray=False)], sys.argv[1:]))
"""


def start(tmp_path: Path, *overrides: str) -> subprocess.Popen[str]:
    config = tmp_path / "c.yaml"
    config.write_text(f"workspace: {tmp_path / 'ws'}\n", encoding="utf-8")
    job = {"metadata": {"job_submission_id": "raysubmit_7"}}
    return subprocess.Popen(
        [sys.executable, "-c", SLEEPER, "--config", str(config), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)},
    )


def stopped(process: subprocess.Popen[str]) -> list[str]:
    """The lines of a job that gets SIGTERM once it works."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if line == "working\n":
            process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 1
    return lines


def test_a_stopped_job_says_so_last_and_ends_at_once(tmp_path: Path) -> None:
    lines = stopped(start(tmp_path))
    assert lines[-1] == "stopped; run the same command again to resume"


def test_the_log_as_json_names_job_and_stage(tmp_path: Path) -> None:
    lines = stopped(start(tmp_path, "ray.log=json"))
    entries = [json.loads(line) for line in lines if line.startswith("{")]
    (begun,) = [entry for entry in entries if "start" in entry["message"]]
    assert begun["job"] == "raysubmit_7"
    assert begun["stage"] == "sleep"
    assert begun["level"] == "INFO"
    assert entries[0]["stage"] == ""  # the plan belongs to no stage yet
