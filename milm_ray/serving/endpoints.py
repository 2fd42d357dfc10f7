"""The model endpoints of a job's configuration: its prepared bases and its workspace's adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from milm_ray.config import Config
from milm_ray.models.checkpoint import MARKER, bases_directory, prepare_base
from milm_ray.serving.models import AppArgs, Autoscaling, IngressArgs, ModelArgs
from milm_ray.workspace import Workspace

# What an engine on the CPU keeps of prompts and replies, unless `serve.engine` says otherwise.
_CPU_KV_CACHE_GIB = 0.5


def prepared_bases(config: Config, workspace: Workspace) -> dict[str, Path]:
    """Every configured base as a directory that engines load, prepared where it is not yet."""
    place = bases_directory(workspace)
    return {
        name: prepare_base(
            model.hub_id or model.path or "", model.revision, place, model.chat_format
        )
        for name, model in config.models.items()
    }


def base_digest(base: Path) -> str:
    """The fingerprint of a prepared base's weights and chat format."""
    return str(json.loads((base / MARKER).read_text(encoding="utf-8"))["fingerprint"])


def app_args(config: Config, workspace: Workspace, bases: Mapping[str, Path]) -> AppArgs:
    """Arguments of `models.build_app` for the configured models and the workspace's adapters."""
    serve = config.serve
    return AppArgs(
        models=[
            ModelArgs(
                name=name,
                path=str(base),
                max_model_len=serve.max_model_len,
                dtype=serve.dtype,
                num_gpus=serve.gpus_per_replica,
                num_cpus=serve.cpus_per_replica,
                max_lora_rank=config.finetune.lora.rank,
                kv_cache_gib=None if serve.gpus_per_replica else _CPU_KV_CACHE_GIB,
                autoscaling=Autoscaling(target_ongoing_requests=config.generate.concurrency),
                engine=serve.engine,
                env=serve.env,
            )
            for name, base in bases.items()
        ],
        adapters_root=f"{workspace.uri}/adapters",
        ingress=IngressArgs(
            max_tokens=serve.max_model_len,
            default_max_tokens=min(512, serve.max_model_len // 2),
        ),
    )
