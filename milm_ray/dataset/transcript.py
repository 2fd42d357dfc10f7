"""A dialogue as the text that a judge or a teacher reads."""

from __future__ import annotations

from collections.abc import Sequence

from milm_ray.schema import Turn

_SPEAKER = {"client": "来访者", "counselor": "心理咨询师"}


def transcript(turns: Sequence[Turn]) -> str:
    """One line a turn, each with its speaker's name."""
    return "\n".join(f"{_SPEAKER[turn.role]}：{turn.content}" for turn in turns)
