"""Rules over normalised text: which clause says what, about whom, when, and whether it is denied.

The patterns and word lists are data (rules.yaml, documented there); this module is their grammar.
A pattern that matches is only a candidate: the words around it decide whether it is denied
("从没想过自杀"), about someone else ("我朋友说想死"), in a story ("电影里男主跳楼了") or over
("大学时想过死，现在好了"). Doubt goes to the client's safety: an unclear subject is the client.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import yaml

from milm_ray.serving.safety.config import Category
from milm_ray.serving.safety.normalize import BREAK

SIGNAL, MEDIUM, HIGH = 0, 1, 2
_LEVELS = {"signal": SIGNAL, "medium": MEDIUM, "high": HIGH}
_CONTEXT = (
    *("people", "prepositions", "reported", "to_me", "fiction", "past", "present", "recovered"),
    *("negation", "double_negation", "negation_after", "negation_inside", "rhetorical"),
    *("asked_how", "asked_how_not", "answer_yes", "answer_no", "answer_evasive"),
)
_SPLIT_REACH = 4  # client turns that an unfinished one ("我想") may be finished in


@dataclass(frozen=True, slots=True)
class Hit:
    """One rule found true: its level after context, its place in the scanned text.

    `sure`: it holds by itself; otherwise the classifier has a say (conversation.py).
    """

    rule: str
    category: Category
    level: int
    start: int
    end: int
    sure: bool = True


@dataclass(frozen=True, slots=True)
class Scan:
    """What one text says: the rules' hits and the signals in it."""

    hits: tuple[Hit, ...]
    signals: frozenset[str]


@dataclass(frozen=True, slots=True)
class Rule:
    id: str
    category: Category
    level: int
    sure: bool
    patterns: tuple[re.Pattern[str], ...]
    when: re.Pattern[str]
    about_anyone: bool
    negatable: bool
    past_lowers: bool
    in_story: str
    unless: re.Pattern[str] | None
    unless_turn: re.Pattern[str] | None


@dataclass(frozen=True, slots=True)
class Combo:
    id: str
    category: Category
    level: int
    needs: frozenset[str]


def expand_lexicon(entries: dict[str, str]) -> dict[str, str]:
    """Named patterns, each of which may use the ones before it as {name}."""
    lexicon: dict[str, str] = {}
    for name, pattern in entries.items():
        lexicon[name] = _expand(pattern, lexicon)
    return lexicon


def compile_pattern(pattern: str, lexicon: dict[str, str]) -> re.Pattern[str]:
    """A pattern of the data files: {name}, ~N (within a clause) and ~~N (across clauses)."""
    # ASCII: with Unicode word characters \b finds no border between a letter and a Han one.
    return re.compile(_expand(pattern, lexicon), re.ASCII)


def _expand(pattern: str, lexicon: dict[str, str]) -> str:
    pattern = re.sub(r"\{([a-z_]+)\}", lambda m: lexicon[m.group(1)], pattern)
    pattern = re.sub(r"~~(\d+)", r".{0,\1}", pattern)
    return re.sub(r"~(\d+)", rf"[^{BREAK}]{{0,\1}}", pattern)


