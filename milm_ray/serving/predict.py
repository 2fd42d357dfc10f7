"""Generate: every variant's reply to every test round, asked of the Serve endpoints.

In: `test_rounds/`, `adapters/<model>/`. Out: `predictions/`, rounds × models × {base, adapter, and
dpo where preference tuning has made one} × {greedy, each seed}, one row each; `rejects/generate/`
for rounds that got no reply.

A run that was killed asks only for the replies it had not received (see `batch`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from milm_ray.config import Config
from milm_ray.errors import ConfigError, UserError
from milm_ray.job import Plan, Stage, finished, log
from milm_ray.models.chat_format import FORMATS
from milm_ray.schema import PREDICTIONS, REJECTS, Reject, Variant
from milm_ray.serving import batch
from milm_ray.serving.endpoints import app_args, prepared_bases
from milm_ray.serving.running import kept_models, models_in_use
from milm_ray.workspace import MANIFEST, Workspace

ARTIFACT = "predictions"
REJECTED = "rejects/generate"
ROUNDS = batch.ROUNDS
# A round without a reply is a hole in the scores; more than this share of them is a failed stage.
MAX_REJECT_RATE = 0.01

_ROWS_PER_FILE = 4096


def _replying(config: Config, workspace: Workspace) -> dict[str, list[Variant]]:
    return {model: batch.variants_of(config, workspace, model) for model in config.models}


def _inputs(config: Config, workspace: Workspace) -> list[str]:
    return [
        ROUNDS,
        *(
            batch.adapter_of(model, variant)[0]
            for model, variants in _replying(config, workspace).items()
            for variant in variants
            if variant != "base"
        ),
    ]


def _fingerprint(config: Config, workspace: Workspace) -> dict[str, Any]:
    inputs, seeds = _inputs(config, workspace), config.generate.seeds
    variants = _replying(config, workspace)
    return batch.made_from(config, workspace, inputs, seeds, variants=variants)


def plan(config: Config, workspace: Workspace) -> Plan:
    """What generation would take; writes nothing."""
    if not config.models:
        raise ConfigError(["models: name at least one model to generate with"])
    if config.generate.max_new_tokens >= config.serve.max_model_len:
        raise ConfigError(["generate.max_new_tokens: leaves no room in serve.max_model_len"])
    serve = config.serve
    device = f"{serve.gpus_per_replica:g} GPU" if serve.gpus_per_replica else "no GPU"
    resources = (
        f"{serve.replicas * len(config.models)} engines with {serve.cpus_per_replica:g} CPU "
        f"and {device} each"
    )
    replying = _replying(config, workspace)
    if not any(replying.values()):
        raise ConfigError(
            [
                "generate.variants: no model has a dpo adapter yet; jobs/finetune.py with "
                "finetune.method=dpo makes it"
            ]
        )
    passes = sum(map(len, replying.values())) * (1 + len(config.generate.seeds))
    seeds = f" and seeds {config.generate.seeds}" if config.generate.seeds else ""
    named = ", ".join(f"{model} ({', '.join(who)})" for model, who in replying.items() if who)
    notes = (f"{passes} runs: {named}; greedy{seeds}",)
    if not all(workspace.exists(name, MANIFEST) for name in _inputs(config, workspace)):
        return Plan(resources=resources, notes=notes)
    if workspace.is_done(ARTIFACT, _fingerprint(config, workspace)):
        return Plan(done=True)
    rounds = batch.count(workspace, workspace.parquet_files(ROUNDS))
    return Plan(rounds, resources=resources, notes=notes)


def run(config: Config, workspace: Workspace) -> Mapping[str, Any]:
    """Predict every test round with every run; returns the manifest of `predictions/`.

    Raises UserError, after everything is written, when too many rounds got no reply.
    """
    fingerprint = _fingerprint(config, workspace)
    if finished(workspace, ARTIFACT, fingerprint):
        return workspace.manifest(ARTIFACT)
    started = time.time()
    bases = prepared_bases(config, workspace)
    wanted = batch.runs(config, workspace, bases)
    args = app_args(config, workspace, bases)
    log.info("generate | starts %d engines; this takes a while", len(args.models))
    with models_in_use(args) as base_url:
        serving_s = round(time.time() - started, 1)
        log.info("generate | endpoints at %s after %.0f s", base_url, serving_s)
        tally = write(workspace, batch.predict(config, workspace, wanted, base_url))
    settings = {"generate": config.generate.model_dump(), "serve": config.serve.model_dump()}
    if tally.rejected > MAX_REJECT_RATE * tally.rows:
        raise UserError(
            f"{tally.rejected} of {tally.rows} rounds got no reply ({dict(tally.reasons)})",
            f"see {REJECTED}/ for the reasons; run the same command again to ask for them anew",
        )
    return workspace.commit(
        ARTIFACT,
        stage="generate",
        settings=settings,
        fingerprint=fingerprint,
        counts=tally.counts(),
        started=started,
        runs=tally.by_run(),
        start_up_s=serving_s,
    )


class Tally:
    """What is counted while predictions go by."""

    def __init__(self) -> None:
        self.rows = 0
        self.rejected = 0
        self.reasons: Counter[str] = Counter()
        self._totals: dict[str, Counter[str]] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows += 1
        if row["failure"]:
            self.rejected += 1
            self.reasons[row["failure"]] += 1
            return
        run = f"{row['model']}/{row['variant']}/{row['sampling']}"
        self._totals.setdefault(run, Counter()).update(
            predictions=1,
            empty=int(not row["text"].strip()),
            cut_at_max_new_tokens=int(row["finish_reason"] == "length"),
            prompts_shortened=int(row["dropped_rounds"] > 0),
            dropped_rounds=row["dropped_rounds"],
            prompt_tokens=row["prompt_tokens"] or 0,
            completion_tokens=row["completion_tokens"] or 0,
        )

    def by_run(self) -> dict[str, dict[str, int]]:
        return {run: dict(counts) for run, counts in sorted(self._totals.items())}

    def counts(self) -> dict[str, Any]:
        whole: Counter[str] = sum(self._totals.values(), Counter())
        named = ("empty", "cut_at_max_new_tokens", "prompts_shortened", "dropped_rounds")
        return {
            "rows": self.rows - self.rejected,
            "rejected": self.rejected,
            "rejected_by_reason": dict(self.reasons),
            **{name: whole[name] for name in named},
            "prompt_tokens": whole["prompt_tokens"],
            "completion_tokens": whole["completion_tokens"],
        }


def write(
    workspace: Workspace,
    outcomes: Iterator[pa.Table],
    artifact: str = ARTIFACT,
    rejected: str = REJECTED,
) -> Tally:
    """Write predictions and rejects as they come; memory holds one file's rows at most."""
    workspace.clear(artifact)
    workspace.clear(rejected)
    tally, files, waiting = Tally(), 0, []
    for table in outcomes:
        rows = table.to_pylist()
        for row in rows:
            tally.add(row)
        waiting += [row for row in rows if not row["failure"]]
        stage = rejected.rsplit("/", 1)[-1]
        lost = [_reject(row, stage).row() for row in rows if row["failure"]]
        if lost:
            part = f"part-{tally.rows:08d}.parquet"
            workspace.write_table(pa.Table.from_pylist(lost, REJECTS), rejected, part)
        if len(waiting) >= _ROWS_PER_FILE:
            files = _flush(workspace, artifact, waiting, files)
            waiting = []
    _flush(workspace, artifact, waiting, files)
    return tally


def _flush(workspace: Workspace, artifact: str, rows: list[dict[str, Any]], number: int) -> int:
    table = pa.Table.from_pylist(rows, PREDICTIONS)
    workspace.write_table(table, artifact, f"part-{number:05d}.parquet")
    return number + 1


def _reject(row: Mapping[str, Any], stage: str) -> Reject:
    return Reject(
        stage=stage,
        reason=row["failure"],
        source_id=f"{row['model']}/{row['variant']}/{row['sampling']}, round {row['round_index']}",
        dialogue_id=row["dialogue_id"],
        detail=row["detail"],
    )


STAGE = Stage(
    "generate", plan, run, check_paths=("models",), chat_formats=FORMATS, around=kept_models
)
