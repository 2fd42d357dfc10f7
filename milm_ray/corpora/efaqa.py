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
# The codes of label.s1, the kind of trouble, as the corpus's page defines them.
_TOPICS = {
    "1.1": "学业烦恼、对未来规划的迷茫",
    "1.2": "事业和工作烦恼",
    "1.3": "家庭问题和矛盾",
    "1.4": "物质滥用",
    "1.5": "悲恸",
    "1.6": "失眠",
    "1.7": "压力",
    "1.8": "人际关系",
    "1.9": "情感关系问题",
    "1.10": "离婚",
    "1.11": "分手",
    "1.12": "自我探索",
    "1.13": "低自尊",
    "1.14": "青春期问题",
    "1.15": "强迫症",
    "1.16": "其它",
    "1.17": "LGBT",
    "1.18": "性问题",
    "1.19": "亲子关系",
}


def _parse(parsed: Parsed, text: str, limit: int | None) -> None:
    for number, record in json_records(parsed, text, limit):
        source_id = str(record.get("md5") or number)
        try:
            pairs, others = _thread(record)
            label = record.get("label")
            topic = _TOPICS.get(str(label.get("s1")), "") if isinstance(label, dict) else ""
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