class RuleBook:
    """rules.yaml, compiled. Build through `rule_book()`, which keeps one."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._lexicon = expand_lexicon(data["lexicon"])
        self._sure = frozenset(data["sure"].split())
        self.rules = tuple(self._rule(entry) for entry in data["rules"])
        self.combos = tuple(
            Combo(c["id"], c["category"], _LEVELS[c["level"]], frozenset(c["needs"]))
            for c in data["combos"]
        )
        self._signals = {name: self._compile(p) for name, p in data["signals"].items()}
        self._idioms = self._compile("|".join(f"(?:{p})" for p in data["idioms"]))
        self._asked = {category: self._compile(p) for category, p in data["asked"].items()}
        self._context = {name: self._compile(data[name]) for name in _CONTEXT}
        self._subject = self._compile(f"(?P<other>{data['people']})|(?P<self>我|俺|老子|本人|i )")
        self._before = self._compile(rf"(?:{data['prepositions']})$")
        self._denied = self._compile(rf"(?:{data['negation']})")
        self._affirmed = self._compile(rf"(?:{data['double_negation']})")

    def _compile(self, pattern: str) -> re.Pattern[str]:
        return compile_pattern(pattern, self._lexicon)

    def _rule(self, entry: dict[str, Any]) -> Rule:
        unknown = set(entry) - {
            *("id", "category", "level", "match", "subject", "negatable", "past", "fiction"),
            *("unless", "unless_turn", "when"),
        }
        if unknown:
            raise ValueError(f"rule {entry.get('id')}: unknown fields {sorted(unknown)}")
        return Rule(
            id=entry["id"],
            category=entry["category"],
            level=_LEVELS[entry["level"]],
            sure=entry["id"] in self._sure,
            patterns=tuple(self._compile(p) for p in entry["match"]),
            when=self._compile(entry.get("when") or self._letters(entry["match"])),
            about_anyone=entry.get("subject", "self") == "any",
            negatable=entry.get("negatable", True),
            past_lowers=entry.get("past", "drop") == "drop",
            in_story=entry.get("fiction", "drop"),
            unless=self._compile(entry["unless"]) if "unless" in entry else None,
            unless_turn=self._compile(entry["unless_turn"]) if "unless_turn" in entry else None,
        )

    @staticmethod
    def _letters(patterns: list[str]) -> str:
        """A pattern of an English rule needs a letter; any other may match anything."""
        return "" if re.search("[\u3400-\u9fff{]", "".join(patterns)) else "[a-z]{3}"

    def scan(self, text: str) -> Scan:
        """What one normalised text says, read alone."""
        text = self._idioms.sub(lambda m: "〇" * len(m.group()), text)
        story = self._context["fiction"].search(text) is not None
        hits: list[Hit] = []
        for rule in self.rules:
            if not rule.when.search(text):
                continue
            for match in itertools.chain.from_iterable(p.finditer(text) for p in rule.patterns):
                hit = self._weigh(rule, match, text, story)
                if hit is not None:
                    hits.append(hit)
                    break  # the first that stands is enough; one more adds nothing
        signals = frozenset(name for name, p in self._signals.items() if p.search(text))
        return Scan(tuple(hits), signals)

    def _weigh(self, rule: Rule, match: re.Match[str], text: str, story: bool) -> Hit | None:
        """The hit after its context, or None if the context explains it away."""
        start, end = match.start(), match.end()
        clause_start, clause_end = clause_span(text, start, end)
        clause = text[clause_start:clause_end]
        if rule.unless and rule.unless.search(clause):
            return None
        if rule.unless_turn and rule.unless_turn.search(text):
            return None
        prefix, suffix = text[clause_start:start], text[end:clause_end]
        if rule.negatable and self._is_denied(prefix, match.group(), suffix, text[end:]):
            return None
        if rule.level == SIGNAL:
            return Hit(rule.id, rule.category, SIGNAL, start, end, rule.sure)
        other = self._about_other(text, clause_start, prefix + match.group())
        if (
            story
            and rule.in_story != "keep"
            and (rule.in_story == "always" or other or "我" not in clause)
        ):
            return None
        level = rule.level
        if (other and not rule.about_anyone) or (
            rule.past_lowers and self._is_over(text, clause_start, end)
        ):
            level = MEDIUM
        return Hit(rule.id, rule.category, level, start, end, rule.sure)

    def _is_denied(self, prefix: str, matched: str, suffix: str, rest: str) -> bool:
        if self._ends_with(self._affirmed, prefix):
            return False
        if self._ends_with(self._denied, prefix):
            return True
        if self._context["rhetorical"].search(prefix + matched):
            return True
        # The match itself may open with subject and denial: 我没有自杀过.
        if self._context["negation_inside"].match(matched):
            return True
        return self._context["negation_after"].match(suffix or rest[:12]) is not None

    @staticmethod
    def _ends_with(pattern: re.Pattern[str], text: str) -> bool:
        tail = text[-40:]
        return any(m.end() == len(tail) and m.group() for m in pattern.finditer(tail))

    def _about_other(self, text: str, clause_start: int, said: str) -> bool:
        """Whether `said`, a clause up to the end of a match, is about someone but the client."""
        for mention in reversed(list(self._subject.finditer(said))):
            if mention.lastgroup == "self":
                before_me = range(max(0, mention.start() - 2), mention.start())
                if not any(self._context["to_me"].match(said, at) for at in before_me):
                    return False
            elif not self._before.search(said[: mention.start()]):
                return True
        if "我" in said or clause_start == 0:
            return False
        # 我室友最近不对劲，说想死: a clause without a subject continues a report about another.
        previous_start = text.rfind(BREAK, 0, clause_start - 1) + 1
        previous = text[previous_start : clause_start - 1]
        found = self._subject.search(previous)
        return bool(
            found
            and found.lastgroup == "other"
            and not self._before.search(previous[: found.start()])
            and (
                self._context["reported"].search(previous[found.end() :])
                or self._context["reported"].match(said)
            )
        )

    def _is_over(self, text: str, clause_start: int, end: int) -> bool:
        """Whether the match is told as past and nothing after it brings it to the present."""
        rest = text[end:]
        recovered = self._context["recovered"].search(rest)
        before = text[max(0, clause_start - 24) : end]
        past = self._context["past"].search(before)
        if not (past or recovered):
            return False
        now = self._context["present"].search(text[clause_start:end]) or self._context[
            "present"
        ].search(self._context["recovered"].sub("", rest))
        return not now

    def asked(self, question: str, answer: str) -> tuple[Hit, ...]:
        """A counselor's words about risk and the client's next ones ("有没有想过自杀?" - "有").

        The counselor's words alone are never the client's risk. A yes is; an answer that avoids
        the question is medium; a no, or anything else, is left to the rules on the answer itself.
        """
        context = self._context
        evasive = context["answer_evasive"].match(answer) is not None
        if not evasive and context["answer_no"].match(answer):
            return ()
        yes = context["answer_yes"].match(answer) is not None
        yes = yes or answer[:2] in question  # 打过你吗? - 打过
        if not answer or not (yes or evasive):
            return ()
        hits = []
        for category, pattern in self._asked.items():
            if pattern.search(question):
                level = MEDIUM if evasive else HIGH
                if level == HIGH and self._is_over(answer, 0, len(answer)):
                    level = MEDIUM
                hits.append(Hit(f"asked.{category}", category, level, 0, len(answer)))
                break
        return tuple(hits)

    def asked_how(self, question: str, answer: str) -> bool:
        """A counselor's question about method or plan, answered with anything but a no."""
        return bool(
            self._context["asked_how"].search(question)
            and not self._context["asked_how_not"].search(question)
            and not self._context["answer_no"].match(answer)
        )

    def combined(self, signals: Iterable[str]) -> tuple[Hit, ...]:
        """Alarms from signals of several kinds anywhere in the history."""
        present = frozenset(signals)
        return tuple(
            Hit(c.id, c.category, c.level, 0, 0) for c in self.combos if c.needs <= present
        )


def joins(turns: list[str]) -> list[str]:
    """Texts to scan for what is split over client turns: short neighbours and unfinished ones.

    "我想" / "从楼上跳下去", also with other turns in between; "自" / "杀" / "了" as one word.
    """
    joined = []
    for first, text in enumerate(turns):
        if not text or len(text) > 24:
            continue
        run = text
        for later in range(first + 1, min(first + 1 + _SPLIT_REACH, len(turns))):
            following = turns[later]
            if not following or len(following) > 40:
                continue
            joined.append(text + following)
            run += following
            if later > first + 1 and len(run) <= 60:
                joined.append(run)
    return joined


def clause_span(text: str, start: int, end: int) -> tuple[int, int]:
    """The span of the clauses that text[start:end] touches."""
    left = text.rfind(BREAK, 0, start) + 1
    right = text.find(BREAK, end)
    return left, len(text) if right < 0 else right


@lru_cache(maxsize=1)
def rule_book() -> RuleBook:
    source = resources.files(__package__).joinpath("rules.yaml").read_text(encoding="utf-8")
    return RuleBook(yaml.safe_load(source))
