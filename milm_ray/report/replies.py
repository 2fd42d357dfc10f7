"""What the models say: replies counted, and a few of them beside their references."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pyarrow.compute as pc

from milm_ray.config import Config
from milm_ray.report.blocks import Column, Example, Remark, Reply, Section, Table, absent
from milm_ray.report.breakdowns import SIDES, sides_of
from milm_ray.report.models import Manifests, model_label, name_order
from milm_ray.report.run import source_list
from milm_ray.workspace import Workspace

_EXAMPLES = 3
_TINY = (
    "The tiny base models have a few million parameters and are made to try the pipeline. What "
    "they write is not counselling; only the difference that the tuning makes is of interest."
)


def examples(config: Config, ws: Workspace, found: Manifests) -> Section:
    """A few test rounds with the reference and every model's greedy replies."""
    if not {"predictions", "test_rounds"} <= found.keys():
        return absent("examples", "What they say", "predictions/", "generate")
    predictions = ws.read_table(
        "predictions", ["dialogue_id", "round_index", "model", "variant", "sampling", "text"]
    )
    samplings = predictions["sampling"].unique().to_pylist()
    sampling = "greedy" if "greedy" in samplings else sorted(samplings)[0]
    predictions = predictions.filter(pc.field("sampling") == sampling)
    scores = _scores(ws, found, sampling)
    said: dict[tuple[str, int], dict[tuple[str, str], str]] = defaultdict(dict)
    for row in predictions.to_pylist():
        said[row["dialogue_id"], row["round_index"]][row["model"], row["variant"]] = row["text"]

    blocks: list[Any] = [_replies_table(ws, found)]
    if any(str(m.get("base", "")).startswith("tiny-") for m in found.values()):
        blocks.insert(0, Remark(_TINY))
    for row in _spread(ws, set(said)):
        key = (row["dialogue_id"], row["round_index"])
        replies = [
            (
                model_label(config, model),
                [
                    Reply(
                        SIDES[side],
                        said[key].get((model, side), ""),
                        scores.get((*key, model, side), ""),
                    )
                    for side in sides_of(v for m, v in said[key] if m == model)
                ],
            )
            for model in sorted({model for model, _ in said[key]}, key=name_order(config))
        ]
        topic = f" · {row['topic']}" if row["topic"] else ""
        blocks.append(
            Example(
                f"Dialogue {row['dialogue_id'][:8]}, round {row['round_index']}{topic}",
                row["input"],
                row["output"],
                replies,
            )
        )
    return Section(
        "examples",
        "What they say",
        "Rounds taken at even distances through the test set, not chosen for how they read.",
        blocks,
        source_list(found, "predictions", "test_rounds"),
    )


def _replies_table(ws: Workspace, found: Manifests) -> Table:
    """How many replies each run gave, how long, and how many were empty or cut."""
    manifest = found["predictions"]
    lengths, reference = _lengths(ws, found)
    keys = ("predictions", "empty", "cut_at_max_new_tokens", "prompts_shortened")
    rows = [
        [*run.split("/"), *(counts[key] for key in keys), lengths.get(run)]
        for run, counts in manifest["runs"].items()
    ]
    foot = ["A prompt too long for the model loses its oldest rounds, never the newest turn."]
    if reference is not None:
        foot.append(
            f"The references have {reference:.1f} characters on average. BLEU-4 falls steeply for "
            "replies much shorter than the reference, ROUGE less so."
        )
    lost = manifest["counts"].get("rejected_by_reason", {})
    if lost:
        named = ", ".join(f"{reason.replace('_', ' ')} {n:,}" for reason, n in lost.items())
        foot.append(f"Rounds that got no reply: {named}. See rejects/generate/.")
    return Table(
        "predictions",
        "Replies by model, variant and decoding",
        [
            Column("Model"),
            Column("Variant"),
            Column("Decoding"),
            Column("Replies", numeric=True),
            Column("Empty", numeric=True),
            Column("Cut at the limit", numeric=True),
            Column("Prompt shortened", numeric=True),
            Column("Characters each", digits=1, numeric=True),
        ],
        rows,
        foot,
        grouped=True,
    )


def _lengths(ws: Workspace, found: Manifests) -> tuple[dict[str, float], float | None]:
    """Mean characters of each run's replies and of the references, where they were scored."""
    if "metrics" not in found:
        return {}, None
    run = ["model", "variant", "sampling"]
    scores = ws.read_table("metrics", [*run, "prediction_chars", "reference_chars"])
    grouped = scores.group_by(run).aggregate([("prediction_chars", "mean")]).to_pylist()
    lengths = {"/".join(row[key] for key in run): row["prediction_chars_mean"] for row in grouped}
    return lengths, pc.mean(scores["reference_chars"]).as_py()


def _spread(ws: Workspace, keys: set[tuple[str, int]]) -> list[dict[str, Any]]:
    """Up to three predicted rounds at even distances, in the order of dialogue and round."""
    ids = ws.read_table("test_rounds", ["dialogue_id", "round_index"]).to_pylist()
    order = sorted(
        key for key in {(r["dialogue_id"], r["round_index"]) for r in ids} if key in keys
    )
    count = min(_EXAMPLES, len(order))
    chosen = [order[(2 * i + 1) * len(order) // (2 * count)] for i in range(count)]
    table = ws.read_table("test_rounds")
    wanted = table.filter(pc.field("dialogue_id").isin([dialogue for dialogue, _ in chosen]))
    rows = {(r["dialogue_id"], r["round_index"]): r for r in wanted.to_pylist()}
    return [rows[key] for key in chosen]


def _scores(ws: Workspace, found: Manifests, sampling: str) -> dict[tuple[Any, ...], str]:
    """A short line of scores per reply, where they have been scored."""
    if "metrics" not in found:
        return {}
    table = ws.read_table("metrics").filter(pc.field("sampling") == sampling)
    return {
        (r["dialogue_id"], r["round_index"], r["model"], r["variant"]): (
            f"BLEU-4 {r['bleu_4']:.1f} · ROUGE-L {r['rouge_l']:.1f}"
        )
        for r in table.to_pylist()
    }
