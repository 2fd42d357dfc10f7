"""The shipped tiny models with random adapters, served by real engines."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from milm_ray.config import Config
from milm_ray.models import chat_format, registry
from milm_ray.schema import ROUNDS
from milm_ray.serving.endpoints import app_args, prepared_bases
from milm_ray.workspace import Workspace

MODELS = Path(__file__).parents[2] / "milm_ray" / "samples" / "models"
RANK = 4


def random_adapter(
    base: Path, target: Path, model: str, seed: int, also: tuple[str, ...] = ()
) -> None:
    """A LoRA adapter in PEFT's layout, strong enough to change what the base says.

    also: modules beside the model's own targets, such as embed_tokens and lm_head.
    """
    from safetensors import safe_open
    from safetensors.numpy import save_file

    targets = (*registry.get(model).lora_targets, *also)
    random = np.random.default_rng(seed)
    tensors = {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # not a dict
                module = name.removesuffix(".weight")
                if not name.endswith(".weight") or module.rsplit(".", 1)[-1] not in targets:
                    continue
                rows, columns = weights.get_slice(name).get_shape()
                for part, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
                    place = f"lora_{part}.weight"
                    if module.endswith("embed_tokens"):  # looked up, so PEFT keeps A transposed
                        place = f"lora_embedding_{part}"
                        shape = (RANK, rows) if part == "A" else (columns, RANK)
                    values = random.normal(0, 0.2, shape).astype(np.float32)
                    tensors[f"base_model.model.{module}.{place}"] = values
    target.mkdir(parents=True)
    save_file(tensors, target / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(targets),
        "base_model_name_or_path": str(base),
    }
    (target / "adapter_config.json").write_text(json.dumps(config))
    chat_format.save_chat_format(target, model)


def sample_rounds(dialogues: int, rounds: int) -> pa.Table:
    """Rounds of made-up dialogues, each dialogue's in order."""
    rows = []
    for dialogue in range(dialogues):
        history: list[dict[str, str]] = []
        for index in range(rounds):
            client = f"我最近第{dialogue + 1}次想戒烟，第{index + 1}天就很难受。"
            counselor = f"听起来第{index + 1}天对您很不容易。"
            rows.append(
                {
                    "dialogue_id": f"{dialogue:064x}",
                    "round_index": index,
                    "topic": "戒烟",
                    "instruction": "你是一位心理咨询师。",
                    "input": client,
                    "output": counselor,
                    "history": list(history),
                }
            )
            history.append({"client": client, "counselor": counselor})
    return pa.Table.from_pylist(rows, ROUNDS)


@dataclass(frozen=True)
class Served:
    """Endpoints that are up: two tiny models, an adapter `mi` each."""

    url: str
    config: Config
    workspace: Workspace
    bases: dict[str, Path]


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    import ray

    from milm_ray.job import start_ray
    from milm_ray.serving.running import running_models

    place = tmp_path_factory.mktemp("serving")
    names = ("baichuan2", "glm4")
    config = Config.model_validate(
        {
            "workspace": str(place),
            "models": {
                name: {"path": str(MODELS / f"tiny-{name}"), "chat_format": name} for name in names
            },
            "finetune": {"lora": {"rank": RANK}},
            "serve": {
                "dtype": "float32",
                "max_model_len": 512,
                "gpus_per_replica": 0,
                "cpus_per_replica": 0.3,
                "engine": {"kv_cache_memory_bytes": 128 << 20},
            },
            "generate": {"max_new_tokens": 24, "concurrency": 16, "seeds": [1]},
        }
    )
    workspace = Workspace.open(config.workspace)
    bases = prepared_bases(config, workspace)
    for number, name in enumerate(names):
        random_adapter(bases[name], workspace.local("adapters", name), name, number)
        commit(workspace, f"adapters/{name}")
    workspace.write_table(sample_rounds(4, 6), "test_rounds")
    commit(workspace, "test_rounds")
    start_ray(num_cpus=2, include_dashboard=False)
    try:
        with running_models(app_args(config, workspace, bases)) as url:
            yield Served(url, config, workspace, bases)
    finally:
        ray.shutdown()


def commit(workspace: Workspace, artifact: str) -> None:
    workspace.commit(
        artifact, stage="test", settings={}, fingerprint={}, counts={}, started=time.time()
    )
