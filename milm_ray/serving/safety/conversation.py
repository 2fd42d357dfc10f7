"""The check of a conversation: `assess(history)`.

Levels. *high* stops motivational interviewing and shows help lines: present suicidal wish (also
an indirect or passive wish to be dead), intent, plan, means, attempt; a request for a method,
whatever the pretext; present self-harm; intent to hurt someone; being abused; a minor in danger;
a medical emergency; commanding voices or delusions; purging, starving. *medium* goes on with
help lines offered: ideation or abuse that is past, hopelessness, someone else at risk, anger at
the edge of violence, an evaded question. *none*: everything else, denials and figures of speech
included.

The whole history counts and the level never falls within it: a client who says "just kidding"
after a plan is not thereby safe. A counselor's words are context, never the client's risk.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from milm_ray.errors import UserError
from milm_ray.serving.safety.classifier import LONGEST, classifier
from milm_ray.serving.safety.config import CATEGORIES, Category, SafetyConfig
from milm_ray.serving.safety.normalize import BREAK, normalize
from milm_ray.serving.safety.rules import HIGH, MEDIUM, SIGNAL, Hit, Scan, joins, rule_book

Level = Literal["none", "medium", "high"]
_NAMES: dict[int, Level] = {SIGNAL: "none", MEDIUM: "medium", HIGH: "high"}
_WINDOW = 2000  # characters of a turn scanned at a time, with an overlap of a tenth
_REMEMBERED = 4096
_SHORTEST = 6  # characters that the classifier needs to have an opinion; a Latin word is two
_LATIN = re.compile("[a-z]+")
# Shown first when levels are equal: what can kill soonest, and is not covered by the other.
_ORDER = {category: rank for rank, category in enumerate(CATEGORIES)}


@dataclass(frozen=True, slots=True)
class Assessment:
    """What a history amounts to.

    category: of the most serious evidence, "none" at level none; categories: all found, the
    most serious first; evidence: ids of the rules that fired (never the client's text); score:
    0 to 1, for ordering and thresholds of a deployer's own; turn: index in `history` of the most
    serious turn, None at level none; minor: the client seems to be under 18.
    """

    level: Level = "none"
    category: Category | Literal["none"] = "none"
    categories: tuple[Category, ...] = ()
    evidence: tuple[str, ...] = ()
    score: float = 0.0
    turn: int | None = None
    minor: bool = False


class HistoryError(UserError, TypeError):
    """A history that is not a list of {"role": "client" | "counselor", "content": str}."""


@dataclass(slots=True)
class _Found:
    hits: list[tuple[int, Hit]] = field(default_factory=list)  # (turn index, hit)
    signals: set[str] = field(default_factory=set)


def assess(history: Sequence[Mapping[str, Any]], config: SafetyConfig | None = None) -> Assessment:
    """The risk in a conversation so far, from the client's words in the light of the counselor's.

    Any history is accepted, the empty one too. Raises HistoryError (a TypeError) where it is not
    a list of turns with a role "client" or "counselor" and a string content.
    """
    config = config or _DEFAULT
    turns = [_turn(index, turn) for index, turn in enumerate(_listed(history))]
    texts = [(role, normalize(content)) for role, content in turns]
    found = _Found()
    client = [index for index, (role, _) in enumerate(texts) if role == "client"]
    for index in client:
        _add(found, index, _scan(texts[index][1], config))
    _add_answers(found, texts)
    for joined in joins([texts[index][1] for index in client]):
        scan = _scan(joined, config)
        found.hits += [(client[-1], hit) for hit in scan.hits if hit.level == HIGH]
    if client:
        found.hits += [(client[-1], hit) for hit in rule_book().combined(found.signals)]
    return _conclude(found)


def _listed(history: Any) -> Sequence[Any]:
    if isinstance(history, str | bytes | Mapping) or not isinstance(history, Sequence):
        raise HistoryError(
            f"a history is a list of turns, not {type(history).__name__}",
            'pass [{"role": "client", "content": "…"}, …]',
        )
    return history


def _turn(index: int, turn: Any) -> tuple[str, str]:
    role = turn.get("role") if isinstance(turn, Mapping) else None
    if role not in ("client", "counselor") or not isinstance(turn.get("content"), str):
        raise HistoryError(
            f"turn {index} of the history is not a client's or counselor's turn",
            'a turn is {"role": "client" or "counselor", "content": a string}',
        )
    return role, turn["content"]


_DEFAULT = SafetyConfig()
_memory: OrderedDict[bytes, tuple[Scan, float, float, Category]] = OrderedDict()


def _scan(text: str, config: SafetyConfig) -> Scan:
    """Rules on one text, joined by the classifier where it sees more than they do.

    Remembered by digest, so that a growing history costs its newest turn only and no client's
    words stay in memory.
    """
    key = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
    known = _memory.get(key)
    if known is None:
        hits: list[Hit] = []
        signals: set[str] = set()
        rest: list[str] = []
        risk, high = 0.0, 0.0
        category: Category = CATEGORIES[0]
        for window in _windows(text, _WINDOW):
            scan = rule_book().scan(window)
            hits += scan.hits
            signals |= scan.signals
            # A denial or figure of speech was understood: the rest may say something else.
            rest += [clause for clause in scan.unexplained.split(BREAK) if "〇" not in clause]
        unexplained = BREAK.join(rest)
        if len(_LATIN.sub("__", unexplained)) >= _SHORTEST and not any(
            hit.level == HIGH for hit in hits
        ):
            opinions = [classifier().judge(window) for window in _windows(unexplained, LONGEST)]
            high = max(opinion.high for opinion in opinions)
            riskiest = max(opinions, key=lambda opinion: opinion.risk)
            risk, category = riskiest.risk, riskiest.category
        known = (Scan(tuple(hits), frozenset(signals), ""), risk, high, category)
        _memory[key] = known
        if len(_memory) > _REMEMBERED:
            _memory.popitem(last=False)
    scan, risk, high, category = known
    if high >= config.classifier_high:
        level = HIGH
    elif risk >= config.classifier_medium:
        level = MEDIUM
    else:
        return scan
    if any(hit.level >= level for hit in scan.hits):
        return scan
    return Scan((*scan.hits, Hit("classifier", category, level, 0, len(text))), scan.signals, "")


def _windows(text: str, size: int) -> list[str]:
    """`text` in pieces of `size` characters that overlap by a tenth."""
    return [text[at : at + size] for at in range(0, max(len(text), 1), size - size // 10)]


def _add(found: _Found, index: int, scan: Scan) -> None:
    found.hits += [(index, hit) for hit in scan.hits]
    found.signals |= scan.signals


def _add_answers(found: _Found, texts: list[tuple[str, str]]) -> None:
    """A client's answers to a counselor's questions about risk, and about its method or plan."""
    book = rule_book()
    for index in range(1, len(texts)):
        (asker, question), (answerer, answer) = texts[index - 1], texts[index]
        if (asker, answerer) != ("counselor", "client"):
            continue
        hits = book.asked(question, answer)
        found.hits += [(index, hit) for hit in hits]
        earlier = any(hit.category == "suicide" and hit.level > SIGNAL for _, hit in found.hits)
        if not hits and book.asked_how(question, answer) and earlier:
            found.hits.append((index, Hit("asked.how", "suicide", HIGH, 0, len(answer))))


def _conclude(found: _Found) -> Assessment:
    minor = any(hit.category == "minors" for _, hit in found.hits)
    alarms = [(index, hit) for index, hit in found.hits if hit.level > SIGNAL]
    if not alarms:
        return Assessment(minor=minor)
    alarms.sort(key=lambda alarm: (-alarm[1].level, _ORDER[alarm[1].category], alarm[0]))
    turn, worst = alarms[0]
    rules = dict.fromkeys(hit.rule for _, hit in alarms)
    score = (0.5 if worst.level == MEDIUM else 0.8) + min(0.19, 0.04 * (len(rules) - 1))
    return Assessment(
        level=_NAMES[worst.level],
        category=worst.category,
        categories=tuple(dict.fromkeys(hit.category for _, hit in alarms)),
        evidence=tuple(rules),
        score=round(score, 3),
        turn=turn,
        minor=minor,
    )
