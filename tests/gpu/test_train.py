"""On a GPU, in bf16: training learns, is taken up where it was, and writes what PEFT can read.

pytest -m gpu tests/gpu
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from milm_ray.config import FinetuneSection
from milm_ray.finetune.engine import single_process
from milm_ray.finetune.train import ADAPTER_DIR, Task, train
from milm_ray.models import registry
from milm_ray.models.checkpoint import prepare_base

pytestmark = pytest.mark.gpu

SAMPLES = Path(__file__).resolve().parents[2] / "milm_ray" / "samples"


def rows():
    lines = (SAMPLES / "recorded/transcription.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [json.loads(json.loads(line)["reply"])["dialogue"] for line in lines[:16]]
    return [{"dialogue_id": f"d{number}", "turns": t} for number, t in enumerate(turns)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return prepare_base(
        SAMPLES / "models/tiny-llama3", None, tmp_path_factory.mktemp("bases"), "llama3"
    )


def run(base, out, stage, resume=None):
    settings = FinetuneSection(
        learning_rate=3e-3, epochs=4, logging_steps=1, save_steps=4, zero_stage=stage
    )
    targets = registry.get("llama3").lora_targets
    task = Task(
        model="llama3",
        base=str(base),
        identity="tiny-llama3",
        chat_format="llama3",
        lora_targets=targets,
        settings=settings,
        seed=11,
    )

    def save(step, write):
        write(out / f"step-{step}")

    single_process()
    return train(task, rows(), rank=0, workers=1, save=save, resume=resume)["log"]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_training_learns_resumes_and_is_read_by_peft(base, tmp_path, stage):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    log = run(base, tmp_path / "whole", stage)
    assert [row["step"] for row in log] == list(range(1, 9))
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in log)
    assert log[-1]["loss"] < 0.97 * log[0]["loss"]

    resumed = run(base, tmp_path / "resumed", stage, tmp_path / "whole" / "step-4")
    assert [row["loss"] for row in resumed] == pytest.approx([row["loss"] for row in log], rel=2e-3)

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to("cuda")
    ids = torch.arange(100, 164, device="cuda")[None]
    with torch.no_grad():
        plain = model(ids).logits
        tuned = PeftModel.from_pretrained(model, str(tmp_path / "whole" / "step-8" / ADAPTER_DIR))
        assert (tuned(ids).logits - plain).abs().max() > 1e-2
