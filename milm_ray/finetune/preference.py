"""Preference tuning, the paper's second proposal for future work: `finetune.method: dpo`.

preferences/ (schema.PREFERENCES) and adapters/<model>/ -> adapters/<model>/dpo/, served as
<model>:dpo. The fine-tuned adapters stay as they are.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from milm_ray.config import Config
from milm_ray.errors import UserError
from milm_ray.finetune.bases import base_entry, base_settings, source_of, task_of
from milm_ray.finetune.card import preference_card
from milm_ray.finetune.cluster import demand_of, resources_text, run_all
from milm_ray.finetune.plots import preference_curves
from milm_ray.job import Plan, finished
from milm_ray.models import registry
from milm_ray.schema import PREFERENCE_LOG
from milm_ray.workspace import Workspace, digest

log = logging.getLogger("milm_ray")

INPUT = "preferences"
# "log" in its name would make it part of the fine-tuning's log.
LOG_TABLE = "rewards.parquet"
_INFLUENCE = {
    *("dpo", "schedule", "warmup_ratio", "batch_size", "gradient_accumulation", "precision"),
    *("cutoff", "max_grad_norm", "weight_decay", "workers_per_model", "zero_stage"),
}


def artifact_of(model: str) -> str:
    """Where the preference-tuned adapter of a model lies."""
    return f"adapters/{model}/dpo"


def _settings(config: Config, model: str) -> dict[str, Any]:
    return {
        "base": base_settings(config.models[model]),
        "finetune": config.finetune.model_dump(mode="json", include=_INFLUENCE),
        "seed": config.seed,
    }


def _fingerprint(config: Config, workspace: Workspace, model: str) -> dict[str, Any]:
    inputs = workspace.input_digests(INPUT, f"adapters/{model}")
    return workspace.fingerprint(_settings(config, model), inputs)


def plan(config: Config, workspace: Workspace) -> Plan:
    """What preference tuning would do; writes nothing."""
    resources = resources_text(config)
    wanted = (INPUT, *(f"adapters/{model}" for model in config.models))
    if not all(workspace.exists(artifact, "manifest.json") for artifact in wanted):
        return Plan(resources=resources)
    done = [
        model
        for model in config.models
        if workspace.is_done(artifact_of(model), _fingerprint(config, workspace, model))
    ]
    rows = workspace.manifest(INPUT)["counts"].get("pairs")
    notes = (f"done already: {', '.join(done)}",) if done else ()
    return Plan(rows=rows, resources=resources, done=len(done) == len(config.models), notes=notes)


def run(config: Config, workspace: Workspace) -> Mapping[str, Any]:
    """Tune every model's adapter that has pairs; returns the manifest of the last one."""
    fingerprints = {model: _fingerprint(config, workspace, model) for model in config.models}
    pairs = Counter(workspace.read_table(INPUT, ["model"]).column("model").to_pylist())
    without = [model for model in config.models if not pairs[model]]
    if without:
        raise UserError(
            f"preferences/ holds no pair of {', '.join(without)}",
            "run jobs/preferences.py for these models, or leave them out of models",
        )
    pending = [
        model
        for model, fingerprint in fingerprints.items()
        if not finished(workspace, artifact_of(model), fingerprint)
    ]
    if pending:

        def one(model: str) -> None:
            _run_one(config, workspace, model, fingerprints[model])

        run_all(pending, demand_of(config.finetune), one)
    return workspace.manifest(artifact_of(list(config.models)[-1]))


def _run_one(
    config: Config, workspace: Workspace, model: str, fingerprint: Mapping[str, Any]
) -> None:
    """Tune one model's adapter and commit it."""
    from milm_ray.finetune.worker import fit

    started = time.time()
    section = config.models[model]
    entry = base_entry(model, section)
    source = source_of(section, workspace)
    task = task_of(config, model, source, adapter=f"adapters/{model}")
    log.info("finetune %s | preference tuning of adapters/%s/", model, model)
    outcome = fit(task, source, workspace.uri, INPUT, f"{model}-dpo-{digest(fingerprint)[:12]}")
    artifact = artifact_of(model)
    outcome.write_adapter(workspace, artifact, section.chat_format)
    last = outcome.log[-1]
    figures = {name: round(last[name], 4) for name in ("loss", "accuracy")}
    counts = {**outcome.counts, **{f"final_{name}": value for name, value in figures.items()}}
    judges = sorted(set(workspace.read_table(INPUT, ["judge"]).column("judge").to_pylist()))
    name = registry.adapter_name(entry, "mi-dpo")
    card = preference_card(entry, source.identity, config.finetune, counts, judges)
    workspace.write_text(card, artifact, "README.md")
    workspace.write_table(pa.Table.from_pylist(outcome.log, PREFERENCE_LOG), artifact, LOG_TABLE)
    curves = preference_curves(outcome.log, f"Preference tuning {name}")
    workspace.write_bytes(curves, artifact, "loss.png")
    workspace.commit(
        artifact,
        stage="finetune",
        settings=_settings(config, model),
        fingerprint=fingerprint,
        counts=counts,
        started=started,
        base=source.identity,
        chat_format=section.chat_format,
        name=name,
        licence=entry.licence,
        judges=judges,
        note="Preferences are the automatic judgements of the judges named, not of people.",
    )
    log.info("finetune %s | done in %.1f s", model, time.time() - started)
