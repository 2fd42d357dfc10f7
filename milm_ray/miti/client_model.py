"""The client of a simulated session: a profile, a state of change, an action for every turn.

After Yang et al., *Consistent Client Simulation for Motivational Interviewing-based Counseling*
(ACL 2025). A client has a behaviour, a reason that could move them, beliefs that hold them back
and plans that they could accept. They stand in a state of change; each state allows some actions,
and receptivity (1 closed to 5 open) weighs them. What is said carries the action out.

The states move by rules, never by what a language model finds plausible: plain models play clients
who agree too soon. Precontemplation is left only when the counselor touches the profile's own
reason, contemplation when every belief was met, and the session ends when a plan was accepted.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Literal, get_args

from milm_ray.schema import MOTIVATIONS, TOPICS, Motivation

State = Literal["precontemplation", "contemplation", "preparation", "termination"]
Action = Literal[
    "deny", "downplay", "blame", "inform", "engage", "hesitate", "doubt", "acknowledge",
    "reject", "accept", "plan", "terminate",
]  # fmt: skip
STATES: tuple[State, ...] = get_args(State)
ACTIONS: dict[State, tuple[Action, ...]] = {
    "precontemplation": ("deny", "downplay", "blame", "inform", "engage"),
    "contemplation": ("inform", "engage", "hesitate", "doubt", "acknowledge"),
    "preparation": ("inform", "engage", "reject", "accept", "plan"),
    "termination": ("terminate",),
}
RESISTANT: tuple[Action, ...] = ("deny", "downplay", "blame", "hesitate", "doubt", "reject")
# Share of resistant actions at receptivity 1 and 5, read off the publication's distributions.
_MOST_RESISTANT, _LEAST_RESISTANT = 0.66, 0.24
# Where a client starts. The publication gives real clients a mean receptivity of 3.27; the levels
# are the study's (its clients were given one at random) and the paper does not define them.
START: dict[Motivation, tuple[State, float]] = {
    "low": ("precontemplation", 2.0),
    "medium": ("precontemplation", 3.0),
    "high": ("contemplation", 4.0),
}
_MOBILITY = 1.0  # how far receptivity may move from where the client started
TARGETS = {
    "receptivity": "3.27 (real clients), 4.42 (a plain language model)",
    "motivated": "0.48 (real clients), 1.00 (a plain language model)",
}


@dataclass(frozen=True)
class Profile:
    """Who the client is. reason: what could move them; beliefs: what holds them back.

    cues: words by which a counselor's reply is seen to touch the reason or a belief (the scripted
    client has no other way to tell); the first entry is the reason's, then one per belief.
    """

    profile_id: str
    topic: str
    behavior: str
    goal: str
    persona: str
    opening: str
    facts: tuple[str, ...]
    reason: str
    beliefs: tuple[str, ...]
    plans: tuple[str, ...]
    cues: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Reading:
    """What the client takes from the counselor's last reply.

    engagement: how well it meets the client, 1 to 5; touches_reason, met_belief (position in the
    profile's beliefs) and offers_plan move the states; weights: how fitting each action of the
    state is now, where a language model says so.
    """

    engagement: int
    touches_reason: bool = False
    met_belief: int | None = None
    offers_plan: bool = False
    weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One client turn as it was decided."""

    state: State
    action: Action
    receptivity: float


@cache
def profiles() -> tuple[Profile, ...]:
    """The shipped profiles, two for each topic of the paper's Table 5; written for this project."""
    text = files("milm_ray.miti").joinpath("profiles.zh.json").read_text(encoding="utf-8")
    found = []
    for row in json.loads(text):
        lists = {name: tuple(row[name]) for name in ("facts", "beliefs", "plans")}
        cues = tuple(tuple(words) for words in row["cues"])
        found.append(Profile(**{**row, **lists, "cues": cues}))
    return tuple(found)


class ClientModel:
    """State, receptivity and what was used up, over one session; the same seed, the same client."""

    def __init__(self, profile: Profile, motivation: Motivation, seed: int) -> None:
        self.profile = profile
        self.state, self._start = START[motivation]
        self.receptivity = self._start
        self.steps: list[Step] = []
        self._random = random.Random(seed)
        self._unmet = set(range(len(profile.beliefs)))
        self._accepted = False
        self._used: set[str] = set()

    def open(self) -> Step:
        """The first turn: the client says what brings them."""
        return self._step("inform")

    def next(self, reading: Reading) -> Step:
        """The client's next turn, after the counselor's reply was read."""
        low, high = max(1.0, self._start - _MOBILITY), min(5.0, self._start + _MOBILITY)
        moved = (self.receptivity + reading.engagement) / 2
        self.receptivity = round(min(high, max(low, moved)), 2)
        self._move(reading)
        actions = ACTIONS[self.state]
        weights = self._weights(actions, reading)
        action = self._random.choices(actions, [weights[a] for a in actions])[0]
        if action == "accept" or (action == "plan" and reading.offers_plan):
            self._accepted = True
        return self._step(action)

    def pick(self, lines: Sequence[str]) -> str:
        """One of the lines that this client has not used yet; used ones again when none is left."""
        fresh = [line for line in lines if line not in self._used] or list(lines)
        line = self._random.choice(fresh)
        self._used.add(line)
        return line

    def holds(self, belief: int) -> bool:
        """Whether a belief, by its position in the profile, still holds the client back."""
        return belief in self._unmet

    def unmet_beliefs(self) -> list[str]:
        """The beliefs that still hold the client back, in the profile's order."""
        return [self.profile.beliefs[i] for i in sorted(self._unmet)]

    def _step(self, action: Action) -> Step:
        step = Step(self.state, action, self.receptivity)
        self.steps.append(step)
        return step

    def _move(self, reading: Reading) -> None:
        """At most one state further in a turn."""
        if self.state == "precontemplation":
            if reading.touches_reason:
                self.state = "contemplation"
        elif self.state == "contemplation":
            if reading.met_belief is not None:
                self._unmet.discard(reading.met_belief)
            if not self._unmet:
                self.state = "preparation"
        elif self.state == "preparation" and self._accepted:
            self.state = "termination"

    def _weights(self, actions: Sequence[Action], reading: Reading) -> dict[Action, float]:
        """By receptivity, and half by a language model's judgement of the moment where given."""
        share = (self.receptivity - 1) / 4
        resistance = _MOST_RESISTANT + share * (_LEAST_RESISTANT - _MOST_RESISTANT)
        resistant = [action for action in actions if action in RESISTANT]
        open_ = [action for action in actions if action not in RESISTANT]
        own: dict[Action, float] = {action: resistance / len(resistant) for action in resistant}
        own |= {a: (1 - resistance if resistant else 1) / len(open_) for a in open_}
        given = {action: max(0.0, reading.weights.get(action, 0.0)) for action in actions}
        total = sum(given.values())
        if total <= 0:
            return own
        return {action: own[action] / 2 + given[action] / total / 2 for action in actions}


@dataclass(frozen=True)
class Assignment:
    """One session to be held: everything but the model, so that every model meets it alike."""

    number: int
    profile: Profile
    motivation: Motivation
    seed: int


def assignments(count: int, seed: int, topics: Sequence[str] = TOPICS) -> list[Assignment]:
    """`count` sessions: topics in turn, motivation levels at random, seeded.

    Every model is given the same list, so that models differ in their replies and not in clients.
    """
    rng = random.Random(seed)
    by_topic = {topic: [p for p in profiles() if p.topic == topic] for topic in topics}
    for listed in by_topic.values():
        rng.shuffle(listed)
    found = []
    for number in range(count):
        listed = by_topic[topics[number % len(topics)]]
        profile = listed[number // len(topics) % len(listed)]
        motivation: Motivation = rng.choice(MOTIVATIONS)
        found.append(Assignment(number, profile, motivation, rng.randrange(2**31)))
    return found
