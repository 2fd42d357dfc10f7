"""Emotional First Aid (efaqa): gzip of JSON lines, one forum thread a line.

The owner of a thread is the client; the audience, often several strangers, is taken together as
the counselor. Title and description are the client's first words. The owner may never answer.
"""

from __future__ import annotations

from typing import Any

from milm_ray.corpora.reading import (
    Pair,
    Parsed,
    Reader,
    Unusable,
    items_of,
    json_records,
    role_of,
    text_of,
)
from milm_ray.schema import Role

_ROLES: dict[str, Role] = {"owner": "client", "audience": "counselor"}


def _parse(parsed: Parsed, text: str, limit: int | None) -> None:
    for number, record in json_records(parsed, text, limit):
        source_id = str(record.get("md5") or number)
        try:
            pairs, others = _thread(record)
            label = record.get("label")
            # s1 is the code of the trouble's kind, the nearest thing to a topic.
            topic = str(label.get("s1") or "") if isinstance(label, dict) else ""
        except Unusable as error:
            parsed.reject(error.reason, source_id, f"record {number}: {error.detail}", str(record))
            continue
        parsed.add(source_id, pairs, topic, {"non_text_messages_dropped": others} if others else {})


def _thread(record: dict[str, Any]) -> tuple[list[Pair], int]:
    """The thread's pairs and the number of messages that are images or other non-text."""
    title = text_of(record.get("title"), "title").strip()
    description = text_of(record.get("description"), "description").strip()
    # Most titles are the description's own beginning.
    words = description if description.startswith(title) else f"{title}\n{description}"
    pairs: list[Pair] = [("client", words)] if words.strip() else []
    others = 0
    for message in items_of(record.get("chats"), "chats"):
        if message.get("type", "textMessage") != "textMessage":
            others += 1
            continue
        role = role_of(_ROLES, message.get("sender"))
        pairs.append((role, text_of(message.get("value"), "value")))
    return pairs, others


READER = Reader(
    "efaqa",
    "Emotional First Aid",
    ("efaqa-corpus-zh*", "*.utf8.gz", "*.jsonl", "*.jsonl.gz", "*.json", "*.json.gz"),
    _parse,
    one_per_file=False,
)
