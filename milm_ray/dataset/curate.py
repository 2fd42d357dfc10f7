"""Curate: a judge scores a sample of every corpus, and the best corpora are kept (paper, Fig. 2).

In: `dialogues/`. Out: `verdicts/` (one row per judged dialogue, the unscored ones too) and
`selection/` (selection.json, figure2.png).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import pyarrow as pa

from milm_ray.config import Config
from milm_ray.dataset.quality import (
    DIALOGUE_MAXIMA,
    DIMENSIONS,
    MAXIMA,
    SCALES,
    SCHEMA,
    parse_verdict,
    ranking,
    summarise,
)
from milm_ray.dataset.sampling import Sample, corpora_in, sample
from milm_ray.dataset.table_rows import Row
from milm_ray.dataset.transcript import transcript
from milm_ray.errors import UserError
from milm_ray.job import Plan, Stage, finished, log
from milm_ray.llm.ask import Asking, make_or_ask_again, unasked
from milm_ray.llm.exchange import Answer
from milm_ray.llm.replies import Request, Subject
from milm_ray.llm.reply_store import answered_by
from milm_ray.prompts import load
from milm_ray.schema import VERDICTS, turns_of
from milm_ray.workspace import Workspace

PROMPT = "dialogue_quality.zh.md"


class Judging:
    """One dialogue to one verdict."""

    reply_tokens = 70

    def request(self, row: Row) -> Request:
        return Request(
            messages=[
                {"role": "system", "content": load(PROMPT).text},
                {"role": "user", "content": transcript(turns_of(row))},
            ],
            schema=SCHEMA,
            subject=Subject(row["corpus"], row["source_id"], PROMPT),
        )

    def parse(self, row: Row, text: str) -> dict[str, Any]:
        return parse_verdict(text)


def _asking(config: Config, workspace: Workspace) -> Asking:
    return Asking(config, config.judge, workspace, Judging(), "curate")


def _sample(config: Config, workspace: Workspace, asking: Asking) -> Sample:
    sizes = dict.fromkeys(corpora_in(workspace), config.curate.per_corpus)
    leave_out = asking.not_recorded if config.curate.pool == "recorded" else None
    return sample(workspace, sizes, config.seed, "curate", leave_out)


def _fingerprint(config: Config, workspace: Workspace) -> dict[str, Any]:
    settings = {
        "seed": config.seed,
        "per_corpus": config.curate.per_corpus,
        "pool": config.curate.pool,
        "judge": answered_by(config.judge),
        "prompt": load(PROMPT).version,
    }
    return workspace.fingerprint(settings, workspace.input_digests("dialogues"))


def plan(config: Config, workspace: Workspace) -> Plan:
    """What judging would take: rows, calls not in the reply store, tokens, cost."""
    if not workspace.exists("dialogues", "manifest.json"):
        return Plan(notes=(f"judge: {config.judge.model}, prompt {PROMPT}",))
    if workspace.is_done("verdicts", _fingerprint(config, workspace)) and not _unasked(workspace):
        done = workspace.is_done("selection", _selection_fingerprint(config, workspace))
        return Plan(done=done)
    asking = _asking(config, workspace)
    return asking.plan(_sample(config, workspace, asking).rows)


def run(config: Config, workspace: Workspace) -> Mapping[str, Any]:
    """Judge, select, draw Figure 2; returns the manifest of the selection."""
    fingerprint = _fingerprint(config, workspace)
    make = partial(_judge, config, workspace, fingerprint)
    make_or_ask_again(workspace, "verdicts", fingerprint, _unasked, make)
    fingerprint = _selection_fingerprint(config, workspace)
    if not finished(workspace, "selection", fingerprint):
        _select(config, workspace, fingerprint)
    counts = workspace.manifest("verdicts")["counts"]
    rate = counts["unscored"] / max(1, counts["judged"])
    if rate > config.curate.max_reject_rate:
        raise UserError(
            f"{counts['unscored']} of {counts['judged']} dialogues are unscored ({rate:.0%}); "
            f"curate.max_reject_rate allows {config.curate.max_reject_rate:.0%}",
            f"see verdicts/ for the reasons ({counts['unscored_by_reason']}); try another judge "
            "model, or raise curate.max_reject_rate",
        )
    return workspace.manifest("selection")


def _unasked(workspace: Workspace) -> bool:
    return unasked(workspace.manifest("verdicts")["counts"]["unscored_by_reason"])


def _judge(config: Config, workspace: Workspace, fingerprint: Mapping[str, Any]) -> None:
    started = time.time()
    asking = _asking(config, workspace)
    chosen = _sample(config, workspace, asking)
    answers = list(asking.run(chosen.rows))
    reasons = Counter(answer.reason for answer in answers if not answer.ok)
    counts: dict[str, Any] = {
        "judged": len(answers),
        "scored": sum(answer.ok for answer in answers),
        "unscored": sum(reasons.values()),
        "unscored_by_reason": dict(reasons),
        "judged_by_corpus": {c: len(rows) for c, rows in chosen.by_corpus.items()},
        "left_out_by_corpus": chosen.left_out,
    }
    for corpus, rows in chosen.by_corpus.items():
        if len(rows) < config.curate.per_corpus:
            log.info("curate: %s has %d dialogues to judge", corpus, len(rows))
    workspace.clear("verdicts")
    verdicts = [_verdict(answer) for answer in answers]
    workspace.write_table(pa.Table.from_pylist(verdicts, schema=VERDICTS), "verdicts")
    workspace.commit(
        "verdicts",
        stage="curate",
        settings=config.curate,
        fingerprint=fingerprint,
        counts=counts,
        started=started,
        usage=asking.usage.facts(),
        llm=answered_by(config.judge),
        prompt={"name": PROMPT, "version": load(PROMPT).version},
    )


def _verdict(answer: Answer) -> Row:
    """One row of VERDICTS; an unusable reply leaves the scores empty."""
    row = answer.row
    scores = answer.value or dict.fromkeys(DIMENSIONS)
    return {
        "dialogue_id": row["dialogue_id"],
        "corpus": row["corpus"],
        "source_id": row["source_id"],
        **{name: scores[name] for name in DIMENSIONS},
        "status": "scored" if answer.ok else "unscored",
        "reason": scores["reason"] if answer.ok else answer.why,
        "reply_key": answer.reply.key if answer.reply else None,
    }


def _selection_fingerprint(config: Config, workspace: Workspace) -> dict[str, Any]:
    settings = {
        "seed": config.seed,
        "select": config.curate.select,
        "scale": config.curate.scale,
    }
    return workspace.fingerprint(settings, workspace.input_digests("verdicts"))


def _select(config: Config, workspace: Workspace, fingerprint: Mapping[str, Any]) -> None:
    started = time.time()
    verdicts = workspace.read_table("verdicts").to_pylist()
    corpora = sorted({row["corpus"] for row in verdicts})
    summaries = {
        corpus: summarise([row for row in verdicts if row["corpus"] == corpus], config.seed)
        for corpus in corpora
    }
    rankings = {scale: ranking(summaries, scale) for scale in SCALES}
    selected = rankings[config.curate.scale][: config.curate.select]
    if not selected:
        raise UserError(
            "no corpus has a scored dialogue, so none can be selected",
            "see verdicts/ for the reasons; try another judge model",
        )
    selection = {
        "selected": selected,
        "scale": config.curate.scale,
        "corpora": summaries,
        "rankings": rankings,
        "maxima": {"turn": MAXIMA, "dialogue": DIALOGUE_MAXIMA},
        "note": "fraction: mean of the four scores as fractions of their maxima; turn: their sum, "
        "of 9; dialogue: fractions times the dialogue-level maxima, of 10. Intervals: 95 % "
        "percentile bootstrap over dialogues.",
    }
    workspace.clear("selection")
    text = json.dumps(selection, ensure_ascii=False, indent=1)
    workspace.write_text(text, "selection", "selection.json")
    workspace.write_bytes(figure2(summaries), "selection", "figure2.png")
    workspace.commit(
        "selection",
        stage="curate",
        settings=config.curate,
        fingerprint=fingerprint,
        counts={"corpora": len(corpora), "selected": len(selected)},
        started=started,
        selected=selected,
        figures=["figure2.png"],
    )


_COLORS = ("#2f6f8f", "#c8793a", "#4d8a57", "#8a5a83", "#777777", "#b5493f")


def figure2(summaries: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Figure 2 as PNG: mean score by dimension, one bar per corpus, 95 % intervals."""
    import io

    from matplotlib.figure import Figure

    shown = {name: summary for name, summary in summaries.items() if summary["dimensions"]}
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(shown))
    for place, (corpus, summary) in enumerate(shown.items()):
        cells = [summary["dimensions"][name] for name in DIMENSIONS]
        means = [cell["mean"] for cell in cells]
        low = [max(0.0, c["mean"] - c["interval"][0]) for c in cells]
        high = [max(0.0, c["interval"][1] - c["mean"]) for c in cells]
        at = [i + (place - (len(shown) - 1) / 2) * width for i in range(len(DIMENSIONS))]
        bars = axes.bar(
            at,
            means,
            width * 0.92,
            label=f"{corpus} (n = {summary['n']})",
            color=_COLORS[place % 6],
        )
        axes.errorbar(at, means, [low, high], fmt="none", ecolor="#333333", capsize=2, lw=0.9)
        for bar, mean in zip(bars, means, strict=True):
            middle = bar.get_x() + bar.get_width() / 2
            axes.text(middle, 0.04, f"{mean:.2f}", ha="center", color="white", fontsize=7)
    for i, name in enumerate(DIMENSIONS):
        axes.plot([i - 0.42, i + 0.42], [MAXIMA[name]] * 2, color="#888888", lw=0.8, ls=":")
    labels = [f"{name.capitalize()}\n(0–{MAXIMA[name]})" for name in DIMENSIONS]
    axes.set_xticks(range(len(DIMENSIONS)), labels)
    axes.set_ylabel("mean score")
    axes.set_ylim(0, max(MAXIMA.values()) * 1.08)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    return data.getvalue()


STAGE = Stage("curate", plan, run, check_paths=("llm",), uses_ray=False)
