"""Which base a configured model is, where it comes from and is prepared, and its training task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milm_ray.config import Config, ModelSection
from milm_ray.errors import ConfigError
from milm_ray.finetune.train import Task
from milm_ray.models import checkpoint as checkpoints
from milm_ray.models import registry
from milm_ray.models.chat_format import template
from milm_ray.workspace import Workspace


@dataclass(frozen=True)
class Source:
    """Where a base checkpoint comes from and where it is prepared (models.checkpoint).

    identity: what an adapter says it belongs to, a hub id or a name, never a path.
    """

    name_or_path: str
    identity: str
    revision: str | None
    chat_format: str
    directory: str


def source_of(section: ModelSection, workspace: Workspace) -> Source:
    """The source of a configured model, its path absolute: workers have another directory."""
    origin = section.hub_id or section.path or ""
    if not section.hub_id and "://" not in origin:
        origin = str(Path(origin).resolve())
    identity = section.hub_id or Path(origin).name
    place = str(checkpoints.bases_directory(workspace))
    return Source(origin, identity, section.revision, section.chat_format, place)


def base_entry(model: str, section: ModelSection) -> registry.BaseModel:
    """The registry's entry for a configured model: by name, by hub id, else by chat format."""
    entries = registry.BASE_MODELS
    if model in entries:
        return entries[model]
    for matches in (
        lambda entry: section.hub_id is not None and entry.hub_id == section.hub_id,
        lambda entry: entry.chat_format == section.chat_format,
    ):
        for entry in entries.values():
            if matches(entry):
                return entry
    raise ConfigError([f"models.{model}: no base model in the registry has its chat format"])


def task_of(config: Config, model: str, source: Source, adapter: str = "") -> Task:
    """What the workers of a configured model are told; they put in where the base lies.

    adapter: the artifact that preference tuning goes on from.
    """
    return Task(
        model=model,
        base="",
        identity=source.identity,
        chat_format=source.chat_format,
        lora_targets=base_entry(model, config.models[model]).lora_targets,
        settings=config.finetune,
        seed=config.seed,
        adapter=adapter,
    )


def base_settings(section: ModelSection) -> dict[str, Any]:
    """What tells one base from another in a fingerprint."""
    source: dict[str, Any] = {"hub_id": section.hub_id, "revision": section.revision}
    if section.path and "://" not in section.path:
        text = template(section.chat_format)
        source = {"weights": checkpoints.fingerprint(Path(section.path), text)}
    elif section.path:
        source = {"path": section.path, "revision": section.revision}
    return {**source, "chat_format": section.chat_format}
