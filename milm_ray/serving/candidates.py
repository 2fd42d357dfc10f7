"""Several sampled replies of every adapter to each round of `preference_rounds/`.

Out: `candidates/` (schema.PREDICTIONS), rounds × models × preferences.seeds; rejects/candidates/.
A `candidates/` that another stage, or somebody, has committed is given: it stays as it is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from milm_ray.config import Config
from milm_ray.errors import ConfigError, UserError
from milm_ray.job import Plan, Stage, finished, log
from milm_ray.models.chat_format import FORMATS
from milm_ray.serving import batch
from milm_ray.serving.endpoints import app_args, prepared_bases
from milm_ray.serving.predict import MAX_REJECT_RATE, write
from milm_ray.serving.running import models_in_use
from milm_ray.workspace import MANIFEST, Workspace

ROUNDS = "preference_rounds"
ARTIFACT = "candidates"
REJECTED = "rejects/candidates"


def _inputs(config: Config) -> list[str]:
    return [ROUNDS, *(batch.adapter_of(model, "adapter")[0] for model in config.models)]


def _fingerprint(config: Config, workspace: Workspace) -> dict[str, Any]:
    return batch.made_from(config, workspace, _inputs(config), config.preferences.seeds)


def _given(workspace: Workspace) -> bool:
    """Whether `candidates/` holds replies from elsewhere."""
    return (
        workspace.exists(ARTIFACT, MANIFEST) and workspace.manifest(ARTIFACT)["stage"] != STAGE.name
    )


def plan(config: Config, workspace: Workspace) -> Plan:
    """How many replies will be sampled; writes nothing."""
    if _given(workspace):
        return Plan(done=True)
    if not config.models:
        raise ConfigError(["models: name at least one model to sample replies from"])
    seeds = config.preferences.seeds
    notes = (f"{len(seeds)} replies of each of {len(config.models)} adapters to every round",)
    if not all(workspace.exists(name, MANIFEST) for name in _inputs(config)):
        return Plan(notes=notes)
    done = workspace.is_done(ARTIFACT, _fingerprint(config, workspace))
    rows = batch.count(workspace, workspace.parquet_files(ROUNDS))
    return Plan(rows, notes=notes, done=done)


def run(config: Config, workspace: Workspace) -> Mapping[str, Any]:
    """Sample the replies through the endpoints; returns the manifest of `candidates/`."""
    if _given(workspace):
        log.info("candidates | candidates/ was not sampled here; its replies are taken as they are")
        return workspace.manifest(ARTIFACT)
    fingerprint = _fingerprint(config, workspace)
    if finished(workspace, ARTIFACT, fingerprint):
        return workspace.manifest(ARTIFACT)
    started = time.time()
    bases = prepared_bases(config, workspace)
    args = app_args(config, workspace, bases)
    log.info("candidates | starts %d engines; this takes a while", len(args.models))
    with models_in_use(args) as base_url:
        wanted = batch.sampled_runs(config, workspace, bases, config.preferences.seeds)
        files = workspace.parquet_files(ROUNDS)
        outcomes = batch.predict(config, workspace, wanted, base_url, files)
        tally = write(workspace, outcomes, ARTIFACT, REJECTED)
    if tally.rejected > MAX_REJECT_RATE * tally.rows:
        raise UserError(
            f"{tally.rejected} of {tally.rows} replies did not come ({dict(tally.reasons)})",
            f"see {REJECTED}/ for the reasons; run the same command again to ask for them anew",
        )
    return workspace.commit(
        ARTIFACT,
        stage=STAGE.name,
        settings=config.preferences,
        fingerprint=fingerprint,
        counts=tally.counts(),
        started=started,
        runs=tally.by_run(),
    )


STAGE = Stage("candidates", plan, run, check_paths=("models",), chat_formats=FORMATS)
