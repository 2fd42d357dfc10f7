"""The check of a conversation: `assess(history)`.

Levels. *high* stops motivational interviewing and shows help lines: present suicidal wish (also
an indirect or passive wish to be dead), intent, plan, means, attempt; a request for a method,
whatever the pretext; present self-harm; intent to hurt someone; being abused; a minor in danger;
a medical emergency; commanding voices or delusions; purging, starving. *medium* goes on with
help lines offered: ideation or abuse that is past, hopelessness, someone else at risk, anger at
the edge of violence, an evaded question. *none*: everything else, denials and figures of speech
included.

The whole history counts, and the level never falls by what comes later. "Just kidding" after a
plan makes nobody safe, nor does another subject; and a word count cannot tell the change of a
subject from an explanation ("I am on the roof" … "hanging up the washing"), so that one stays, too.
A counselor's words are context, never the client's risk.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

from milm_ray.errors import UserError
from milm_ray.serving.safety.classifier import LONGEST, Opinion, classifier
from milm_ray.serving.safety.config import CATEGORIES, Category, SafetyConfig
from milm_ray.serving.safety.normalize import BREAK, normalize
from milm_ray.serving.safety.rules import (
    HIGH,
    MEDIUM,
    SIGNAL,
    Hit,
    Scan,
    clause_span,
    joins,
    rule_book,
)

_Known = TypeVar("_Known")
Level = Literal["none", "medium", "high"]
_NAMES: dict[int, Level] = {SIGNAL: "none", MEDIUM: "medium", HIGH: "high"}
_WINDOW = 2000  # characters of a turn scanned at a time, with an overlap of a tenth
_REMEMBERED = 4096
_SHORTEST = 6  # characters that the classifier must have; a Latin word or a number is two
TOGETHER = 3  # client turns that the classifier reads as one text
_PASSAGE = 25  # characters of a passage of a longer text
_AROUND = 20  # characters on both sides of a match's clause that the classifier is asked about
_RULE_ODDS = 3.0  # how much a rule that errs raises the classifier's odds
_PASSAGE_ODDS = 1 / 3  # what the odds of a passage out of its story count
_WORD_OR_NUMBER = re.compile("[0-9a-z]+")
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
        text = texts[index][1]
        scan, opinion = _read(text)
        _add(found, index, _weighed(scan, opinion, text, config))
    _add_answers(found, texts)
    said = [texts[index][1] for index in client]
    for last in range(1, len(said)):
        joined = BREAK.join(said[max(0, last + 1 - TOGETHER) : last + 1])
        opinion = _remembered(joined, said[last], partial(_opinion, joined, said[last]))
        found.hits += [(client[last], hit) for hit in _alarm(opinion, len(joined), config)]
    for joined in joins(said):
        scan = _read(joined)[0]
        hits = [hit for hit in scan.hits if _stands(hit, joined, config) == HIGH]
        found.hits += [(client[-1], hit) for hit in hits]
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
_memory: OrderedDict[bytes, Any] = OrderedDict()


def _remembered(text: str, answer: str, read: Callable[[], _Known]) -> _Known:
    """read(), kept by digest: a growing history costs its newest turn only, and no client's words
    stay in memory. With an answer the key is another one: the text was joined from turns."""
    written = "\n".join((text, answer)).encode("utf-8", "replace")
    key = hashlib.blake2b(written, digest_size=16).digest()
    if key not in _memory:
        _memory[key] = read()
        if len(_memory) > _REMEMBERED:
            _memory.popitem(last=False)
    known: _Known = _memory[key]
    return known


def _read(text: str) -> tuple[Scan, Opinion]:
    """What rules and classifier make of one text, before they are weighed against each other."""
    return _remembered(text, "", lambda: (_scan(text), _opinion(text)))


def _scan(text: str) -> Scan:
    hits: list[Hit] = []
    signals: set[str] = set()
    size = _WINDOW - _WINDOW // 10
    for number, window in enumerate(_windows(text, _WINDOW)):
        scan = rule_book().scan(window)
        at = number * size
        hits += [replace(hit, start=hit.start + at, end=hit.end + at) for hit in scan.hits]
        signals |= scan.signals
    return Scan(tuple(hits), frozenset(signals))


def _opinion(text: str, answer: str = "") -> Opinion:
    """The gravest opinion on a text and its passages, since a long story drowns one sentence.

    Of a text too short to judge: that all is well.
    """
    if len(_WORD_OR_NUMBER.sub("__", text)) < _SHORTEST:
        return Opinion(0.0, 0.0, CATEGORIES[0])
    opinions = [classifier().judge(window, answer) for window in _windows(text, LONGEST)]
    if len(text) > 2 * _PASSAGE and not answer:
        for passage in map(classifier().judge, _passages(text)):
            risk, high = passage.risk, _at_odds(passage.high, _PASSAGE_ODDS)
            opinions.append(Opinion(risk, high, passage.category))
    return max(opinions, key=lambda opinion: opinion.high)


def _stands(hit: Hit, text: str, config: SafetyConfig) -> int:
    """The level that a rule's hit keeps once the classifier was asked about the words around it.

    A sure rule needs nobody's word. One that errs is evidence: it raises the classifier's odds.
    """
    if hit.sure or hit.level == SIGNAL:
        return hit.level
    start, end = clause_span(text, hit.start, hit.end)
    around = text[max(0, start - _AROUND) : end + _AROUND]
    opinions = [classifier().judge(words) for words in dict.fromkeys((text[start:end], around))]
    high = _at_odds(max(o.high for o in opinions), _RULE_ODDS)
    if hit.level == HIGH and high >= config.classifier_high:
        return HIGH
    risk = _at_odds(max(o.risk for o in opinions), _RULE_ODDS)
    return MEDIUM if risk >= config.classifier_medium else SIGNAL


def _at_odds(probability: float, factor: float) -> float:
    """The probability whose odds are `factor` times these."""
    odds = factor * probability / max(1 - probability, 1e-9)
    return odds / (1 + odds)


def _weighed(scan: Scan, opinion: Opinion, text: str, config: SafetyConfig) -> Scan:
    hits = [replace(hit, level=_stands(hit, text, config)) for hit in scan.hits]
    worst = max((hit.level for hit in hits), default=SIGNAL)
    hits += [hit for hit in _alarm(opinion, len(text), config) if hit.level > worst]
    return Scan(tuple(hits), scan.signals)


def _alarm(opinion: Opinion, length: int, config: SafetyConfig) -> list[Hit]:
    """The classifier's own hit, where it is sure enough."""
    if opinion.high >= config.classifier_high:
        return [Hit("classifier", opinion.category, HIGH, 0, length)]
    if opinion.risk >= config.classifier_medium:
        return [Hit("classifier", opinion.category, MEDIUM, 0, length)]
    return []


def _windows(text: str, size: int) -> list[str]:
    """`text` in pieces of `size` characters that overlap by a tenth."""
    return [text[at : at + size] for at in range(0, max(len(text), 1), size - size // 10)]


def _passages(text: str) -> list[str]:
    """From each clause on, whole clauses of _PASSAGE characters together or a little more."""
    clauses = text.split(BREAK)
    passages = []
    for first in range(len(clauses)):
        last, size = first, len(clauses[first])
        while size < _PASSAGE and last + 1 < len(clauses):
            last += 1
            size += len(clauses[last])
        passages.append(BREAK.join(clauses[first : last + 1]))
        if last + 1 == len(clauses):
            break
    return list(dict.fromkeys(passages))


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
