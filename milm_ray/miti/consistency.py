"""How consistent simulated clients were, in the figures that their publication reports.

Yang et al. (ACL 2025) compare simulators with real clients by mean receptivity and by the share of
clients who were motivated within 20 turns; both are far too high for plain language models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from milm_ray.miti.client_model import ACTIONS, STATES, ClientModel
from milm_ray.schema import Turn

MOTIVATED_WITHIN = 20  # client turns

Held = tuple[ClientModel, Sequence[Turn], Sequence[str] | None]


def consistency(held: Sequence[Held]) -> dict[str, Any]:
    """Figures over sessions (model, turns, actions recognised in the turns after the first).

    receptivity: mean over client turns; motivated: of the sessions that began in precontemplation,
    the share that left it within 20 turns; lawful: share of turns whose action its state allows;
    recognised: share of turns whose intended action was recognised blind, None where nobody tried;
    repeated: share of client turns said before in the session. None where there is nothing to
    average.
    """
    steps = [step for model, _, _ in held for step in model.steps]
    began = [model for model, _, _ in held if model.steps[0].state == "precontemplation"]
    left = sum(
        any(step.state != "precontemplation" for step in model.steps[:MOTIVATED_WITHIN])
        for model in began
    )
    pairs = [
        (step.action, seen)
        for model, _, recognised in held
        if recognised is not None
        for step, seen in zip(model.steps[1:], recognised, strict=False)
    ]
    said = [[turn.content for turn in turns if turn.role == "client"] for _, turns, _ in held]
    total = sum(map(len, said))
    return {
        "sessions": len(held),
        "client_turns": total,
        "receptivity": _share(sum(step.receptivity for step in steps), len(steps)),
        "motivated": _share(left, len(began)),
        "began_in_precontemplation": len(began),
        "lawful": _share(sum(step.action in ACTIONS[step.state] for step in steps), len(steps)),
        "recognised": _share(sum(meant == seen for meant, seen in pairs), len(pairs)),
        "recognised_turns": len(pairs),
        "repeated": _share(sum(len(texts) - len(set(texts)) for texts in said), total),
        "turns_by_state": {s: sum(step.state == s for step in steps) for s in STATES},
        "turns_by_action": dict(Counter(step.action for step in steps).most_common()),
    }


def _share(part: float, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None
