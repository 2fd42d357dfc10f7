"""The apps of a job's configuration: its prepared bases, its workspace's adapters, its chat."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from milm_ray.config import Config, ModelSection
from milm_ray.errors import ConfigError
from milm_ray.models.checkpoint import MARKER, bases_directory, prepare_base
from milm_ray.serving.chat.build import ChatArgs
from milm_ray.serving.models import AppArgs, Autoscaling, BaseSource, IngressArgs, ModelArgs
from milm_ray.workspace import Workspace

# What an engine on the CPU keeps of prompts and replies, unless `serve.engine` says otherwise.
_CPU_KV_CACHE_GIB = 0.5


def prepared_bases(config: Config, workspace: Workspace) -> dict[str, Path]:
    """Every configured base as a directory that engines load, prepared where it is not yet."""
    place = bases_directory(workspace)
    # The sources as a replica on another node is told them, so that both name a directory alike.
    sources = {name: _source(model) for name, model in config.models.items()}
    return {
        name: prepare_base(source.name_or_path, source.revision, place, source.chat_format)
        for name, source in sources.items()
    }


def base_digest(base: Path) -> str:
    """The fingerprint of a prepared base's weights and chat format."""
    return str(json.loads((base / MARKER).read_text(encoding="utf-8"))["fingerprint"])


def app_args(
    config: Config, workspace: Workspace, bases: Mapping[str, Path], keys: bool = False
) -> AppArgs:
    """Arguments of `models.build_app` for the configured models and the workspace's adapters.

    keys: ask for the configured API keys; a job's own endpoints need none, and answer this
    machine only.
    """
    serve = config.serve
    return AppArgs(
        models=[
            ModelArgs(
                name=name,
                path=str(base),
                source=_source(config.models[name]),
                max_model_len=serve.max_model_len,
                dtype=serve.dtype,
                num_gpus=serve.gpus_per_replica,
                num_cpus=serve.cpus_per_replica,
                max_lora_rank=config.finetune.lora.rank,
                kv_cache_gib=None if serve.gpus_per_replica else _CPU_KV_CACHE_GIB,
                autoscaling=Autoscaling(
                    min_replicas=serve.replicas,
                    max_replicas=serve.replicas,
                    target_ongoing_requests=config.generate.concurrency,
                ),
                engine=serve.engine,
                env=serve.env,
            )
            for name, base in bases.items()
        ],
        adapters_root=workspace.uri_of("adapters"),
        ingress=IngressArgs(
            max_tokens=serve.max_model_len,
            default_max_tokens=min(512, serve.max_model_len // 2),
            keys_file=_keys_file(config) if keys else None,
        ),
    )


def _source(model: ModelSection) -> BaseSource:
    """A model's origin, its path absolute: replicas have another directory."""
    origin = model.hub_id or model.path or ""
    if model.hub_id is None and "://" not in origin:
        origin = str(Path(origin).resolve())
    return BaseSource(name_or_path=origin, revision=model.revision, chat_format=model.chat_format)


def chat_args(config: Config, workspace: Workspace, models_url: str) -> ChatArgs:
    """Arguments of `chat.build.build_chat_app`: the models at `models_url`, unless configured."""
    settings = config.chat.model_dump()
    if "models_url" not in config.chat.model_fields_set:
        settings["models_url"] = models_url
    # A reply must leave room for what was said before it.
    settings["max_tokens"] = min(config.chat.max_tokens, config.serve.max_model_len // 4)
    return ChatArgs(
        **settings, keys_file=_keys_file(config), default_database=chat_database(workspace)
    )


def chat_database(workspace: Workspace) -> str | None:
    """The chat's SQLite file in a workspace on a file system; None in an object store."""
    return None if "://" in workspace.uri else workspace.path("chat", "sessions.sqlite3")


def check_access(config: Config) -> None:
    """Raise ConfigError where the endpoints would be open to others, or closed to the chat."""
    access, problems = config.access, []
    if access.keys_file is None:
        if access.host not in ("127.0.0.1", "::1", "localhost"):
            problems.append(
                f"access.host: {access.host} is reached by others, who need keys: make one with "
                "`python jobs/keys.py add NAME` and set access.keys_file=runs/keys.json"
            )
    elif not Path(access.keys_file).exists():
        problems.append(
            f"access.keys_file: no such file: {access.keys_file}; "
            "`python jobs/keys.py add NAME` makes it"
        )
    elif not os.environ.get(config.chat.models_key_env):
        problems.append(
            "access.keys_file: the chat needs a key to the models too: "
            f"export {config.chat.models_key_env}=$(python jobs/keys.py add chat --rpm 100000)"
        )
    if problems:
        raise ConfigError(problems)


def _keys_file(config: Config) -> str | None:
    keys_file = config.access.keys_file
    return str(Path(keys_file).absolute()) if keys_file is not None else None
