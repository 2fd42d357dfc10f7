"""jobs/finetune.py on tiny models: two models on a cluster too small for both, a killed worker, a
killed driver; the same command finishes with the losses of an undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from milm_ray.models.checkpoint import prepare_base
from milm_ray.schema import MI_DIALOGUES, Dialogue, Turn
from milm_ray.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(3600)]

SEED = 11
SETTINGS = {
    "learning_rate": 3e-3,
    "epochs": 8,
    "precision": "fp32",
    "cutoff": 300,
    "logging_steps": 1,
    "save_steps": 1,
    "gradient_checkpointing": False,
    "lora": {"rank": 4, "alpha": 8},
    "gpus_per_worker": 0,
    "cpus_per_worker": 1,
}


def rows():
    lines = (ROOT / "milm_ray/samples/recorded/transcription.jsonl").read_text(encoding="utf-8")
    found = []
    for line in lines.splitlines()[:11]:
        reply = json.loads(json.loads(line)["reply"])["dialogue"][:4]
        dialogue = Dialogue("cpsycound", "x", [Turn(t["role"], t["content"]) for t in reply])
        found.append(
            {
                **dialogue.row(),
                "source_dialogue_id": dialogue.dialogue_id,
                "target_behavior": "",
                "reply_key": "",
            }
        )
    return found


def make_workspace(path):
    workspace = Workspace.open(str(path))
    workspace.write_table(pa.Table.from_pylist(rows(), MI_DIALOGUES), "train")
    workspace.commit(
        "train",
        stage="split",
        settings={},
        fingerprint=workspace.fingerprint({}),
        counts={"rows": 11},
        started=time.time(),
    )
    return workspace


def undisturbed(tmp_path, model):
    """The log of the same training in one process without Ray."""
    base = prepare_base(ROOT / f"milm_ray/samples/models/tiny-{model}", None, tmp_path, model)
    out = tmp_path / f"reference-{model}"
    out.mkdir()
    spec = out / "spec.json"
    spec.write_text(
        json.dumps(
            {
                "model": model,
                "base": str(base),
                "rows": rows(),
                "workers": 1,
                "rendezvous": str(out / "meet"),
                "out": str(out),
                "runs": [{"name": "run", "settings": SETTINGS}],
            }
        ),
        encoding="utf-8",
    )
    subprocess.run(
        [sys.executable, str(ROOT / "tests/finetune_worker.py"), str(spec), "0"],
        check=True,
        cwd=ROOT,
        timeout=600,
    )
    return json.loads((out / "run.json").read_text(encoding="utf-8"))["log"]


def start(config, log):
    with log.open("a") as stream:
        return subprocess.Popen(
            [sys.executable, "jobs/finetune.py", "--config", str(config)],
            cwd=ROOT,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "RAY_worker_niceness": "0"},
        )


def wait_for(condition, process, seconds=400):
    deadline = time.time() + seconds
    while time.time() < deadline:
        found = condition()
        if found:
            return found
        assert process.poll() is None, "the job ended before its time"
        time.sleep(0.05)
    raise AssertionError("waited too long")


def checkpoints(home, model):
    """Whether Ray Train knows of a checkpoint of the model (it asks its workers every 2 s)."""
    snapshots = home.glob(f"checkpoints/{model}-*/checkpoint_manager_snapshot.json")
    return any("checkpoint_2" in path.read_text(encoding="utf-8") for path in snapshots)


@pytest.mark.timeout(1500)
def test_killed_worker_and_killed_driver_end_where_an_undisturbed_run_ends(tmp_path):
    home = tmp_path / "work"
    make_workspace(home)
    config = tmp_path / "tiny.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "workspace": str(home),
                "seed": SEED,
                "ray": {"num_cpus": 1},
                "models": {
                    model: {
                        "path": f"milm_ray/samples/models/tiny-{model}",
                        "chat_format": model,
                    }
                    for model in ("llama3", "glm4")
                },
                "finetune": SETTINGS,
            }
        ),
        encoding="utf-8",
    )
    log = tmp_path / "job.log"
    driver = start(config, log)
    started: list[psutil.Process] = []
    try:
        # The first to train loses its worker, which Ray Train starts again.
        wait_for(lambda: checkpoints(home, "llama3") or checkpoints(home, "glm4"), driver)
        started = psutil.Process(driver.pid).children(recursive=True)
        workers = [p for p in started if "RayTrainWorker" in " ".join(p.cmdline())]
        assert len(workers) == 1
        workers[0].kill()
        # The second loses its driver, and with it the cluster.
        first = "llama3" if checkpoints(home, "llama3") else "glm4"
        second = "glm4" if first == "llama3" else "llama3"
        wait_for(lambda: checkpoints(home, second), driver)
        started = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        driver.wait()
    finally:
        for process in started:
            if process.is_running():
                process.kill()
        driver.kill()

    text = log.read_text(encoding="utf-8")
    assert f"finetune {second} | waits for 1 CPU; the cluster has 1 CPU, held by {first}" in text
    assert (home / "adapters" / first / "manifest.json").exists()
    assert not (home / "adapters" / second / "manifest.json").exists()

    again = start(config, log)
    assert again.wait(timeout=600) == 0
    text = log.read_text(encoding="utf-8")
    assert f"adapters/{first}/ is up to date" in text
    assert f"finetune {first} | resumes after step" in text
    assert f"finetune {second} | resumes after step" in text

    for model in ("llama3", "glm4"):
        found = pq.read_table(home / "adapters" / model / "log.parquet").to_pylist()
        expected = undisturbed(tmp_path, model)
        assert [row["step"] for row in found] == [row["step"] for row in expected]
        for row, other in zip(found, expected, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], abs=1e-4)
        names = {path.name for path in (home / "adapters" / model).iterdir()}
        assert {
            "adapter_config.json",
            "adapter_model.safetensors",
            "chat_template.jinja",
            "README.md",
            "loss.png",
        } <= names
        settings = json.loads((home / "adapters" / model / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == f"tiny-{model}"
    assert list(home.glob("checkpoints/glm4-*/tensorboard/events.out.*"))
    card = (home / "adapters" / "glm4" / "README.md").read_text(encoding="utf-8")
    assert "# glm-4-mi" in card
    assert "Built with glm-4" in card
    assert (home / "adapters" / "loss_curves.png").stat().st_size > 10_000
