"""Blind packets: what coders get to see of a dialogue, and the key that they do not.

The order is shuffled, ids say nothing, and names that give a model away are masked. Who made
which dialogue stands in the key alone, which stays with the study's organiser.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from milm_ray.errors import UserError
from milm_ray.miti.volleys import Volley, volleys
from milm_ray.schema import Turn

MASK = "〔…〕"
_VERSION = r"(?:[ _-]?\d+(?:\.\d+)?[a-z]?)?(?:[_-]\d+[a-z])*(?:[_-](?:chat|instruct|base))?"
# What tells a coder that a model speaks, and which, as regular expressions; of two that begin
# alike the longer comes first. A name goes with its version and size, which would tell it too.
GIVE_AWAYS = (
    "我是一个人工智能助手",
    "作为一个人工智能",
    "作为一个AI",
    "作为AI",
    "人工智能助手",
    "人工智能",
    "语言模型",
    "AI助手",
    rf"(?:Chat)?GLM{_VERSION}",
    "智谱(?:清言|AI)?",
    rf"(?:Baichuan|百川(?:大模型|智能)?){_VERSION}",
    rf"Llama{_VERSION}",
    rf"(?:Qwen|通义千问){_VERSION}",
    "Meta AI",
    rf"(?:Chat)?GPT{_VERSION}",
    "OpenAI",
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


@dataclass(frozen=True)
class Candidate:
    """A dialogue to be coded; group is its arm: a model, or real dialogues."""

    dialogue_id: str
    group: str
    turns: Sequence[Turn]


@dataclass(frozen=True)
class Item:
    """One dialogue as coders see it."""

    item_id: str
    volleys: tuple[Volley, ...]

    @property
    def rounds(self) -> int:
        """Counsellor volleys: one per client–counsellor exchange."""
        return sum(v.role == "counselor" for v in self.volleys)


@dataclass(frozen=True)
class Packet:
    """Items in coding order; key maps an item's id to (dialogue_id, group).

    masked counts the give-aways hidden, by item, for the study's report.
    """

    items: tuple[Item, ...]
    key: dict[str, tuple[str, str]]
    masked: dict[str, int]

    def item(self, item_id: str) -> Item | None:
        return next((item for item in self.items if item.item_id == item_id), None)


def make_packet(candidates: Sequence[Candidate], seed: int) -> Packet:
    """Shuffle, rename and mask dialogues for blind coding; the same seed gives the same packet.

    Ids are "item-01"…: words, so that no spreadsheet takes them for a number or a date.
    Raises UserError when a dialogue is there twice or has no counsellor turn.
    """
    ids = [candidate.dialogue_id for candidate in candidates]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    silent = [c.dialogue_id for c in candidates if all(t.role != "counselor" for t in c.turns)]
    if twice or silent:
        raise UserError(
            "dialogues that cannot be coded: "
            + "; ".join(
                [f"{i} is there twice" for i in twice]
                + [f"{i} has no counselor turn" for i in silent]
            ),
            "leave them out of the packet",
        )
    # Sorted first, so that the packet depends on the seed and not on the order of arrival.
    ordered = sorted(candidates, key=lambda candidate: candidate.dialogue_id)
    random.Random(seed).shuffle(ordered)
    pattern = re.compile("|".join(GIVE_AWAYS), re.IGNORECASE)
    width = max(2, len(str(len(ordered))))
    items, key, masked = [], {}, {}
    for number, candidate in enumerate(ordered, 1):
        item_id = f"item-{number:0{width}d}"
        turns = [Turn(turn.role, _CONTROL.sub(" ", turn.content)) for turn in candidate.turns]
        shown, hidden = [], 0
        # Masked after the cut into sentences, which a mask's own marks would move.
        for volley in volleys(turns):
            cut = [pattern.subn(MASK, text) for text in volley.utterances]
            shown.append(replace(volley, utterances=tuple(text for text, _ in cut)))
            hidden += sum(found for _, found in cut)
        items.append(Item(item_id, tuple(shown)))
        key[item_id] = (candidate.dialogue_id, candidate.group)
        masked[item_id] = hidden
    return Packet(tuple(items), key, masked)
