"""The training loop in processes of its own: ZeRO stages, two workers, resuming."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

SETTINGS = {
    "learning_rate": 3e-3,
    "epochs": 2,
    "precision": "fp32",
    "cutoff": 200,
    "logging_steps": 1,
    "save_steps": 2,
    "pack_tokens": 500,
    "gradient_checkpointing": False,
    "lora": {"rank": 4, "alpha": 8},
}

# Eleven dialogues, ten a step: in the second step one of two workers has nothing to do.
ODD = {"epochs": 1, "save_steps": 1, "gradient_accumulation": 5, "zero_stage": 3}
DROP = {"gradient_accumulation": 4, "lora": {"rank": 4, "alpha": 8, "dropout": 0.2}}
HELD = {"eval_share": 0.2, "eval_steps": 1}


def dialogues(count):
    """Rows of schema.MI_DIALOGUES, as far as training reads them."""
    lines = (ROOT / "milm_ray/samples/recorded/transcription.jsonl").read_text(encoding="utf-8")
    rows = []
    for line in lines.splitlines()[:count]:
        turns = json.loads(json.loads(line)["reply"])["dialogue"]
        rows.append({"dialogue_id": f"d{len(rows)}", "turns": turns[: 2 + 2 * (len(rows) % 2)]})
    return rows


def run(tmp_path, base, workers, runs):
    """Run `runs` in `workers` processes; returns the outcome of each finished run by name."""
    out = tmp_path / f"out-{workers}"
    out.mkdir()
    spec = tmp_path / f"spec-{workers}.json"
    spec.write_text(
        json.dumps(
            {
                "workers": workers,
                "model": "llama3",
                "base": str(base),
                "rows": dialogues(11),
                "rendezvous": str(tmp_path / f"meet-{workers}"),
                "out": str(out),
                "runs": [{**r, "settings": {**SETTINGS, **r.get("settings", {})}} for r in runs],
            }
        ),
        encoding="utf-8",
    )
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(ROOT / "tests/finetune_worker.py"), str(spec)]
    processes = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, env=env) for rank in range(workers)
    ]
    assert [process.wait(timeout=600) for process in processes] == [0] * workers
    found = {r["name"]: out / f"{r['name']}.json" for r in runs}
    return {n: json.loads(p.read_text(encoding="utf-8")) for n, p in found.items() if p.exists()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from milm_ray.models.checkpoint import prepare_base

    source = ROOT / "milm_ray/samples/models/tiny-llama3"
    return prepare_base(source, None, tmp_path_factory.mktemp("bases"), "llama3")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, base):
    tmp_path = tmp_path_factory.mktemp("finetune")
    one = run(
        tmp_path,
        base,
        1,
        [
            {"name": "plain", "settings": {"zero_stage": 0}},
            {"name": "killed", "die_after": 2},
            {"name": "resumed", "resume_from": "killed/step-2"},
            {"name": "checkpointed", "settings": {"gradient_checkpointing": True}},
            {"name": "diverged", "settings": {"learning_rate": 1e20, "warmup_ratio": 0}},
            {"name": "held", "settings": HELD},
            {"name": "held_once", "settings": {**HELD, "eval_steps": 100}},
        ],
    )
    two = run(
        tmp_path,
        base,
        2,
        [
            {"name": "zero2", "settings": {"gradient_accumulation": 4, "zero_stage": 2}},
            {"name": "zero3", "settings": {"gradient_accumulation": 4, "zero_stage": 3}},
            {
                "name": "held3",
                "settings": {**HELD, "gradient_accumulation": 4, "zero_stage": 3},
            },
            {"name": "whole", "only_load": True},
            {"name": "divided", "only_load": True, "settings": {"zero_stage": 3}},
            {
                "name": "killed3",
                "die_after": 2,
                "settings": {"gradient_accumulation": 4, "zero_stage": 3},
            },
            {
                "name": "resumed3",
                "resume_from": "killed3/step-2",
                "settings": {"gradient_accumulation": 4, "zero_stage": 3},
            },
            {"name": "drop", "settings": DROP},
            {"name": "killed_drop", "die_after": 2, "settings": DROP},
            {"name": "resumed_drop", "resume_from": "killed_drop/step-2", "settings": DROP},
            {"name": "odd3", "settings": ODD},
            {"name": "killed_odd3", "die_after": 1, "settings": ODD},
            {"name": "resumed_odd3", "resume_from": "killed_odd3/step-1", "settings": ODD},
        ],
    )
    return {**one, **two}


def curve(outcome):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in outcome["log"]]


def test_training_lowers_the_loss(outcomes):
    losses = [row["loss"] for row in outcomes["plain"]["log"]]
    assert len(losses) == 4
    assert sum(losses[2:]) < sum(losses[:2])


@pytest.mark.parametrize(
    ("name", "other"),
    [
        *(("plain", n) for n in ("resumed", "checkpointed", "zero2", "zero3", "resumed3")),
        ("odd3", "resumed_odd3"),
        ("drop", "resumed_drop"),
    ],
)
def test_the_same_curve(outcomes, name, other):
    """One worker or two, any ZeRO stage, interrupted or not: the same training."""
    expected, found = curve(outcomes[name]), curve(outcomes[other])
    assert len(found) == len(expected)
    for (step, loss, norm), (other_step, other_loss, other_norm) in zip(
        expected, found, strict=True
    ):
        assert step == other_step
        assert other_loss == pytest.approx(loss, abs=1e-4)
        assert other_norm == pytest.approx(norm, rel=1e-3)


def test_held_out_loss_is_taken_without_touching_the_training(outcomes):
    every, once, divided = (outcomes[name] for name in ("held", "held_once", "held3"))
    assert every["counts"]["eval_samples"] == 2
    assert every["counts"]["samples"] == 9
    assert [row["eval_loss"] is None for row in once["log"]] == [True, True, True, False]
    losses = [row["eval_loss"] for row in every["log"]]
    assert losses[-1] < losses[0]
    assert losses[-1] == once["log"][-1]["eval_loss"]
    assert [row["loss"] for row in every["log"]] == [row["loss"] for row in once["log"]]
    assert [row["eval_loss"] for row in divided["log"]] == pytest.approx(losses, abs=1e-4)
    assert all(row["eval_loss"] is None for row in outcomes["plain"]["log"])


def test_zero_3_never_loads_the_whole_base_into_one_worker(outcomes):
    whole, divided = outcomes["whole"]["weights"], outcomes["divided"]["weights"]
    assert whole > 3_000_000
    assert divided == pytest.approx(whole / 2, rel=0.02)


def test_a_loss_that_is_no_number_stops_and_names_the_batch(outcomes):
    assert outcomes["diverged"]["what"] in ("the loss is not finite", "the gradient is not finite")
    assert 0 < len(outcomes["diverged"]["names"]) <= 8
    assert set(outcomes["diverged"]["names"]) <= {f"d{number}" for number in range(11)}


def test_adapters_are_the_same_and_complete(outcomes, tmp_path_factory, base):
    from safetensors.torch import load_file

    root = tmp_path_factory.getbasetemp()
    files = {
        path.parts[-4]: path for path in root.rglob("step-4/adapter/adapter_model.safetensors")
    }
    assert {"plain", "zero2", "zero3", "resumed"} <= files.keys()
    expected = load_file(files["plain"])
    assert len(expected) == 2 * 7 * 4
    for name in ("zero2", "zero3", "resumed", "resumed3"):
        found = load_file(files[name])
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert (found[key] - tensor).norm() < 1e-2 * tensor.norm(), (name, key)
