"""The tables by which the stages meet: one Arrow schema each, and the few row types built on them.

A *turn* is one speaker's uninterrupted text; a *round* is one client-counselor exchange. Inside a
dialogue the turns alternate and the client speaks first.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Literal

import pyarrow as pa

Role = Literal["client", "counselor"]
# Who replies for a model: its base, the base with the MI adapter, and with the one that preference
# tuning has made of that, where it has.
Variant = Literal["base", "adapter", "dpo"]
VARIANTS: tuple[Variant, ...] = ("base", "adapter", "dpo")

TURN = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])
EXCHANGE = pa.struct([pa.field("client", pa.string()), pa.field("counselor", pa.string())])

DIALOGUES = pa.schema(
    {
        "dialogue_id": pa.string(),
        "corpus": pa.string(),
        "source_id": pa.string(),
        "topic": pa.string(),
        "turns": pa.list_(TURN),
    }
)
# A transcribed dialogue keeps the id of the dialogue it was made from: the split goes by it.
MI_DIALOGUES = pa.schema(
    [
        *DIALOGUES,
        pa.field("source_dialogue_id", pa.string()),
        pa.field("target_behavior", pa.string()),
        pa.field("reply_key", pa.string()),
    ]
)
VERDICTS = pa.schema(
    {
        "dialogue_id": pa.string(),
        "corpus": pa.string(),
        "source_id": pa.string(),
        "comprehensiveness": pa.int64(),
        "professionalism": pa.int64(),
        "authenticity": pa.int64(),
        "safety": pa.int64(),
        "status": pa.string(),  # scored | unscored
        "reason": pa.string(),  # the judge's sentence, or why the reply could not be scored
        "reply_key": pa.string(),
    }
)
REJECTS = pa.schema(
    {
        "stage": pa.string(),
        "corpus": pa.string(),
        "source_id": pa.string(),
        "dialogue_id": pa.string(),
        "reason": pa.string(),
        "detail": pa.string(),
        "raw": pa.string(),
    }
)
ROUNDS = pa.schema(
    {
        "dialogue_id": pa.string(),
        "round_index": pa.int64(),
        "topic": pa.string(),
        "instruction": pa.string(),
        "input": pa.string(),
        "output": pa.string(),
        "history": pa.list_(EXCHANGE),
    }
)
PREDICTIONS = pa.schema(
    {
        "dialogue_id": pa.string(),
        "round_index": pa.int64(),
        "model": pa.string(),
        "variant": pa.string(),  # one of VARIANTS
        "sampling": pa.string(),  # greedy | seed-<n>
        "text": pa.string(),
        "finish_reason": pa.string(),
        "prompt_tokens": pa.int64(),
        "completion_tokens": pa.int64(),
        "latency_s": pa.float64(),
        "dropped_rounds": pa.int64(),
    }
)
# A chat with one model, by a person or by the client simulator. Two producers, so two artifacts,
# `sessions/human/` and `sessions/simulated/`, with these columns each.
SESSIONS = pa.schema(
    {
        "session_id": pa.string(),
        "source": pa.string(),  # human | simulated
        "participant": pa.string(),  # the study's code for the client, "" where there is none
        "model": pa.string(),
        "variant": pa.string(),  # base | adapter
        "blind": pa.bool_(),  # the client was not told which model answers
        "topic": pa.string(),  # one of TOPICS
        "motivation": pa.string(),  # one of MOTIVATIONS
        "language": pa.string(),  # zh | en
        "turns": pa.list_(TURN),  # client first, alternating; the last may be the client's
        # Indices into turns: texts of the safety check, which are not the model's own and must not
        # be coded as if they were; and replies that the client cut short.
        "preset_turns": pa.list_(pa.int64()),
        "stopped_turns": pa.list_(pa.int64()),
        "risk": pa.string(),  # highest level that the safety check found: none | medium | high
        "started_at": pa.timestamp("us", tz="UTC"),
        "ended_at": pa.timestamp("us", tz="UTC"),  # null while it is open
        "end_reason": pa.string(),  # client | safety | limit | simulator's own, "" while open
        "rating": pa.int64(),  # 1 (poor) to 5 (good), null where none was given
        "comment": pa.string(),
        "seed": pa.int64(),  # of the assignment, or of the simulated session
        "details": pa.string(),  # JSON of what only one producer knows, "" where nothing
    }
)
# The paper's Table 5, and the levels that its clients were given.
TOPICS = ("weight_and_diet", "phone_use", "insomnia", "exercise", "advance_consumption")
Motivation = Literal["low", "medium", "high"]
MOTIVATIONS: tuple[Motivation, ...] = ("low", "medium", "high")
# Two replies to one round, the better and the worse, as an LLM judge ranked them.
PREFERENCES = pa.schema(
    {
        "dialogue_id": pa.string(),
        "round_index": pa.int64(),
        "model": pa.string(),  # whose replies they are
        "instruction": pa.string(),
        "input": pa.string(),
        "history": pa.list_(EXCHANGE),
        "chosen": pa.string(),
        "rejected": pa.string(),
        "candidates": pa.int64(),  # different replies that were ranked
        "chosen_rank": pa.float64(),  # 1: best; the mean over the orders asked
        "rejected_rank": pa.float64(),
        "judge": pa.string(),
        "reason": pa.string(),
        "reply_keys": pa.list_(pa.string()),
    }
)
PREFERENCE_LOG = pa.schema(
    {
        "model": pa.string(),
        "step": pa.int64(),
        "epoch": pa.float64(),
        "loss": pa.float64(),
        "learning_rate": pa.float64(),
        "grad_norm": pa.float64(),
        "chosen_reward": pa.float64(),  # beta times the log ratio to the adapter started from
        "rejected_reward": pa.float64(),
        "accuracy": pa.float64(),  # share of pairs whose chosen reply has the higher reward
    }
)
# One coder's work on one dialogue of the MITI study. Rows of different sources are never pooled.
CODINGS = pa.schema(
    {
        "item_id": pa.string(),  # the dialogue's name in the blind packet
        "dialogue_id": pa.string(),
        "group": pa.string(),  # the arm: an MI-LLM, real dialogues
        "coder": pa.string(),
        "source": pa.string(),  # human | adjudicated | automatic | mapped (from AnnoMI's labels)
        "status": pa.string(),  # coded | uncoded
        "reason": pa.string(),  # why it is uncoded
        "scope": pa.list_(pa.string()),  # the codes that this coder gives at all
        "target_behavior": pa.string(),
        # By volley and utterance, both from 1; empty where a source has counts only.
        "codes": pa.list_(
            pa.struct(
                [
                    pa.field("volley", pa.int64()),
                    pa.field("utterance", pa.int64()),
                    pa.field("code", pa.string()),
                ]
            )
        ),
        # Whole numbers by people; an automatic coder's are expected counts, with fractions.
        "counts": pa.map_(pa.string(), pa.float64()),
        "global_scores": pa.map_(pa.string(), pa.int64()),  # 1 to 5
        "rounds": pa.int64(),
        "comment": pa.string(),
        "reply_key": pa.string(),
    }
)
TRAINING_LOG = pa.schema(
    {
        "model": pa.string(),
        "step": pa.int64(),
        "epoch": pa.float64(),
        "loss": pa.float64(),
        "eval_loss": pa.float64(),  # of the held-out dialogues; empty where none was taken
        "learning_rate": pa.float64(),
        "grad_norm": pa.float64(),
        "tokens_per_s": pa.float64(),
    }
)


@dataclass(frozen=True)
class Turn:
    role: Role
    content: str


@dataclass(frozen=True)
class Dialogue:
    """A counselling dialogue. `source_id` is the corpus's own name for it (file, id, md5)."""

    corpus: str
    source_id: str
    turns: list[Turn]
    topic: str = ""

    @property
    def dialogue_id(self) -> str:
        return dialogue_id(self.corpus, self.turns)

    def row(self) -> dict[str, Any]:
        """The dialogue as one row of DIALOGUES."""
        return {"dialogue_id": self.dialogue_id, **asdict(self)}


