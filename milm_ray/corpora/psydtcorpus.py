"""PsyDTCorpus: JSON lists of {id, normalizedTag, messages: [{role, content}]}.

The train file holds whole dialogues. The test file (`…_test_single_turn_split.json`) holds one
record per round, each repeating the messages before it: of such growing prefixes only the longest
is a dialogue.
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

_ROLES: dict[str, Role] = {"user": "client", "assistant": "counselor"}


def _parse(parsed: Parsed, text: str, limit: int | None) -> None:
    # The two files number their records separately.
    prefix = "test-" if "_test_" in parsed.name.rpartition("/")[2] else ""
    found: list[tuple[str, list[Pair], str, dict[str, int]]] = []
    for number, record in json_records(parsed, text, limit):
        identity = record.get("id")
        source_id = f"{prefix}{number if identity is None else identity}"
        try:
            pairs, systems = _messages(record)
            topic = text_of(record.get("normalizedTag"), "normalizedTag").strip()
        except Unusable as error:
            parsed.reject(error.reason, source_id, f"record {number}: {error.detail}", str(record))
            continue
        found.append((source_id, pairs, topic, {"system_messages_dropped": systems}))

    continued = {
        hash(tuple(pairs[:length])) for _, pairs, _, _ in found for length in range(1, len(pairs))
    }
    for source_id, pairs, topic, repaired in found:
        if pairs and hash(tuple(pairs)) in continued:
            parsed.repair("prefixes_of_a_longer_record_dropped", source_id)
        else:
            parsed.add(source_id, pairs, topic, {k: n for k, n in repaired.items() if n})


def _messages(record: dict[str, Any]) -> tuple[list[Pair], int]:
    """The dialogue's pairs and the number of system messages, which are instructions to a model."""
    messages = items_of(record.get("messages"), "messages")
    spoken = [message for message in messages if message.get("role") != "system"]
    pairs: list[Pair] = [
        (role_of(_ROLES, message.get("role")), text_of(message.get("content"), "content"))
        for message in spoken
    ]
    return pairs, len(messages) - len(spoken)


READER = Reader(
    "psydtcorpus",
    "PsyDTCorpus",
    ("PsyDTCorpus_*.json", "PsyDTCorpus_*.json.gz", "*.json", "*.json.gz"),
    _parse,
    one_per_file=False,
)
