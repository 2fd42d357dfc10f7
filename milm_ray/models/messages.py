"""Dialogues as chat messages: the one construction behind training, serving and prediction.

The instruction is said once, ahead of the client's first turn (Alpaca's user text: instruction,
newline, input); later client turns stand alone. So the messages of round k are a prefix of the
whole dialogue's, and what a model is asked is exactly what it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from milm_ray.schema import Turn

Message = dict[str, str]

# The paper quotes this sentence with an omission; it follows the CPsyCoun evaluation notebook.
INSTRUCTION = (
    "你是一位有着二十年从业经验的心理咨询师。你旨在通过专业的心理咨询，帮助来访者解决心理问题。"
)
_CHAT_ROLE = {"client": "user", "counselor": "assistant"}


def dialogue_messages(turns: Sequence[Turn], instruction: str = INSTRUCTION) -> list[Message]:
    """A whole dialogue as user and assistant messages, the instruction ahead of the first turn."""
    messages = [{"role": _CHAT_ROLE[turn.role], "content": turn.content} for turn in turns]
    if messages and instruction:
        messages[0]["content"] = f"{instruction}\n{messages[0]['content']}"
    return messages


def round_messages(row: Mapping[str, Any]) -> list[Message]:
    """What a model is asked in one round (a row of schema.ROUNDS): history, then the client."""
    turns = [
        turn
        for exchange in row["history"]
        for turn in (Turn("client", exchange["client"]), Turn("counselor", exchange["counselor"]))
    ]
    return dialogue_messages([*turns, Turn("client", row["input"])], row["instruction"])
