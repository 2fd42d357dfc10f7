"""Preference tuning on a tiny model: pairs in the chat format, DPO by TRL, resuming."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from milm_ray.config import FinetuneSection
from milm_ray.errors import UserError
from milm_ray.finetune.dpo import pairs_of, tune
from milm_ray.finetune.train import Task
from milm_ray.models import registry
from milm_ray.models.chat_format import render
from milm_ray.models.checkpoint import prepare_base
from milm_ray.models.messages import round_messages
from tests.unit.conftest import process_of_one

ROOT = Path(__file__).resolve().parents[2]

SETTINGS = {
    "method": "dpo",
    "precision": "fp32",
    "cutoff": 300,
    "schedule": "constant",
    "warmup_ratio": 0,
    "gradient_accumulation": 2,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_steps": 3,
    "dpo": {"learning_rate": 2e-3, "epochs": 2, "beta": 0.5},
}


def preferences(count=6, model="llama3"):
    """Rows of schema.PREFERENCES, as far as tuning reads them."""
    return [
        {
            "dialogue_id": f"d{number}",
            "round_index": 2,
            "model": model,
            "instruction": "你是心理咨询师。",
            "input": f"第{number}天，我又抽烟了。",
            "history": [{"client": "您好，我想戒烟。", "counselor": "听起来您已经想了很久。"}],
            "chosen": f"第{number}天没有守住，您很失望，可您还在数日子。",
            "rejected": "你必须马上戒烟。",
        }
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    source = ROOT / "milm_ray/samples/models/tiny-llama3"
    return prepare_base(source, None, tmp_path_factory.mktemp("bases"), "llama3")


@pytest.fixture(scope="module")
def tokenizer(base):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


@pytest.mark.parametrize("model", ["baichuan2", "glm4", "llama3"])
def test_pairs_are_what_serving_renders(model, tmp_path):
    from transformers import AutoTokenizer

    source = ROOT / f"milm_ray/samples/models/tiny-{model}"
    tokenizer = AutoTokenizer.from_pretrained(prepare_base(source, None, tmp_path, model))
    (row,) = preferences(1)
    ((pair,), counts) = pairs_of([row], tokenizer, model, 300)
    prompt = render(model, round_messages(row), add_generation_prompt=True)
    assert pair["prompt_ids"] == tokenizer.encode(prompt, add_special_tokens=False)
    for name in ("chosen", "rejected"):
        said = tokenizer.decode(pair[f"{name}_ids"])
        assert said.strip().startswith(row[name])
        assert len(said) > len(row[name])  # the end token
    assert counts["pairs"] == 1
    assert counts["tokens"] == 2 * len(pair["prompt_ids"]) + len(
        pair["chosen_ids"] + pair["rejected_ids"]
    )


def test_a_pair_over_the_cutoff_loses_its_oldest_round_or_is_left_out(tokenizer):
    (row,) = preferences(1)
    ((pair,), counts) = pairs_of([row], tokenizer, "llama3", 300)
    whole = len(pair["prompt_ids"]) + len(pair["chosen_ids"])
    ((short,), counts) = pairs_of([row], tokenizer, "llama3", whole - 1)
    assert counts["shortened"] == 1
    assert "我想戒烟" not in tokenizer.decode(short["prompt_ids"])
    assert row["input"] in tokenizer.decode(short["prompt_ids"])
    assert short["chosen_ids"] == pair["chosen_ids"]
    with pytest.raises(UserError, match="no preference pair is left of 1"):
        pairs_of([row], tokenizer, "llama3", 20)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base):
    """An adapter that changes what the base says, as fine-tuning leaves one."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = list(registry.get("llama3").lora_targets)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    place = tmp_path_factory.mktemp("adapter")
    tuned.save_pretrained(place, save_embedding_layers=False)
    return place


class Killed(Exception):
    """Stands for the death of the process right after a checkpoint."""


