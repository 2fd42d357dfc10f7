"""The score stage: predictions and test rounds → scores per round, their summary and Figure 3.

Artifact `metrics/`: scores.parquet (one row per prediction, see `score.SCORES`), summary.json
(means, intervals, paired differences, breakdowns), summary.csv (the same means, one line per
model, decoding and metric) and figure3.png.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from milm_ray.config import Config
from milm_ray.job import Plan, Stage, finished
from milm_ray.workspace import MANIFEST, Workspace

ARTIFACT = "metrics"
INPUTS = ("predictions", "test_rounds")


def _settings(config: Config) -> dict[str, Any]:
    return {**config.score.model_dump(mode="json"), "seed": config.seed}


def plan(config: Config, ws: Workspace) -> Plan:
    """Rows: predictions to score. Unknown until generate has run."""
    if not all(ws.exists(name, MANIFEST) for name in INPUTS):
        return Plan()
    made_from = ws.fingerprint(_settings(config), ws.input_digests(*INPUTS))
    rows = ws.manifest("predictions")["counts"].get("rows")
    return Plan(rows=rows, done=ws.is_done(ARTIFACT, made_from))


def run(config: Config, ws: Workspace) -> Mapping[str, Any]:
    """Score every prediction against its test round, and sum up. Returns the manifest."""
    made_from = ws.fingerprint(_settings(config), ws.input_digests(*INPUTS))
    if finished(ws, ARTIFACT, made_from):
        return ws.manifest(ARTIFACT)
    started = time.time()
    return record(config, ws, _score(ws), made_from, started)


def record(
    config: Config,
    ws: Workspace,
    scores: pa.Table,
    made_from: Mapping[str, Any],
    started: float,
) -> Mapping[str, Any]:
    """Write scores, summary and figure as the artifact `metrics/`. Returns the manifest."""
    from milm_ray.evaluation.figure3 import draw
    from milm_ray.evaluation.score import diversity, summarise

    summary = summarise(scores, resamples=config.score.bootstrap, seed=config.seed)
    summary["resamples"] = config.score.bootstrap
    summary["diversity"] = diversity(ws.read_table("predictions"))
    ws.clear(ARTIFACT)
    ws.write_table(scores, ARTIFACT, "scores.parquet")
    ws.write_text(json.dumps(summary, ensure_ascii=False, indent=1), ARTIFACT, "summary.json")
    ws.write_text(summary_csv(summary), ARTIFACT, "summary.csv")
    ws.write_bytes(draw(summary), ARTIFACT, "figure3.png")
    rounds = set(
        zip(scores["dialogue_id"].to_pylist(), scores["round_index"].to_pylist(), strict=True)
    )
    return ws.commit(
        ARTIFACT,
        stage="score",
        settings=_settings(config),
        fingerprint=made_from,
        counts={
            "rows": scores.num_rows,
            "rounds": len(rounds),
            "dialogues": len({dialogue for dialogue, _ in rounds}),
            "empty": sum(scores["empty"].to_pylist()),
            "truncated": scores["finish_reason"].to_pylist().count("length"),
        },
        started=started,
    )


def _score(ws: Workspace) -> pa.Table:
    """Scores of all predictions by Ray tasks, in the order of their keys."""
    import ray

    from milm_ray.evaluation.score import KEY, SCORES, score_predictions

    files = ws.parquet_files("predictions")
    predictions = ray.data.read_parquet(files, filesystem=ws.filesystem)
    scored = score_predictions(predictions, ws.read_table("test_rounds"))
    blocks = [block for block in ray.get(scored.to_arrow_refs()) if block.num_rows]
    table = pa.concat_tables([block.cast(SCORES) for block in blocks] or [SCORES.empty_table()])
    return table.sort_by([(name, "ascending") for name in KEY])


def summary_csv(summary: Mapping[str, Any]) -> str:
    """The means of a summary as CSV: one line per model, variant, sampling and metric."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(
        ["model", "variant", "sampling", "metric", "mean", "low", "high", "rounds", "dialogues"]
    )
    for group in summary["groups"]:
        for metric, score in group["scores"].items():
            named = [group[name] for name in ("model", "variant", "sampling")]
            bounds = ["" if score[key] is None else score[key] for key in ("mean", "low", "high")]
            writer.writerow([*named, metric, *bounds, group["rounds"], group["dialogues"]])
    return sink.getvalue()


STAGE = Stage("score", plan, run)
