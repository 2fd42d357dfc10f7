"""Rounds: a dialogue as the samples on which a model is tested, one per client turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from milm_ray.models.messages import INSTRUCTION
from milm_ray.schema import turns_of

# Batch prediction reads a few rounds at a time, and a group of rows whole.
ROUNDS_PER_GROUP = 256

_SPEAKER = {"client": "来访者", "counselor": "心理咨询师"}


def rounds(dialogue: Mapping[str, Any], instruction: str = INSTRUCTION) -> list[dict[str, Any]]:
    """The rounds of a dialogue (a row with dialogue_id, topic and turns) as rows of schema.ROUNDS.

    Round k (from 1) asks for the k-th counselor turn and carries rounds 1 to k-1 as its history.
    """
    turns = turns_of(dict(dialogue))
    pairs = list(zip(turns[0::2], turns[1::2], strict=True))
    exchanges = [{"client": c.content, "counselor": a.content} for c, a in pairs]
    return [
        {
            "dialogue_id": dialogue["dialogue_id"],
            "round_index": number,
            "topic": dialogue["topic"] or "",
            "instruction": instruction,
            "input": exchange["client"],
            "output": exchange["counselor"],
            "history": exchanges[: number - 1],
        }
        for number, exchange in enumerate(exchanges, 1)
    ]


def inline_input(row: Mapping[str, Any]) -> str:
    """The input with the history inside it, as the paper describes its samples.

    LLaMA-Factory's own Alpaca form keeps the history in a field apart; see `export`.
    """
    said = [
        f"{_SPEAKER[role]}：{exchange[role]}"
        for exchange in row["history"]
        for role in ("client", "counselor")
    ]
    return "\n".join([*said, f"{_SPEAKER['client']}：{row['input']}"])