@dataclass(frozen=True)
class Session:
    """One chat, by a person or a simulated client; the columns of SESSIONS explain the fields."""

    session_id: str
    source: Literal["human", "simulated"]
    model: str
    variant: Variant
    topic: str
    motivation: Motivation
    turns: list[Turn]
    started_at: datetime
    ended_at: datetime | None = None
    end_reason: str = ""
    participant: str = ""
    blind: bool = False
    language: Literal["zh", "en"] = "zh"
    preset_turns: list[int] = field(default_factory=list)
    stopped_turns: list[int] = field(default_factory=list)
    risk: Literal["none", "medium", "high"] = "none"
    rating: int | None = None
    comment: str = ""
    seed: int | None = None
    details: str = ""

    def row(self) -> dict[str, Any]:
        """The session as one row of SESSIONS."""
        return asdict(self)


@dataclass(frozen=True)
class Reject:
    """One thing that could not be used, and why; `raw` is what was there (2,000 characters)."""

    stage: str
    reason: str
    corpus: str = ""
    source_id: str = ""
    dialogue_id: str = ""
    detail: str = ""
    raw: str = field(default="", repr=False)

    def row(self) -> dict[str, Any]:
        """The reject as one row of REJECTS."""
        return {**asdict(self), "raw": self.raw[:2000]}


def dialogue_id(corpus: str, turns: list[Turn]) -> str:
    """sha256 of the corpus and the turns: the same text in the same corpus has the same id."""
    canonical = json.dumps(
        [corpus, [[t.role, t.content] for t in turns]], ensure_ascii=False, separators=(",", ":")
    )
    return hashlib.sha256(canonical.encode()).hexdigest()


def turns_of(row: dict[str, Any]) -> list[Turn]:
    """The turns of one row of DIALOGUES."""
    return [Turn(turn["role"], turn["content"]) for turn in row["turns"]]


def structure_fault(turns: list[Turn]) -> str | None:
    """Why turns are not a dialogue (client first, alternating, ended by the counselor), or None."""
    if not turns:
        return "empty"
    if any(not turn.content.strip() for turn in turns):
        return "empty_turn"
    if len({turn.role for turn in turns}) < 2:
        return "one_sided"
    expected: tuple[Role, Role] = ("client", "counselor")
    if any(turn.role != expected[i % 2] for i, turn in enumerate(turns)):
        return "roles_do_not_alternate"
    if len(turns) % 2:
        return "ends_with_client"
    return None
