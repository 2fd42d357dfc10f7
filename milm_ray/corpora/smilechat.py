"""SmileChat: one JSON file per dialogue, a list of {role, content, annotation}. CC0."""

from __future__ import annotations

from milm_ray.corpora.reading import (
    Parsed,
    Reader,
    items_of,
    load_json,
    role_of,
    stem,
    text_of,
)
from milm_ray.schema import Role

_ROLES: dict[str, Role] = {"client": "client", "counselor": "counselor"}


def _parse(parsed: Parsed, text: str, limit: int | None) -> None:
    turns = items_of(load_json(text), "the file")
    pairs = [
        (role_of(_ROLES, turn.get("role")), text_of(turn.get("content"), "content"))
        for turn in turns
    ]
    parsed.add(stem(parsed.name), pairs)


READER = Reader("smilechat", "SmileChat", ("*.json", "*.json.gz"), _parse, one_per_file=True)
