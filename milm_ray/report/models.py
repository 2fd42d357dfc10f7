"""The models' half of the page: published benchmarks, fine-tuning, Figure 3, and what they say."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow.parquet as pq

from milm_ray.config import Config
from milm_ray.report import breakdowns, paper
from milm_ray.report.blocks import (
    INTERVAL,
    Column,
    Estimate,
    Remark,
    Section,
    Table,
    absent,
    images,
)
from milm_ray.report.run import source_list
from milm_ray.workspace import Workspace

METRIC_NAMES = {
    "bleu_4": "BLEU-4",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
}
Manifests = Mapping[str, Mapping[str, Any]]


def benchmarks() -> Section:
    """Table 1: the published scores of the paper's base models, each with its source."""
    rows = [
        [row.scored_model, *(_published(row.scores[name]) for name in paper.BENCHMARKS), row.shots]
        for row in paper.TABLE_1
    ]
    feet = [f"{row.scored_model}: {row.source}. {row.note}" for row in paper.TABLE_1]
    table = Table(
        "table1_benchmarks",
        "Table 1. Published benchmark scores of the three base models, percent",
        [
            Column("Model"),
            *(Column(name, numeric=True) for name in paper.BENCHMARKS),
            Column("How measured", wrap=True),
        ],
        rows,
        feet,
    )
    blocks = [Remark(paper.TABLE_1_NOTE), table, *remarks("benchmarks")]
    return Section("benchmarks", "The base models", "", blocks)


def _published(score: float | None) -> str | None:
    """A score with the decimals that its source gives."""
    return None if score is None else f"{score:g}"


def remarks(section: str) -> list[Remark]:
    """The notes on the paper that belong to a section."""
    return [Remark(note.handling, note.finding) for note in paper.notes_for(section)]


def finetune(config: Config, ws: Workspace, found: Manifests) -> Section:
    """Settings, last losses and loss curves of the adapters."""
    places = [place for place in found if place.startswith("adapters/")]
    adapters = [place for place in places if place.count("/") == 1]
    if not adapters:
        return absent("finetune", "Fine-tuning", "adapters/", "finetune")
    rows = []
    for place in adapters:
        log = _training_log(ws, place)
        rows.append(
            [
                place.removeprefix("adapters/"),
                found[place].get("base"),
                found[place].get("name"),
                max(log["step"], default=None),
                max(log["epoch"], default=None),
                log["loss"][0] if log["loss"] else None,
                log["loss"][-1] if log["loss"] else None,
                _mean(log["tokens_per_s"]),
                found[place]["seconds"],
            ]
        )
    table = Table(
        "finetune",
        "Training of the three adapters",
        [
            Column("Model"),
            Column("Base"),
            Column("Adapter"),
            Column("Steps", numeric=True),
            Column("Epochs", digits=2, numeric=True),
            Column("First loss", digits=3, numeric=True),
            Column("Last loss", digits=3, numeric=True),
            Column("Tokens/s", digits=0, numeric=True),
            Column("Seconds", digits=1, numeric=True),
        ],
        rows,
        ["Losses are those logged first and last, per label token of the counselor's turns."],
    )
    curves = images(ws, "adapters", {"loss_curves": "Training loss of the three models"})
    return Section(
        "finetune",
        "Fine-tuning",
        "Low-rank adapters on the three base models, trained at the same time on the same "
        "dialogues, with loss on every counselor turn.",
        [
            *curves,
            table,
            _settings_table(found[adapters[0]]),
            *_preference_tuning(ws, {p: found[p] for p in places if p not in adapters}),
            *remarks("finetune"),
        ],
        source_list(found, "adapters", "adapters/"),
    )


