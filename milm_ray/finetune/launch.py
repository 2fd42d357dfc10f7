"""The finetune stage: LoRA on every configured base model at once, each in its own Ray Train run.

train/ (schema.MI_DIALOGUES) -> adapters/<model>/, one adapter per model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from milm_ray.config import Config
from milm_ray.errors import ConfigError
from milm_ray.finetune import preference
from milm_ray.finetune.bases import base_entry, base_settings, source_of, task_of
from milm_ray.finetune.card import model_card
from milm_ray.finetune.cluster import demand_of, resources_text, run_all
from milm_ray.finetune.plots import loss_curves
from milm_ray.job import Plan, Stage, finished
from milm_ray.models import registry
from milm_ray.models.chat_format import FORMATS
from milm_ray.schema import TRAINING_LOG
from milm_ray.workspace import Workspace, digest

log = logging.getLogger("milm_ray")

INPUT = "train"
LOG_TABLE = "log.parquet"
# Settings that leave the adapter as it is, but for rounding: a run that did not fit goes on with
# smaller packs from where it was, and the models that are done stay so.
_NO_INFLUENCE = {
    *("method", "dpo", "max_failures", "cpus_per_worker", "gpus_per_worker"),
    *("logging_steps", "save_steps", "eval_steps", "pack_tokens", "gradient_checkpointing"),
}


def _settings(config: Config, model: str) -> dict[str, Any]:
    """Everything an adapter depends on beside the training table."""
    return {
        "base": base_settings(config.models[model]),
        "finetune": config.finetune.model_dump(mode="json", exclude=_NO_INFLUENCE),
        "seed": config.seed,
    }


def _fingerprint(config: Config, workspace: Workspace, model: str) -> dict[str, Any]:
    return workspace.fingerprint(_settings(config, model), workspace.input_digests(INPUT))


def plan(config: Config, workspace: Workspace) -> Plan:
    """What a fine-tune would do; writes nothing."""
    if not config.models:
        raise ConfigError(["models: name at least one base model to fine-tune"])
    if config.finetune.method == "dpo":
        return preference.plan(config, workspace)
    resources = resources_text(config)
    if not workspace.exists(INPUT, "manifest.json"):
        return Plan(resources=resources)
    done = [
        model
        for model in config.models
        if workspace.is_done(f"adapters/{model}", _fingerprint(config, workspace, model))
    ]
    rows = workspace.manifest(INPUT)["counts"].get("dialogues")
    notes = (f"done already: {', '.join(done)}",) if done else ()
    return Plan(rows=rows, resources=resources, done=len(done) == len(config.models), notes=notes)


def run(config: Config, workspace: Workspace) -> Mapping[str, Any]:
    """Fine-tune every model that has no current adapter; returns the manifest of adapters/.

    finetune.method: dpo goes on from these adapters instead (see `preference`).
    """
    if config.finetune.method == "dpo":
        return preference.run(config, workspace)
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

        def one(model: str) -> None:
            _run_one(config, workspace, model, fingerprints[model])

        run_all(pending, demand_of(config.finetune), one)
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


def _run_one(
    config: Config, workspace: Workspace, model: str, fingerprint: Mapping[str, Any]
) -> None:
    """Train one model and commit adapters/<model>/."""
    from milm_ray.finetune.worker import fit

    started = time.time()
    section = config.models[model]
    entry = base_entry(model, section)
    source = source_of(section, workspace)
    taken = demand_of(config.finetune).text()
    log.info("finetune %s | starts on %s, %s", model, taken, source.identity)
    task = task_of(config, model, source)
    outcome = fit(task, source, workspace.uri, INPUT, f"{model}-{digest(fingerprint)[:12]}")
    artifact = f"adapters/{model}"
    outcome.write_adapter(workspace, artifact, section.chat_format)
    last = outcome.log[-1]
    final = {"final_loss": round(last["loss"], 4)}
    if last["eval_loss"] is not None:
        final["final_eval_loss"] = round(last["eval_loss"], 4)
    counts = {**outcome.counts, **final}
    card = model_card(entry, source.identity, config.finetune, counts, config.seed)
    workspace.write_text(card, artifact, "README.md")
    workspace.write_table(pa.Table.from_pylist(outcome.log, TRAINING_LOG), artifact, LOG_TABLE)
    curve = loss_curves({model: outcome.log}, f"Fine-tuning {registry.adapter_name(entry)}")
    workspace.write_bytes(curve, artifact, "loss.png")
    workspace.commit(
        artifact,
        stage="finetune",
        settings=_settings(config, model),
        fingerprint=fingerprint,
        counts=counts,
        started=started,
        base=source.identity,
        chat_format=section.chat_format,
        name=registry.adapter_name(entry),
        licence=entry.licence,
    )
    log.info("finetune %s | done in %.1f s", model, time.time() - started)


STAGE = Stage("finetune", plan, run, check_paths=("models",), chat_formats=FORMATS)
