"""The finetune stage: LoRA on every configured base model at once, each in its own Ray Train run.

train/ (schema.MI_DIALOGUES) -> adapters/<model>/, one adapter per model.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa

from milm_ray.config import Config, ModelSection
from milm_ray.errors import ConfigError, UserError
from milm_ray.finetune.admission import Admission, Demand
from milm_ray.finetune.card import model_card
from milm_ray.finetune.plots import loss_curves
from milm_ray.finetune.train import ADAPTER_DIR, Task
from milm_ray.job import Plan, Stage, finished
from milm_ray.models import checkpoint as checkpoints
from milm_ray.models import registry
from milm_ray.models.chat_format import TEMPLATE_FILE, template
from milm_ray.schema import TRAINING_LOG
from milm_ray.workspace import Workspace, digest

log = logging.getLogger("milm_ray")

INPUT = "train"
LOG_TABLE = "log.parquet"


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


def bases_directory(workspace: Workspace) -> Path:
    """Where prepared base checkpoints lie: in the workspace, or on each node if that is remote."""
    if "://" in workspace.uri:
        return Path.home() / ".cache" / "milm_ray" / "bases"
    return Path(workspace.path("bases"))


def _settings(config: Config, model: str) -> dict[str, Any]:
    """Everything an adapter depends on beside the training table."""
    section = config.models[model]
    source: dict[str, Any] = {"hub_id": section.hub_id, "revision": section.revision}
    if section.path and "://" not in section.path:
        text = template(section.chat_format)
        source = {"weights": checkpoints.fingerprint(Path(section.path), text)}
    elif section.path:
        source = {"path": section.path, "revision": section.revision}
    tuned = config.finetune.model_dump(mode="json")
    for name in ("max_failures", "logging_steps", "save_steps", "cpus_per_worker"):
        del tuned[name]
    return {
        "base": {**source, "chat_format": section.chat_format},
        "finetune": tuned,
        "seed": config.seed,
    }


def _fingerprint(config: Config, workspace: Workspace, model: str) -> dict[str, Any]:
    return workspace.fingerprint(_settings(config, model), workspace.input_digests(INPUT))


def _demand(config: Config) -> Demand:
    tuned = config.finetune
    workers = tuned.workers_per_model
    return Demand(workers * tuned.cpus_per_worker, workers * tuned.gpus_per_worker)


def plan(config: Config, workspace: Workspace) -> Plan:
    """What a fine-tune would do; writes nothing."""
    if not config.models:
        raise ConfigError(["models: name at least one base model to fine-tune"])
    tuned = config.finetune
    demand = _demand(config)
    resources = (
        f"{len(config.models)} models at once, each {tuned.workers_per_model} worker(s) with "
        f"{demand.text()} in all"
    )
    if not workspace.exists(INPUT, "manifest.json"):
        return Plan(resources=resources)
    done = [
        model
        for model in config.models
        if workspace.is_done(f"adapters/{model}", _fingerprint(config, workspace, model))
    ]
    rows = workspace.manifest(INPUT)["counts"].get("rows")
    notes = (f"done already: {', '.join(done)}",) if done else ()
    return Plan(rows=rows, resources=resources, done=len(done) == len(config.models), notes=notes)


def run(config: Config, workspace: Workspace) -> Mapping[str, Any]:
    """Fine-tune every model that has no current adapter; returns the manifest of adapters/."""
    started = time.time()
    fingerprints = {model: _fingerprint(config, workspace, model) for model in config.models}
    whole = workspace.fingerprint(fingerprints)
    if finished(workspace, "adapters", whole):
        return workspace.manifest("adapters")
    pending = [
        model
        for model, fingerprint in fingerprints.items()
        if not finished(workspace, f"adapters/{model}", fingerprint)
    ]
    if pending:
        _run_all(config, workspace, {model: fingerprints[model] for model in pending})
    logs = {model: _read_log(workspace, model) for model in config.models}
    workspace.write_bytes(loss_curves(logs, "Fine-tuning"), "adapters", "loss_curves.png")
    final = {model: round(rows[-1]["loss"], 4) for model, rows in logs.items()}
    return workspace.commit(
        "adapters",
        stage="finetune",
        settings=config.finetune,
        fingerprint=whole,
        counts={"models": len(config.models), "final_loss": final},
        started=started,
    )


def _read_log(workspace: Workspace, model: str) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    path = workspace.path("adapters", model, LOG_TABLE)
    return pq.read_table(path, filesystem=workspace.filesystem).to_pylist()


def _run_all(
    config: Config, workspace: Workspace, fingerprints: Mapping[str, Mapping[str, Any]]
) -> None:
    """Train the models, one thread each; all get their chance before an error is raised."""
    import ray

    capacity = ray.cluster_resources()
    demand = _demand(config)
    _check_capacity(capacity, demand)
    admission = Admission(capacity)

    def one(model: str) -> None:
        with admission.admitted(model, demand):
            _run_one(config, workspace, model, fingerprints[model])

    with ThreadPoolExecutor(max_workers=len(fingerprints)) as pool:
        futures = {model: pool.submit(one, model) for model in fingerprints}
    failures = {model: f.exception() for model, f in futures.items() if f.exception()}
    for model, error in failures.items():
        log.error("finetune %s | failed: %s", model, error)
    for error in failures.values():
        assert error is not None
        raise error


def _check_capacity(capacity: Mapping[str, float], demand: Demand) -> None:
    """One model alone must fit a local cluster; a remote one may still grow, and is only told."""
    have = Demand(capacity.get("CPU", 0.0), capacity.get("GPU", 0.0))
    if demand.cpus <= have.cpus and demand.gpus <= have.gpus:
        return
    cause = f"one model's workers take {demand.text()}, the cluster has {have.text()}"
    if not os.environ.get("RAY_ADDRESS"):
        raise UserError(
            cause,
            "lower finetune.workers_per_model, finetune.cpus_per_worker or "
            "finetune.gpus_per_worker, or use a larger cluster",
        )
    log.warning("finetune | %s: waits until nodes are added", cause)


def _run_one(
    config: Config, workspace: Workspace, model: str, fingerprint: Mapping[str, Any]
) -> None:
    """Train one model and commit adapters/<model>/."""
    from milm_ray.finetune.worker import Source, fit

    started = time.time()
    section = config.models[model]
    entry = base_entry(model, section)
    origin = section.hub_id or _absolute(section.path or "")
    identity = section.hub_id or Path(origin).name
    task = Task(
        model=model,
        base="",
        identity=identity,
        chat_format=section.chat_format,
        lora_targets=entry.lora_targets,
        settings=config.finetune,
        seed=config.seed,
    )
    source = Source(origin, section.revision, section.chat_format, str(bases_directory(workspace)))
    log.info("finetune %s | starts on %s, %s", model, _demand(config).text(), identity)
    outcome = fit(task, source, workspace.uri, INPUT, f"{model}-{digest(fingerprint)[:12]}")
    artifact = f"adapters/{model}"
    workspace.clear(artifact)
    with outcome.checkpoint.as_directory() as directory:
        for file in sorted((Path(directory) / ADAPTER_DIR).iterdir()):
            workspace.write_bytes(file.read_bytes(), artifact, file.name)
    workspace.write_text(template(section.chat_format), artifact, TEMPLATE_FILE)
    final_loss = outcome.log[-1]["loss"]
    card = model_card(entry, identity, config.finetune, outcome.counts, final_loss, config.seed)
    workspace.write_text(card, artifact, "README.md")
    workspace.write_table(pa.Table.from_pylist(outcome.log, TRAINING_LOG), artifact, LOG_TABLE)
    curve = loss_curves({model: outcome.log}, f"Fine-tuning {registry.adapter_name(entry)}")
    workspace.write_bytes(curve, artifact, "loss.png")
    workspace.commit(
        artifact,
        stage="finetune",
        settings=_settings(config, model),
        fingerprint=fingerprint,
        counts={**outcome.counts, "final_loss": round(final_loss, 4)},
        started=started,
        base=identity,
        chat_format=section.chat_format,
        name=registry.adapter_name(entry),
        licence=entry.licence,
    )
    log.info("finetune %s | done in %.1f s", model, time.time() - started)


def _absolute(path: str) -> str:
    """A path that holds in the workers, whose current directory is another."""
    return path if "://" in path else str(Path(path).resolve())


STAGE = Stage("finetune", plan, run, check_paths=("models",))