def run(base, adapter, out, resume=None, die=False, **settings):
    def save(step, write):
        write(out / f"step-{step}")
        if die:
            raise Killed

    task = Task(
        model="llama3",
        base=str(base),
        identity="tiny-llama3",
        chat_format="llama3",
        lora_targets=registry.get("llama3").lora_targets,
        settings=FinetuneSection(**{**SETTINGS, **settings}),
        seed=11,
        adapter=str(adapter),
    )
    rows = [*preferences(), *preferences(2, model="glm4")]
    return tune(task, rows, rank=0, workers=1, save=save, resume=resume, say=lambda text: None)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, base, adapter):
    """A run by one worker, and the adapter that it leaves."""
    out = tmp_path_factory.mktemp("undisturbed")
    with process_of_one():
        return run(base, adapter, out), out / "step-6/adapter"


def same(log, expected):
    assert [row["step"] for row in log] == [row["step"] for row in expected]
    for row, other in zip(log, expected, strict=True):
        for name in ("loss", "grad_norm", "chosen_reward", "rejected_reward"):
            assert row[name] == pytest.approx(other[name], abs=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_the_chosen_replies_gain_and_a_killed_run_ends_the_same(
    tmp_path, base, adapter, undisturbed
):
    from safetensors.torch import load_file

    found, place = undisturbed
    assert found["counts"]["pairs"] == 6
    assert found["counts"]["steps"] == 6
    log = found["log"]
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    # Against itself nothing is gained: the adapter started from is the reference.
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert log[-1]["chosen_reward"] > log[-1]["rejected_reward"]
    assert log[-1]["accuracy"] == 1.0

    with pytest.raises(Killed):
        run(base, adapter, tmp_path / "killed", die=True)
    resumed = run(base, adapter, tmp_path / "again", resume=tmp_path / "killed/step-3")
    same(resumed["log"], log)

    assert {p.name for p in place.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    settings = json.loads((place / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "tiny-llama3"
    before, after = (load_file(p / "adapter_model.safetensors") for p in (adapter, place))
    assert before.keys() == after.keys()
    assert any((after[name] - tensor).abs().max() > 1e-3 for name, tensor in before.items())


def in_two_processes(tmp_path, base, adapter, name, **more):
    """A run by two workers that divide the weights, half a step's pairs each."""
    spec = tmp_path / f"{name}.spec"
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    settings = {**SETTINGS, "gradient_accumulation": 1, "zero_stage": 3}
    told = {
        "workers": 2,
        "model": "llama3",
        "base": str(base),
        "adapter": str(adapter),
        "rows": preferences(),
        "rendezvous": str(tmp_path / f"{name}.meet"),
        "out": str(out),
        "runs": [{"name": name, "settings": settings, **more}],
    }
    spec.write_text(json.dumps(told), encoding="utf-8")
    command = [sys.executable, str(ROOT / "tests/finetune_worker.py"), str(spec)]
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}
    workers = [subprocess.Popen([*command, str(rank)], cwd=ROOT, env=quiet) for rank in range(2)]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    return out


@pytest.mark.scenario
def test_workers_that_divide_the_weights_tune_alike_killed_and_resumed(
    tmp_path, base, adapter, undisturbed
):
    from safetensors.torch import load_file

    found, place = undisturbed
    in_two_processes(tmp_path, base, adapter, "killed", die_after=3)
    out = in_two_processes(tmp_path, base, adapter, "resumed", resume_from="killed/step-3")
    divided = json.loads((out / "resumed.json").read_text(encoding="utf-8"))
    assert divided["counts"] == found["counts"]
    same(divided["log"], found["log"])
    one, two = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (place, out / "resumed/step-6/adapter")
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (two[name] - tensor).norm() < 1e-2 * tensor.norm(), name


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_a_loss_that_is_no_number_stops(tmp_path, base, adapter):
    with pytest.raises(UserError, match="the loss of preference tuning is nan"):
        run(base, adapter, tmp_path, dpo={"learning_rate": 1e30, "epochs": 4})
