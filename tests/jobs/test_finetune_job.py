"""jobs/finetune.py on a tiny model: a killed worker, a killed driver, and the same command finishes
with the losses of an undisturbed run; then preference tuning goes on from its adapter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from milm_ray.schema import MI_DIALOGUES, PREFERENCES, Dialogue, Turn
from milm_ray.serving.adapters import AdapterStore
from milm_ray.workspace import Workspace
from tests.processes import command_of

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "milm_ray/samples/models/tiny-llama3"
pytestmark = [pytest.mark.scenario, pytest.mark.timeout(1800)]

SEED = 11
SETTINGS = {
    "learning_rate": 3e-3,
    "epochs": 12,  # still going on when a slow machine comes to kill it
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


def commit(workspace, artifact, **counts):
    workspace.commit(
        artifact, stage="test", settings={}, fingerprint={}, counts=counts, started=time.time()
    )


def make_workspace(path):
    workspace = Workspace.open(str(path))
    workspace.write_table(pa.Table.from_pylist(rows(), MI_DIALOGUES), "train")
    commit(workspace, "train", dialogues=11)
    return workspace


def undisturbed(tmp_path, base):
    """The log of the same training in one process without Ray."""
    out = tmp_path / "reference"
    out.mkdir()
    spec = out / "spec.json"
    spec.write_text(
        json.dumps(
            {
                "model": "llama3",
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


def checkpoints(home):
    """The checkpoints that Ray Train knows of (it asks its workers every 2 s), as it notes them."""
    found = home.glob("checkpoints/one-*/checkpoint_manager_snapshot.json")
    text = "".join(path.read_text(encoding="utf-8") for path in found)
    return text if "checkpoint_2" in text else ""


def configure(path, home, **finetune):
    """A configuration of one model, the tiny Llama."""
    settings = {
        "workspace": str(home),
        "seed": SEED,
        "ray": {"num_cpus": 1},
        "models": {"one": {"path": str(TINY), "chat_format": "llama3"}},
        "finetune": {**SETTINGS, **finetune},
    }
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def test_killed_worker_and_killed_driver_end_where_an_undisturbed_run_ends(tmp_path):
    home = tmp_path / "work"
    make_workspace(home)
    config = configure(tmp_path / "tiny.yaml", home)
    log = tmp_path / "job.log"
    driver = start(config, log)
    started: list[psutil.Process] = []
    try:
        # The worker dies: Ray Train starts another, which goes on.
        before = wait_for(lambda: checkpoints(home), driver)
        started = psutil.Process(driver.pid).children(recursive=True)
        workers = [p for p in started if "RayTrainWorker" in command_of(p)]
        assert len(workers) == 1
        workers[0].kill()

        def went_on():
            again = "resumes after step" in log.read_text(encoding="utf-8")
            return again and checkpoints(home) != before

        wait_for(went_on, driver)
        # The driver dies, and with it the cluster.
        started = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        driver.wait()
    finally:
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        driver.kill()
    assert not (home / "adapters/one/manifest.json").exists()
    resumed = log.read_text(encoding="utf-8").count("resumes after step")
    again = start(config, log)
    try:
        assert again.wait(timeout=600) == 0, log.read_text(encoding="utf-8")
    finally:
        again.kill()
        again.wait()
    assert log.read_text(encoding="utf-8").count("resumes after step") == resumed + 1

    (base,) = home.glob("bases/tiny-llama3-*")
    expected = undisturbed(tmp_path, base)
    place = home / "adapters/one"
    found = pq.read_table(place / "log.parquet").to_pylist()
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-4)
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "README.md",
        "loss.png",
    } <= {path.name for path in place.iterdir()}
    settings = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == "tiny-llama3"
    assert list(home.glob("checkpoints/one-*/tensorboard/events.out.*"))
    card = (place / "README.md").read_text(encoding="utf-8")
    assert "# Llama-3-mi" in card
    assert "Built with Meta Llama 3" in card
    assert (home / "adapters/loss_curves.png").stat().st_size > 10_000


def test_preference_tuning_goes_on_from_an_adapter(tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    home = tmp_path / "work"
    workspace = Workspace.open(str(home))
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    first = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    first.save_pretrained(home / "adapters/one", save_embedding_layers=False)
    commit(workspace, "adapters/one")
    pairs = [
        {
            "dialogue_id": f"d{number}",
            "round_index": 1,
            "model": "one",
            "instruction": "你是心理咨询师。",
            "input": f"第{number}天，我又抽烟了。",
            "history": [],
            "chosen": "您很失望，可您还在数日子。",
            "rejected": "你必须马上戒烟。",
            "judge": "judge-1",
        }
        for number in range(4)
    ]
    workspace.write_table(pa.Table.from_pylist(pairs, PREFERENCES), "preferences")
    commit(workspace, "preferences", pairs=4)
    before = (home / "adapters/one/adapter_model.safetensors").read_bytes()
    dpo = {"learning_rate": 1e-3, "epochs": 2}
    settings = {"method": "dpo", "dpo": dpo, "gradient_accumulation": 2}
    config = configure(tmp_path / "dpo.yaml", home, **settings)
    log = tmp_path / "dpo.log"
    job = start(config, log)
    try:
        assert job.wait(timeout=600) == 0, log.read_text(encoding="utf-8")
    finally:
        job.kill()
        job.wait()
    place = home / "adapters/one/dpo"
    rewards = pq.read_table(place / "rewards.parquet").to_pylist()
    assert rewards[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert rewards[-1]["loss"] < rewards[0]["loss"]
    card = (place / "README.md").read_text(encoding="utf-8")
    assert "judged by | judge-1, automatically" in card
    assert (place / "loss.png").stat().st_size > 5_000
    # The adapter that it started from is untouched, and the tuned one is served beside it.
    assert (home / "adapters/one/adapter_model.safetensors").read_bytes() == before
    served = AdapterStore(str(home / "adapters")).list("one")
    assert [adapter.public_id for adapter in served] == ["one:mi", "one:dpo"]
