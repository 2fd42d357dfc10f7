"""Predictions beside the rounds they answer: per-round scores, and what they come to.

Scores are kept per round, so that anything said of them later (a mean, a topic, a paired test)
can be traced and recomputed. The reference is the transcription's counsellor turn, written by the
teacher: a score measures likeness to the teacher and not counselling quality.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from milm_ray.errors import UserError
from milm_ray.evaluation.intervals import bootstrap_mean, paired_difference
from milm_ray.evaluation.overlap import METRICS, chrf_pairs, score_pairs

if TYPE_CHECKING:
    import pandas as pd
    import ray.data

Groups = dict[tuple[str, ...], "pd.DataFrame"]
Rounds = Mapping[tuple[str, int], tuple[str, str]]  # (dialogue_id, round_index) -> output, topic
Predictions = TypeVar("Predictions", pa.Table, "ray.data.Dataset")

KEY = ("dialogue_id", "round_index", "model", "variant", "sampling")
GROUP = ("model", "variant", "sampling")
# What a variant is compared with: what it was tuned from.
_AGAINST = {"adapter": "base", "dpo": "adapter"}
ALL_METRICS = (*METRICS, "chrf")
SCORES = pa.schema(
    [
        pa.field("dialogue_id", pa.string()),
        pa.field("round_index", pa.int64()),
        pa.field("model", pa.string()),
        pa.field("variant", pa.string()),
        pa.field("sampling", pa.string()),
        pa.field("topic", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("empty", pa.bool_()),
        pa.field("reference_chars", pa.int64()),
        pa.field("prediction_chars", pa.int64()),
        *[pa.field(metric, pa.float64()) for metric in ALL_METRICS],
    ]
)


def score_predictions(
    predictions: Predictions, rounds: pa.Table, *, batch_size: int = 4096
) -> Predictions:
    """Per-round scores of predictions (1:1).

    predictions: rows of schema.PREDICTIONS, as an Arrow table (scored here) or a Ray dataset
    (scored by its tasks, a batch at a time). rounds: rows of schema.ROUNDS, small enough for one
    process. Returns rows of SCORES, in the same kind of table: percentages, the five columns of
    KEY, and whether the prediction was empty (blank or null; it scores 0 and stays in).
    Raises UserError when a prediction answers a round that is not among `rounds`.
    """
    references = references_of(rounds)
    if isinstance(predictions, pa.Table):
        return score_batch(predictions, references)

    import ray

    shared = ray.put(references)
    return predictions.map_batches(
        _score_shared,  # type: ignore[arg-type]  # Ray's type leaves out the further arguments
        batch_size=batch_size,
        batch_format="pyarrow",
        fn_args=(shared,),
    )


def references_of(rounds: pa.Table) -> Rounds:
    """The reference and topic of each round. Raises UserError when a round is there twice."""
    columns = [rounds[name].to_pylist() for name in ("dialogue_id", "round_index", "output")]
    topics = rounds["topic"].to_pylist() if "topic" in rounds.column_names else None
    found: dict[tuple[str, int], tuple[str, str]] = {}
    for i, (dialogue, index, output) in enumerate(zip(*columns, strict=True)):
        if (dialogue, index) in found:
            raise UserError(
                f"round {index} of dialogue {dialogue} is among the test rounds twice",
                "make the test rounds again (jobs/split.py)",
            )
        found[dialogue, index] = (output, (topics[i] or "") if topics else "")
    return found


def _score_shared(batch: pa.Table, references: Any) -> pa.Table:
    import ray

    if isinstance(references, ray.ObjectRef):
        references = ray.get(references)
    return score_batch(batch, references)


def score_batch(batch: pa.Table, references: Rounds) -> pa.Table:
    """Scores of one table of predictions, in its row order."""
    rows = {name: batch[name].to_pylist() for name in (*KEY, "finish_reason", "text")}
    keys = list(zip(rows["dialogue_id"], rows["round_index"], strict=True))
    missing = sorted({key for key in keys if key not in references})
    if missing:
        raise UserError(
            f"{len(missing)} predicted rounds are not among the test rounds, the first being "
            f"round {missing[0][1]} of dialogue {missing[0][0]}",
            "the predictions belong to another split: run jobs/generate.py again",
        )
    refs = [references[key][0] for key in keys]
    texts = [text or "" for text in rows["text"]]
    return pa.table(
        {
            **{name: rows[name] for name in KEY},
            "topic": [references[key][1] for key in keys],
            "finish_reason": rows["finish_reason"],
            "empty": [not text.strip() for text in texts],
            "reference_chars": [len(text) for text in refs],
            "prediction_chars": [len(text) for text in texts],
            **score_pairs(refs, texts),
            "chrf": chrf_pairs(refs, texts),
        },
        schema=SCORES,
    )


def distinct_n(texts: Iterable[str], n: int) -> float | None:
    """Different word n-grams over all word n-grams of the texts together (Li et al. 2016).

    A fraction; low for a model that says the same thing to everyone. It falls with the amount of
    text, so compare models on the same rounds only. None when there is no n-gram.
    """
    from milm_ray.evaluation.lexicon import segment

    seen: set[tuple[str, ...]] = set()
    total = 0
    for tokens in segment(list(texts)):
        words = [token for token in tokens if not token.isspace()]
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else None


def diversity(predictions: pa.Table) -> list[dict[str, Any]]:
    """distinct-1 and distinct-2 of each model, variant and sampling."""
    texts: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in predictions.select(["model", "variant", "sampling", "text"]).to_pylist():
        texts[row["model"], row["variant"], row["sampling"]].append(row["text"] or "")
    return [
        {
            "model": model,
            "variant": variant,
            "sampling": sampling,
            "distinct_1": distinct_n(group, 1),
            "distinct_2": distinct_n(group, 2),
        }
        for (model, variant, sampling), group in sorted(texts.items())
    ]


def summarise(scores: pa.Table, *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """What the scores come to, as plain JSON-able data.

    * groups: per model, variant and sampling the number of rounds, dialogues, empty and truncated
      predictions, and per metric {mean, low, high} with a 95 % interval by dialogue;
    * differences: per model and sampling, `variant` adapter against base, dpo against the adapter
      it was tuned from, on the rounds that both answered: per metric both means by the variants'
      names and {difference, low, high, p}, see `intervals.paired_difference`;
    * by_round, by_topic: means and numbers of rounds in each.

    Where a model was sampled with several seeds, sampling "sampled" pools them: a round's score
    is its mean over the seeds, rounds that a seed lacks are left out, and `seeds` and `seed_sd`
    give the number of seeds and the standard deviation of their means.
    Raises UserError when there is no score or a prediction was scored twice.
    """
    if not scores.num_rows:
        raise UserError("there are no scores to summarise", "run jobs/generate.py first")
    table = scores.to_pandas()
    twice = table[table.duplicated(list(KEY))]
    if len(twice):
        named = ", ".join(f"{name} {twice.iloc[0][name]}" for name in KEY)
        raise UserError(
            f"{len(twice)} predictions were scored more than once, the first being {named}",
            "remove the double rows, or run jobs/generate.py again",
        )
    groups: Groups = dict(iter(table.groupby(list(GROUP))))
    pooled, seeds = _pool_seeds(table)
    groups.update(pooled)
    options = {"resamples": resamples, "seed": seed}
    return {
        "metrics": list(ALL_METRICS),
        "groups": [
            {**_group(key, groups[key], options), **seeds.get(key, {})} for key in sorted(groups)
        ],
        "differences": _differences(groups, options),
        "by_round": _breakdown(groups, "round_index"),
        "by_topic": _breakdown(groups, "topic"),
    }


def _pool_seeds(table: pd.DataFrame) -> tuple[Groups, dict[tuple[str, ...], dict[str, Any]]]:
    """Each model's and variant's rounds averaged over its seeds, and how the seeds differ."""
    pooled: Groups = {}
    facts: dict[tuple[str, ...], dict[str, Any]] = {}
    seeded = table[table["sampling"].str.startswith("seed-")]
    for (model, variant), group in seeded.groupby(["model", "variant"]):
        seeds = group["sampling"].nunique()
        if seeds < 2:
            continue
        rounds = group.groupby(["dialogue_id", "round_index", "topic"], as_index=False).agg(
            {"empty": "any", **dict.fromkeys(ALL_METRICS, "mean")},
        )
        answered = group.groupby(["dialogue_id", "round_index", "topic"]).size()
        rounds["finish_reason"] = ""
        key = (model, variant, "sampled")
        pooled[key] = rounds[answered.to_numpy() == seeds]
        means = group.groupby("sampling")[list(ALL_METRICS)].mean()
        facts[key] = {"seeds": seeds, "seed_sd": means.std(ddof=1).to_dict()}
    return pooled, facts


def _group(key: tuple[str, ...], group: pd.DataFrame, options: dict[str, int]) -> dict[str, Any]:
    intervals = {
        metric: bootstrap_mean(group[metric], group["dialogue_id"].to_numpy(), **options)
        for metric in ALL_METRICS
    }
    return {
        **dict(zip(GROUP, key, strict=True)),
        "rounds": len(group),
        "dialogues": int(group["dialogue_id"].nunique()),
        "empty": int(group["empty"].sum()),
        "truncated": int((group["finish_reason"] == "length").sum()),
        "scores": {
            metric: {"mean": found.mean, "low": found.low, "high": found.high}
            for metric, found in intervals.items()
        },
    }


def _differences(groups: Groups, options: dict[str, int]) -> list[dict[str, Any]]:
    result = []
    for model, variant, sampling in sorted(groups):
        before = _AGAINST.get(variant)
        if before is None or (model, before, sampling) not in groups:
            continue
        pairs = groups[model, before, sampling].merge(
            groups[model, variant, sampling],
            on=["dialogue_id", "round_index"],
            suffixes=("_before", "_after"),
        )
        if pairs.empty:
            continue
        entry: dict[str, Any] = {
            "model": model,
            "variant": variant,
            "sampling": sampling,
            "rounds": len(pairs),
            "dialogues": int(pairs["dialogue_id"].nunique()),
            "scores": {},
        }
        for metric in ALL_METRICS:
            paired = paired_difference(
                pairs[f"{metric}_before"],
                pairs[f"{metric}_after"],
                pairs["dialogue_id"].to_numpy(),
                **options,
            )
            entry["scores"][metric] = {
                before: paired.first,
                variant: paired.second,
                "difference": paired.difference.mean,
                "low": paired.difference.low,
                "high": paired.difference.high,
                "p": paired.p,
            }
        result.append(entry)
    return result


def _breakdown(groups: Groups, column: str) -> list[dict[str, Any]]:
    result = []
    for key in sorted(groups):
        parts = groups[key].groupby(column)
        means = parts[list(ALL_METRICS)].mean().assign(rounds=parts.size())
        for row in means.reset_index().to_dict("records"):
            result.append({**dict(zip(GROUP, key, strict=True)), **row})
    return result
