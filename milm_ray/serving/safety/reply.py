"""The check of what the model is about to say, and the guard that holds a stream back for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any, Literal

import yaml

from milm_ray.serving.safety.config import SafetyConfig
from milm_ray.serving.safety.normalize import normalize
from milm_ray.serving.safety.numbers import digits, invents_number
from milm_ray.serving.safety.rules import clause_span, compile_pattern, expand_lexicon

Kind = Literal[
    "diagnosis",
    "drug",
    "dose",
    "cure_promise",
    "self_harm_method",
    "encourages_harm",
    "claims_human",
    "hours_promise",
    "unknown_number",
]
_CONTEXT = 2  # released sentences re-read with the next, for what is said across a full stop


@dataclass(frozen=True, slots=True)
class Violation:
    """Why a reply must not be shown. rule: `<kind>.<n>`, the pattern's place in reply.yaml."""

    kind: Kind
    rule: str


@dataclass(frozen=True, slots=True)
class _ReplyRule:
    kind: Kind
    patterns: tuple[re.Pattern[str], ...]
    unless: re.Pattern[str] | None
    unless_before: re.Pattern[str] | None


@lru_cache(maxsize=1)
def _rules() -> tuple[_ReplyRule, ...]:
    source = resources.files(__package__).joinpath("reply.yaml").read_text(encoding="utf-8")
    data: dict[str, Any] = yaml.safe_load(source)
    lexicon = expand_lexicon(data["lexicon"])
    return tuple(
        _ReplyRule(
            kind=entry["kind"],
            patterns=tuple(compile_pattern(p, lexicon) for p in entry["match"]),
            unless=_excuse(entry, "unless", lexicon),
            unless_before=_excuse(entry, "unless_before", lexicon),
        )
        for entry in data["rules"]
    )


def _excuse(entry: dict[str, Any], name: str, lexicon: dict[str, str]) -> re.Pattern[str] | None:
    return compile_pattern(entry[name], lexicon) if name in entry else None


def check_reply(text: str, config: SafetyConfig | None = None) -> list[Violation]:
    """Why `text` must not be shown to a client; empty when it may.

    A diagnosis, a drug's name, a dose, a promise of cure, a method of self-harm, encouragement of
    harm, a claim to be human, a promise of a help line's hours, a number to call that is not in
    the configuration. A reply with any of these is replaced, not edited.
    """
    folded = normalize(text, mixed=False)
    found = []
    for rule in _rules():
        for number, pattern in enumerate(rule.patterns, 1):
            if any(_stands(rule, match, folded) for match in pattern.finditer(folded)):
                found.append(Violation(rule.kind, f"{rule.kind}.{number}"))
    known = {digits(line.number) for line in (config or SafetyConfig()).help_lines}
    if invents_number(text, known):
        found.append(Violation("unknown_number", "unknown_number.1"))
    return found


def _stands(rule: _ReplyRule, match: re.Match[str], text: str) -> bool:
    start, end = clause_span(text, match.start(), match.end())
    if rule.unless_before and rule.unless_before.search(text[start : match.end()]):
        return False
    return not (rule.unless and rule.unless.search(text[start:end]))


class SentenceGuard:
    """Holds a streamed reply back until whole sentences have passed the check.

    ```
    guard = SentenceGuard()
    for chunk in stream:
        yield guard.feed(chunk)      # "" while a sentence is incomplete
    yield guard.finish()             # the rest, once the stream has ended
    ```
    From the first violation on nothing more is released: `violations` says why, and the caller
    replaces the reply. For a safe reply the released pieces join to exactly the text fed in.
    """

    def __init__(
        self,
        config: SafetyConfig | None = None,
        check: Callable[[str, SafetyConfig | None], list[Violation]] = check_reply,
    ) -> None:
        self._config = config
        self._check = check
        self._held = ""
        self._released: list[str] = []
        self.violations: list[Violation] = []

    @property
    def blocked(self) -> bool:
        return bool(self.violations)

    def feed(self, chunk: str) -> str:
        """Take the next piece of the stream; return what may be shown now."""
        if self.blocked:
            return ""
        self._held += chunk
        *complete, self._held = sentences(self._held)
        return self._release(complete)

    def finish(self) -> str:
        """The stream has ended: check and return what is still held."""
        if self.blocked:
            return ""
        rest, self._held = self._held, ""
        return self._release([rest] if rest else [])

    def _release(self, complete: list[str]) -> str:
        shown = []
        for sentence in complete:
            self.violations = self._check(
                "".join(self._released[-_CONTEXT:]) + sentence, self._config
            )
            if self.violations:
                self._held = ""
                break
            self._released = [*self._released[-_CONTEXT:], sentence]
            shown.append(sentence)
        return "".join(shown)


_SENTENCE_END = re.compile(r"[。！？!?…\n]+[”’」』）)\"']*(?=[^。！？!?…\n”’」』）)\"'])|\.(?=\s)")


def sentences(text: str) -> list[str]:
    """`text` cut after each sentence end that is certain; the last piece may be incomplete.

    Joined, the pieces are `text` again. A mark at the very end is not certain yet: "？" may be
    followed by "！" or a closing quote, and "0." by "5 mg".
    """
    pieces = []
    start = 0
    for match in _SENTENCE_END.finditer(text):
        pieces.append(text[start : match.end()])
        start = match.end()
    return [*pieces, text[start:]]
