"""Transcribe: a teacher rewrites counselling dialogues in the style of motivational interviewing.

In: `dialogues/`, `selection/`. Out: `mi_dialogues/` (at most one row per dialogue) and
`rejects/transcribe/` (every reply that could not be used, with the reason and its raw text).
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pyarrow as pa

from milm_ray.config import Config, TranscribeSection
from milm_ray.dataset.sampling import Sample, sample
from milm_ray.dataset.table_rows import Row, in_columns
from milm_ray.dataset.target import target_behavior
from milm_ray.dataset.transcript import transcript
from milm_ray.errors import UserError
from milm_ray.job import Plan, Stage, log
from milm_ray.llm.ask import Asking, make_or_ask_again, unasked
from milm_ray.llm.exchange import Answer, Unusable
from milm_ray.llm.replies import Request, Subject, json_object
from milm_ray.llm.reply_store import answered_by
from milm_ray.prompts import load
from milm_ray.schema import (
    MI_DIALOGUES,
    REJECTS,
    Dialogue,
    Reject,
    Turn,
    structure_fault,
    turns_of,
)
from milm_ray.workspace import Workspace

PROMPT = "mi_transcription.zh.md"
ARTIFACT = "mi_dialogues"
REJECTED = "rejects/transcribe"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "dialogue": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "role": {"type": "string", "enum": ["client", "counselor"]},
                    "content": {"type": "string"},
                },
                "required": ["role", "content"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["dialogue"],
    "additionalProperties": False,
}

# Bracketed prose is a stage direction: the prompt forbids it and speech has no brackets.
_STAGE_DIRECTION = re.compile(
    r"（[^）]*[一-鿿][^）]*）|\([^)]*[一-鿿][^)]*\)|【[^】]*】|\*[^*\n]*[一-鿿][^*\n]*\*"
)
# Words of the instructions that no client or counselor says, and speaker names inside a turn.
_LEAK = re.compile(
    r"MITI|OARS|动机式访谈|动机性访谈|改变语句|维持语句|导进|唤出|双面反映|复杂反映|简单反映"
    r"|反映式倾听|开放式提问|量尺提问|作为(?:一个|一名)?(?:AI|人工智能|语言模型)|JSON|\"role\"|原对话"
    r"|^(?:来访者|心理咨询师|咨询师|client|counselor)\s*[:：]",
    re.IGNORECASE,
)


def parse_transcription(text: str, settings: TranscribeSection, source_rounds: int) -> list[Turn]:
    """The MI dialogue in a teacher's reply; Unusable with the rule that it breaks.

    source_rounds: rounds of the source dialogue, for `preserve_rounds`.
    """
    try:
        data = json_object(text)
    except ValueError as error:
        raise Unusable("not_json", str(error)) from None
    listed = data.get("dialogue")
    if not isinstance(listed, list):
        raise Unusable("off_schema", "no list named dialogue")
    turns: list[Turn] = []
    for number, item in enumerate(listed, 1):
        if not isinstance(item, dict) or item.get("role") not in ("client", "counselor"):
            raise Unusable("off_schema", f"turn {number} has no role client or counselor")
        if not isinstance(item.get("content"), str):
            raise Unusable("off_schema", f"turn {number} has no text")
        turns.append(Turn(item["role"], item["content"].strip()))
    if fault := structure_fault(turns):
        raise Unusable(fault, f"{len(turns)} turns")
    rounds = len(turns) // 2
    if not settings.min_rounds <= rounds <= settings.max_rounds:
        wanted = f"{settings.min_rounds} to {settings.max_rounds}"
        raise Unusable("round_count", f"{rounds} rounds, not {wanted}")
    if settings.preserve_rounds and rounds != source_rounds:
        raise Unusable("rounds_not_preserved", f"{rounds} rounds, the source has {source_rounds}")
    for number, turn in enumerate(turns, 1):
        if found := _STAGE_DIRECTION.search(turn.content):
            raise Unusable("stage_direction", f"turn {number}: {found.group()[:40]}")
        if found := _LEAK.search(turn.content):
            raise Unusable("leaked_instruction", f"turn {number}: {found.group()[:40]}")
    return turns


class Transcription:
    """One dialogue to one MI dialogue."""

    reply_tokens = 980

    def __init__(self, settings: TranscribeSection) -> None:
        self._settings = settings

    def request(self, row: Row) -> Request:
        return Request(
            messages=[
                {"role": "system", "content": load(PROMPT).text},
                {"role": "user", "content": transcript(turns_of(row))},
            ],
            schema=SCHEMA,
            subject=Subject(row["corpus"], row["source_id"], PROMPT),
        )

    def parse(self, row: Row, text: str) -> list[Turn]:
        return parse_transcription(text, self._settings, len(row["turns"]) // 2)


def _asking(config: Config, workspace: Workspace) -> Asking:
    return Asking(config, config.teacher, workspace, Transcription(config.transcribe), "transcribe")


def _sizes(config: Config, selected: list[str]) -> dict[str, int | None]:
    """How many dialogues of each selected corpus; every one of them when no counts are given."""
    counts: Mapping[str, int] = {str(k): n for k, n in config.transcribe.per_corpus.items()}
    if not counts:
        return dict.fromkeys(selected)
    unnamed = [corpus for corpus in selected if corpus not in counts]
    if unnamed:
        raise UserError(
            f"selected, but without a count in transcribe.per_corpus: {', '.join(unnamed)}",
            f"add it, as in transcribe.per_corpus.{unnamed[0]}=500",
        )
    return {corpus: counts[corpus] for corpus in selected}


def _sample(config: Config, workspace: Workspace, asking: Asking) -> Sample:
    settings = config.transcribe

    def leave_out(row: Row) -> str:
        if settings.pool == "recorded" and asking.not_recorded(row):
            return "not_recorded"
        topic = row["topic"] or ""
        if settings.require_target and not target_behavior(turns_of(row), topic):
            return "no_target_behavior"
        return ""

    everything = settings.pool == "all" and not settings.require_target
    sizes = _sizes(config, workspace.manifest("selection")["selected"])
    return sample(workspace, sizes, config.seed, "transcribe", None if everything else leave_out)


def _fingerprint(config: Config, workspace: Workspace) -> dict[str, Any]:
    settings = {
        "seed": config.seed,
        "transcribe": config.transcribe.model_dump(exclude={"max_reject_rate"}),
        "teacher": answered_by(config.teacher),
        "prompt": load(PROMPT).version,
    }
    return workspace.fingerprint(settings, workspace.input_digests("dialogues", "selection"))


def plan(config: Config, workspace: Workspace) -> Plan:
    """What transcription would take: rows, calls not in the reply store, tokens, cost."""
    if not workspace.exists("selection", "manifest.json"):
        return Plan(notes=(f"teacher: {config.teacher.model}, prompt {PROMPT}",))
    if workspace.is_done(ARTIFACT, _fingerprint(config, workspace)) and not _unasked(workspace):
        return Plan(done=True)
    asking = _asking(config, workspace)
    return asking.plan(_sample(config, workspace, asking).rows)


def run(config: Config, workspace: Workspace) -> Mapping[str, Any]:
    """Rewrite the selected dialogues; returns the manifest of `mi_dialogues/`.

    Raises UserError, after everything is written, when more than `max_reject_rate` are rejected.
    """
    fingerprint = _fingerprint(config, workspace)
    make = partial(_transcribe, config, workspace, fingerprint)
    make_or_ask_again(workspace, ARTIFACT, fingerprint, _unasked, make)
    manifest = workspace.manifest(ARTIFACT)
    counts = manifest["counts"]
    rate = counts["rejected"] / max(1, counts["asked"])
    if rate > config.transcribe.max_reject_rate:
        raise UserError(
            f"{counts['rejected']} of {counts['asked']} replies are rejected ({rate:.0%}); "
            f"transcribe.max_reject_rate allows {config.transcribe.max_reject_rate:.0%}",
            f"see {REJECTED}/ for reasons and texts ({counts['rejected_by_reason']}); try another "
            "teacher, or raise transcribe.max_reject_rate to go on with the rest",
        )
    return manifest


def _unasked(workspace: Workspace) -> bool:
    return unasked(workspace.manifest(ARTIFACT)["counts"]["rejected_by_reason"])


def _transcribe(config: Config, workspace: Workspace, fingerprint: Mapping[str, Any]) -> None:
    started = time.time()
    asking = _asking(config, workspace)
    chosen = _sample(config, workspace, asking)
    for corpus, rows in chosen.by_corpus.items():
        wanted = _sizes(config, [corpus])[corpus]
        if wanted is not None and len(rows) < wanted:
            log.info("transcribe: %s has %d of the %d dialogues wanted", corpus, len(rows), wanted)
    # Every row either becomes one of `done` or is counted here; no answer is kept beside it.
    rejects = list[Row]()
    repaired = 0

    def usable() -> Iterator[Row]:
        nonlocal repaired
        for answer in asking.run(chosen.rows):
            if answer.ok:
                repaired += len(answer.replies) > 1
                yield _mi_dialogue(answer)
            else:
                rejects.append(_reject(answer).row())

    done = in_columns(usable(), MI_DIALOGUES)
    reasons = Counter(reject["reason"] for reject in rejects)
    of_corpus = Counter(done["corpus"].to_pylist())
    settings = config.transcribe
    workspace.clear(ARTIFACT)
    workspace.clear(REJECTED)
    workspace.write_table(pa.Table.from_pylist(rejects, schema=REJECTS), REJECTED)
    workspace.commit(
        REJECTED,
        stage="transcribe",
        settings=settings,
        fingerprint=fingerprint,
        counts={"rejected": len(rejects), "rejected_by_reason": dict(reasons)},
        started=started,
    )
    workspace.write_table(done, ARTIFACT)
    workspace.commit(
        ARTIFACT,
        stage="transcribe",
        settings=settings,
        fingerprint=fingerprint,
        counts={
            "asked": len(done) + len(rejects),
            "transcribed": len(done),
            "rejected": len(rejects),
            "rejected_by_reason": dict(reasons),
            "repaired": repaired,
            "by_corpus": {c: of_corpus[c] for c in chosen.by_corpus},
            "left_out_by_corpus": chosen.left_out,
            "by_target_behavior": dict(
                Counter(
                    name or "none" for name in done["target_behavior"].to_pylist()
                ).most_common()
            ),
        },
        started=started,
        usage=asking.usage.facts(),
        llm=answered_by(config.teacher),
        prompt={"name": PROMPT, "version": load(PROMPT).version},
    )


def _mi_dialogue(answer: Answer) -> Row:
    """One row of MI_DIALOGUES."""
    source = answer.row
    topic = source["topic"] or ""
    made = Dialogue(source["corpus"], source["source_id"], answer.value, topic)
    return {
        **made.row(),
        "source_dialogue_id": source["dialogue_id"],
        "target_behavior": target_behavior(answer.value, topic),
        "reply_key": answer.reply.key if answer.reply else None,
    }


def _reject(answer: Answer) -> Reject:
    return Reject(
        stage="transcribe",
        reason=answer.reason,
        corpus=answer.row["corpus"],
        source_id=answer.row["source_id"],
        dialogue_id=answer.row["dialogue_id"],
        detail=answer.detail,
        raw=answer.reply.text if answer.reply else "",
    )


STAGE = Stage("transcribe", plan, run, check_paths=("llm",), uses_ray=False)
