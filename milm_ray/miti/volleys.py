"""Dialogues as volleys and utterances, the units that MITI codes are given to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from milm_ray.schema import Role, Turn

# A sentence with its closing marks and quotes, or a line's rest without them.
# English sentences also end in a full stop; a following capital keeps "e.g. this" and "2.5" whole,
# and what stands before the stop keeps "Mrs. Smith".
_TITLES = r"(?<!\bMr\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bMrs\.)"
_ENGLISH_END = re.compile(rf"(?<=[.!?]){_TITLES}\s+(?=[A-Z\"“'])")
_SENTENCE = re.compile(r"[^。！？!?…\n]*[。！？!?…]+[”’」』）)\"']*|[^。！？!?…\n]+")


@dataclass(frozen=True)
class Volley:
    """One speaker's uninterrupted speech; numbers count from 1 over the whole dialogue.

    utterances holds the speech cut into sentences, the proposed coding units. A coder leaves
    those that carry no code of their own empty, so cutting finer than the manual parses is safe,
    whereas a unit with two thoughts could not take two codes.
    """

    number: int
    role: Role
    utterances: tuple[str, ...]


def volleys(turns: Sequence[Turn]) -> list[Volley]:
    """The volleys of a dialogue: neighbouring turns of one speaker joined, blank turns skipped."""
    joined: list[tuple[Role, list[str]]] = []
    for turn in turns:
        if not turn.content.strip():
            continue
        if joined and joined[-1][0] == turn.role:
            joined[-1][1].append(turn.content)
        else:
            joined.append((turn.role, [turn.content]))
    return [
        Volley(number, role, tuple(part for text in texts for part in split_utterances(text)))
        for number, (role, texts) in enumerate(joined, 1)
    ]


def split_utterances(text: str) -> list[str]:
    """The sentences of a text; together they hold every character of it that is not blank."""
    parts: list[str] = []
    for part in (p for piece in _ENGLISH_END.split(text) for p in _SENTENCE.findall(piece)):
        part = part.strip()
        if part and parts and not any(c.isalnum() for c in part):
            parts[-1] += part
        elif part:
            parts.append(part)
    return parts