def _preference_tuning(ws: Workspace, tuned: Manifests) -> list[Any]:
    """The adapters that were tuned further on preferences, with their curves; [] without any."""
    if not tuned:
        return []
    rows, curves = [], []
    for place, manifest in tuned.items():
        model, counts = place.split("/")[1], manifest["counts"]
        judges = ", ".join(manifest["judges"])
        figures = [counts[key] for key in ("pairs", "steps", "final_loss", "final_accuracy")]
        rows.append([model, manifest["name"], judges, *figures, manifest["seconds"]])
        curves += images(ws, place, {"loss": f"Preference tuning of {model}: loss and rewards"})
    table = Table(
        "preference_tuning",
        "Adapters tuned further by direct preference optimisation (DPO)",
        [
            Column("Model"),
            Column("Adapter"),
            Column("Judged by"),
            Column("Pairs", numeric=True),
            Column("Steps", numeric=True),
            Column("Last loss", digits=3, numeric=True),
            Column("Chosen reply ahead", digits=2, numeric=True),
            Column("Seconds", digits=1, numeric=True),
        ],
        rows,
        [
            "The pairs are a language model's automatic judgements, not people's. The share of "
            "pairs whose chosen reply is ahead is taken in training."
        ],
    )
    return [table, *curves]


def _settings_table(manifest: Mapping[str, Any]) -> Table:
    """The settings that an adapter was trained with, as its manifest has them."""
    tuned = manifest["settings"]["finetune"]
    flat = {**tuned, **{f"lora.{key}": value for key, value in tuned["lora"].items()}}
    rows = [
        [label, f"{flat[key]:g}" if isinstance(flat[key], float) else str(flat[key]), stated]
        for key, (label, stated) in paper.FINETUNE.items()
    ]
    return Table(
        "finetune_settings",
        "Settings of this run and of the paper",
        [Column("Setting"), Column("Here", numeric=True), Column("Paper", numeric=True)],
        rows,
        ["A dash: the paper does not state it."],
    )


def _training_log(ws: Workspace, place: str) -> dict[str, list[Any]]:
    """The training log of one adapter, by step; empty columns where none was written."""
    columns = ("step", "epoch", "loss", "tokens_per_s")
    files = [path for path in ws.parquet_files(place) if "log" in path.rsplit("/", 1)[-1]]
    if not files:
        return {name: [] for name in columns}
    table = pq.read_table(files, filesystem=ws.filesystem, columns=list(columns))
    return table.sort_by("step").to_pydict()


def model_label(config: Config, model: str) -> str:
    """A model of the configuration with the paper's model that it stands for."""
    known = config.models.get(model)
    checkpoint = "" if known is None else (known.hub_id or known.path or "").rstrip("/")
    name = checkpoint.rsplit("/", 1)[-1]
    return f"{model} ({name})" if name and name != model else model


def results(config: Config, ws: Workspace, found: Manifests) -> Section:
    """Figure 3 and its table: base against MI-LLM with intervals, the paper's BLEU-4 beside."""
    if "metrics" not in found:
        return absent("results", "Base against MI-LLM", "metrics/", "score")
    summary = json.loads(ws.read_text("metrics", "summary.json"))
    counts = found["metrics"]["counts"]
    samplings = {group["sampling"] for group in summary["groups"]}
    ordered = sorted(samplings, key=lambda name: (name != "greedy", name))
    tables = [_score_table(config, summary, sampling, counts) for sampling in ordered]
    tables += [_dpo_table(config, summary, sampling) for sampling in ordered]
    figure = images(ws, "metrics", {"figure3": "Figure 3. Base model against MI-LLM, per model"})
    return Section(
        "results",
        "Base against MI-LLM",
        "How like the reference reply is what each model writes, before and after fine-tuning.",
        [
            *figure,
            *(table for table in tables if table.rows),
            *breakdowns.tables(
                summary, name_order(config), lambda model: model_label(config, model)
            ),
            *remarks("results"),
        ],
        source_list(found, "metrics", "predictions", "test_rounds"),
    )


def gains(config: Config, ws: Workspace, found: Manifests) -> dict[str, Estimate]:
    """Each model's gain in BLEU-4 under greedy decoding, in points; {} when nothing is scored."""
    if "metrics" not in found:
        return {}
    summary = json.loads(ws.read_text("metrics", "summary.json"))
    rows = [
        d for d in summary["differences"] if (d["variant"], d["sampling"]) == ("adapter", "greedy")
    ]
    rows.sort(key=lambda row: name_order(config)(row["model"]))
    return {row["model"]: _estimate(row["scores"]["bleu_4"], "difference") for row in rows}


