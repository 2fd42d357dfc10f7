"""CPsyCounD: one text file per dialogue, `来访者：…` and `心理咨询师：…` paragraphs.

Lines without a speaker go on with the turn before them, except narration: a whole line in
brackets, a rule or an ellipsis, a summary of what follows (后续…), and sentences about 来访者, whom
a counselor in the room would address. A client may be named (来访者1, 来访者（程女士）), and in
family sessions a relative speaks under another name: all these sit on the client's side.
"""

from __future__ import annotations

import re
from collections import Counter

from milm_ray.corpora.reading import Pair, Parsed, Reader, Unusable, stem
from milm_ray.schema import Role

_ROLES: dict[str, Role] = {
    "来访者": "client",
    "咨询者": "client",
    "求助者": "client",
    "心理咨询师": "counselor",
    "咨询师": "counselor",
}
_SPEAKER = re.compile(
    rf"(?P<name>{'|'.join(_ROLES)})(?P<note>\d{{0,2}}(?:[（(][^）)]{{1,12}}[）)])?)\s*[：:]"
)
_RELATIVE = re.compile(r"(?P<name>[A-Z\u4e00-\u9fff]{1,6})\s*[：:]")
_BRACKETED = re.compile(r"[.…。\s]*[（(【\[].*[）)】\]][.…。\s]*")
_PUNCTUATION = re.compile(r"[\W_]+")
_NARRATION = re.compile(r"后续|(?!\d).*来访者")


def _parse(parsed: Parsed, text: str, limit: int | None) -> None:
    pairs: list[tuple[Role, list[str]]] = []
    repaired: Counter[str] = Counter()
    new_paragraph = True
    for line in text.splitlines():
        line = line.strip()
        if not line:
            new_paragraph = True
            continue
        if match := _SPEAKER.match(line):
            pairs.append((_ROLES[match["name"]], [line[match.end() :].strip()]))
            repaired["speaker_notes_dropped"] += bool(match["note"])
        elif _BRACKETED.fullmatch(line) or _PUNCTUATION.fullmatch(line):
            repaired["narration_lines_dropped"] += 1
        elif pairs and new_paragraph and (match := _RELATIVE.match(line)):
            pairs.append(("client", [line[match.end() :].strip()]))
            repaired["third_speakers_taken_as_client"] += 1
        elif _NARRATION.match(line):
            repaired["narration_lines_dropped"] += 1
        elif pairs:
            pairs[-1][1].append(line)
        else:
            repaired["lines_before_the_first_speaker_dropped"] += 1
        new_paragraph = False
    if not pairs:
        raise Unusable("unknown_speaker", "no line begins with 来访者： or 心理咨询师：", text)
    joined: list[Pair] = [(role, "\n".join(lines)) for role, lines in pairs]
    parsed.add(stem(parsed.name), joined, repaired={k: n for k, n in repaired.items() if n})


READER = Reader(
    "cpsycound", "CPsyCounD", ("case_*.txt", "*.txt", "*.txt.gz"), _parse, one_per_file=True
)
