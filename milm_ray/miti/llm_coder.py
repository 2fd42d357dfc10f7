"""A language model as MITI coder: the same scheme, the same rules, strictly parsed.

A reply that breaks the form or the rules of the volley is asked for once more with what is wrong,
and then left uncoded: it is never mended here, and never counted as "nothing to code". Language
models are known to call complex reflections too freely (96 % of reflections against 39 % by people
in arXiv 2603.03846), so read these codes beside people's, never instead of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from milm_ray.llm.exchange import Row, Unusable
from milm_ray.llm.replies import Request, Subject, json_object
from milm_ray.miti.coding_scheme import CODES, GLOBAL_NAMES, code_name, volley_faults
from milm_ray.miti.packet import Item
from milm_ray.miti.sheet import CodedItem
from milm_ray.prompts import load

PROMPT = "miti_coding.zh.md"
_SPEAKER = {"client": "来访者", "counselor": "咨询师"}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "target_behavior": {"type": "string"},
        "codes": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "volley": {"type": "integer"},
                    "utterance": {"type": "integer"},
                    "code": {"type": "string", "enum": [code.short for code in CODES]},
                },
                "required": ["volley", "utterance", "code"],
                "additionalProperties": False,
            },
        },
        "global_scores": {
            "type": "object",
            "properties": {name: {"type": "integer"} for name in GLOBAL_NAMES},
            "required": list(GLOBAL_NAMES),
            "additionalProperties": False,
        },
    },
    "required": ["target_behavior", "codes", "global_scores"],
    "additionalProperties": False,
}


def numbered(item: Item) -> str:
    """A dialogue as a coder reads it: volleys with their speakers, utterances with numbers."""
    return "\n".join(
        f"[{volley.number}] {_SPEAKER[volley.role]}\n"
        + "\n".join(f"  {volley.number}.{n} {text}" for n, text in enumerate(volley.utterances, 1))
        for volley in item.volleys
    )


class Coder:
    """One dialogue of the packet to one coding. Row: {"item": the item's id}."""

    reply_tokens = 700

    def __init__(self, items: Mapping[str, Item], name: str) -> None:
        self._items, self._name = dict(items), name

    def request(self, row: Row) -> Request:
        return Request(
            messages=[
                {"role": "system", "content": load(PROMPT).text},
                {"role": "user", "content": numbered(self._items[row["item"]])},
            ],
            schema=SCHEMA,
            subject=Subject("packet", row["item"], PROMPT),
        )

    def parse(self, row: Row, text: str) -> CodedItem:
        item = self._items[row["item"]]
        try:
            data = json_object(text)
        except ValueError as error:
            raise Unusable("not_json", str(error)) from None
        target, listed = data.get("target_behavior"), data.get("codes")
        if not isinstance(target, str) or not target.strip():
            raise Unusable("off_schema", "target_behavior is not named")
        if not isinstance(listed, list):
            raise Unusable("off_schema", "no list named codes")
        codes = _codes(item, listed)
        scores = data.get("global_scores")
        if not isinstance(scores, dict) or set(scores) != set(GLOBAL_NAMES):
            raise Unusable("off_schema", f"global_scores must name {', '.join(GLOBAL_NAMES)}")
        for name, score in scores.items():
            if not _is_whole(score) or not 1 <= score <= 5:
                raise Unusable("off_schema", f"{name} must be a whole number from 1 to 5")
        return CodedItem(item.item_id, self._name, target.strip(), codes, scores)


def _codes(item: Item, listed: list[Any]) -> dict[tuple[int, int], str]:
    known = {volley.number: volley for volley in item.volleys}
    codes: dict[tuple[int, int], str] = {}
    for entry in listed:
        if not isinstance(entry, dict):
            raise Unusable("off_schema", "codes must be objects")
        number, utterance = entry.get("volley"), entry.get("utterance")
        code = code_name(entry["code"]) if isinstance(entry.get("code"), str) else None
        volley = known.get(number) if _is_whole(number) else None
        if code is None or volley is None or not (_is_whole(number) and _is_whole(utterance)):
            raise Unusable("off_schema", f"no such code or place: {entry}")
        if not 1 <= utterance <= len(volley.utterances):
            raise Unusable("off_schema", f"volley {number} has no utterance {utterance}")
        if volley.role != "counselor":
            raise Unusable("client_coded", f"volley {number} is the client's")
        if (number, utterance) in codes:
            raise Unusable("two_codes", f"utterance {utterance} of volley {number} has two codes")
        codes[number, utterance] = code
    for number in known:
        faults = volley_faults(code for place, code in codes.items() if place[0] == number)
        if faults:
            raise Unusable("rules_broken", f"volley {number}: {faults[0]}")
    return codes


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