def _score_table(
    config: Config, summary: Mapping[str, Any], sampling: str, counts: Mapping[str, int]
) -> Table:
    """Figure 3's numbers for one decoding, the paper's beside them."""
    return Table(
        f"figure3_scores_{sampling}",
        f"Figure 3 as a table. Mean scores in percent with 95 % intervals, decoding: {sampling}",
        [*_gain_columns("base", "adapter"), Column("Paper, base → MI-LLM", numeric=True)],
        [
            [*row, _paper_bleu(config, model, metric)]
            for model, metric, row in _gain_rows(config, summary, sampling, "base", "adapter")
        ],
        [
            f"{counts['rounds']:,} rounds of {counts['dialogues']:,} dialogues. Intervals are "
            f"bootstrap percentiles over {summary['resamples']:,} resamples of whole dialogues, "
            "because the rounds of a dialogue are not independent. The gain is paired by round; p "
            "is two-sided, from flipping the sign of whole dialogues. A round without a reply is "
            "in neither.",
            "The paper's column is its Figure 3, of which only BLEU-4 was available to us. Its "
            "models have 7 to 9 billion parameters; its test rounds are other ones.",
        ],
        grouped=True,
    )


def _dpo_table(config: Config, summary: Mapping[str, Any], sampling: str) -> Table:
    """What preference tuning changed; without rows where no model was tuned so."""
    rows = _gain_rows(config, summary, sampling, "adapter", "dpo")
    return Table(
        f"dpo_scores_{sampling}",
        f"Preference tuning. Mean scores in percent with 95 % intervals, decoding: {sampling}",
        _gain_columns("adapter", "dpo"),
        [row for _, _, row in rows],
        [
            "DPO: the MI-LLM tuned further on a language model's preferences, compared with the "
            "MI-LLM it was tuned from, as above. The scores measure likeness to the teacher, which "
            "those preferences do not aim at."
        ],
        grouped=True,
    )


def _gain_columns(before: str, after: str) -> list[Column]:
    sides = (breakdowns.SIDES[before], breakdowns.SIDES[after], "Gain")
    return [
        Column("Model"),
        Column("Metric"),
        *(Column(side, digits=2, numeric=True, parts=INTERVAL) for side in sides),
        Column("p", digits=3, numeric=True, least=0.001),
    ]


def _gain_rows(
    config: Config, summary: Mapping[str, Any], sampling: str, before: str, after: str
) -> list[tuple[str, str, list[Any]]]:
    """Model, metric, and the cells of _gain_columns: of every model in Figure 3, else of those that
    have the later variant."""
    groups = {
        (g["model"], g["variant"]): g["scores"]
        for g in summary["groups"]
        if g["sampling"] == sampling
    }
    gained = {
        (d["model"], d["variant"]): d["scores"]
        for d in summary["differences"]
        if d["sampling"] == sampling
    }
    shown = {model for model, variant in groups if variant == after or before == "base"}
    found = []
    for model in sorted(shown, key=name_order(config)):
        for metric in summary["metrics"]:
            means = [
                _estimate(groups.get((model, side), {}).get(metric, {}), "mean")
                for side in (before, after)
            ]
            gain = gained.get((model, after), {}).get(metric, {})
            cells = [model_label(config, model), METRIC_NAMES.get(metric, metric), *means]
            found.append((model, metric, [*cells, _estimate(gain, "difference"), gain.get("p")]))
    return found


def _paper_bleu(config: Config, model: str, metric: str) -> str | None:
    known = config.models.get(model)
    of_paper = paper.BLEU_4.get(known.chat_format) if known else None
    if metric != "bleu_4" or of_paper is None:
        return None
    return "{:.2f} → {:.2f}".format(*of_paper)


def _estimate(row: Mapping[str, Any], name: str) -> Estimate:
    return Estimate(row.get(name), row.get("low"), row.get("high"))


def name_order(config: Config) -> Callable[[str], tuple[int, str]]:
    """A sort key for models: the order of the configuration, then those it does not know."""
    order = list(config.models)
    return lambda model: (order.index(model) if model in order else len(order), model)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
