"""Psy-Insight: a JSON list of sessions {dialog_id, topic, dialog: [{speaker, content, …}]}."""

from __future__ import annotations

from milm_ray.corpora.reading import (
    Parsed,
    Reader,
    Unusable,
    items_of,
    json_records,
    role_of,
    text_of,
)
from milm_ray.schema import Role

_ROLES: dict[str, Role] = {"Seeker": "client", "Supporter": "counselor"}


def _parse(parsed: Parsed, text: str, limit: int | None) -> None:
    for number, record in json_records(parsed, text, limit):
        identity = record.get("dialog_id")
        source_id = str(number if identity is None else identity)
        try:
            pairs = [
                (role_of(_ROLES, turn.get("speaker")), text_of(turn.get("content"), "content"))
                for turn in items_of(record.get("dialog"), "dialog")
            ]
            topic = text_of(record.get("topic"), "topic").strip()
        except Unusable as error:
            parsed.reject(error.reason, source_id, f"record {number}: {error.detail}", str(record))
            continue
        parsed.add(source_id, pairs, topic)


READER = Reader(
    "psy_insight",
    "Psy-Insight",
    # The repository also holds an English half, en_data7.json.
    ("cn_data*.json", "cn_data*.json.gz", "*.json", "*.json.gz"),
    _parse,
    one_per_file=False,
)
