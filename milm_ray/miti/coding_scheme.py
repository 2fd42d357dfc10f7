"""Behaviour codes, parsing rules and global scores of MITI 4.2.1, in our own words.

Source: Moyers, Manuel and Ernst, Motivational Interviewing Treatment Integrity coding manual
4.2.1. The manual itself is not reproduced; coders train with it, and what stands here reminds
them of its decisions while they work.

A *volley* is a counsellor's uninterrupted speech. An *utterance* is one complete thought inside
it and carries at most one code.
"""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

MAX_CODES_PER_VOLLEY = 8


@dataclass(frozen=True)
class Code:
    """One behaviour code. `short` is what coders write in a sheet."""

    name: str
    short: str
    label: str
    meaning: str
    rule: str


@dataclass(frozen=True)
class GlobalScore:
    """One global score; anchors[0] is the text for a 1, anchors[4] for a 5."""

    name: str
    label: str
    anchors: tuple[str, str, str, str, str]
    note: str = ""


CODES: tuple[Code, ...] = (
    Code(
        "gi",
        "GI",
        "Giving information",
        "Neutral facts, feedback or an opinion, without pushing for a change.",
        "Between information and persuasion, take information. Announcing the structure of the "
        "talk is not coded.",
    ),
    Code(
        "persuade",
        "PERS",
        "Persuade",
        "An open attempt to change the client's mind or conduct, such as advice, arguments or "
        "self-disclosure with that aim, with nothing nearby that leaves the choice to the client.",
        "The bar is high: when it could be information, it is information.",
    ),
    Code(
        "persuade_with_permission",
        "PWP",
        "Persuade with permission",
        "The same attempt after the client asked for it, gave leave, or with words close by that "
        "stress the client's own choice.",
        "Beats Persuade within one utterance. Permission can last for some minutes.",
    ),
    Code(
        "question",
        "Q",
        "Question",
        "Any question, open or closed.",
        "All questions of a volley together are one Q. A statement that leads up to the question "
        "is not a reflection.",
    ),
    Code(
        "simple_reflection",
        "SR",
        "Simple reflection",
        "Gives back what the client said and adds little or nothing.",
        "Between simple and complex, take simple. Not coded in a volley with a complex reflection.",
    ),
    Code(
        "complex_reflection",
        "CR",
        "Complex reflection",
        "Adds substantial meaning, feeling or emphasis to what the client said.",
        "One complex reflection makes all reflections of the volley a single CR.",
    ),
    Code(
        "affirm",
        "AF",
        "Affirm",
        "Names a particular strength, effort or intention of this client.",
        "Beats CR. General praise or support is not coded; if in doubt, do not code. After two or "
        "three repeats it usually no longer counts.",
    ),
    Code(
        "seek",
        "SEEK",
        "Seek collaboration",
        "Truly shares power: asks leave, asks for consensus or for the client's view of the way "
        "forward.",
        "Asking what the client knows is a Q. If in doubt, do not code.",
    ),
    Code(
        "emphasize_autonomy",
        "EMPH",
        "Emphasize autonomy",
        "Says plainly that decision or responsibility for change lies with the client.",
        "Confidence that the client can do it is not autonomy.",
    ),
    Code(
        "confront",
        "CON",
        "Confront",
        "Disagrees, corrects, shames, warns or moralises at the client.",
        "Beats Persuade and Q. In doubt against a reflection, do not code.",
    ),
)

GLOBALS: tuple[GlobalScore, ...] = (
    GlobalScore(
        "cultivating_change_talk",
        "Cultivating change talk",
        (
            "Takes no notice of what the client says in favour of change.",
            "Notices it now and then, and often passes chances by.",
            "Often picks it up, and still misses some chances.",
            "Picks it up consistently and encourages it.",
            "Works visibly to give it more depth, strength or momentum.",
        ),
        "A client who offers no change talk does not lower the score.",
    ),
    GlobalScore(
        "softening_sustain_talk",
        "Softening sustain talk",
        (
            "Keeps the talk on reasons against change.",
            "Usually explores the reasons against change.",
            "Leans toward the reasons against change, with some moves away from them.",
            "As a rule does not dwell on the reasons against change.",
            "Works visibly to lessen the weight of the reasons against change.",
        ),
        "Can be high when the client offers no reasons against change at all.",
    ),
    GlobalScore(
        "partnership",
        "Partnership",
        (
            "Plays the expert for most of the talk.",
            "Works together on the surface only.",
            "Includes the client half-heartedly or unevenly.",
            "Shares power, so that the client contributes.",
            "Lets the client's contribution truly shape the talk.",
        ),
    ),
    GlobalScore(
        "empathy",
        "Empathy",
        (
            "Pays hardly any attention to the client's view.",
            "Tries now and then, perhaps without hitting it.",
            "Tries to understand, with modest success.",
            "Shows again and again a correct grasp of what the client says.",
            "Grasps also what the client means and has not said.",
        ),
    ),
)
GLOBAL_RULE = (
    "Name the behaviour to change before coding. Start from 3 and move up or down. Judge the "
    "whole segment. No 5 where poor practice stands out."
)

CODE_NAMES: tuple[str, ...] = tuple(code.name for code in CODES)
GLOBAL_NAMES: tuple[str, ...] = tuple(score.name for score in GLOBALS)
MI_ADHERENT: tuple[str, ...] = ("seek", "affirm", "emphasize_autonomy")
MI_NON_ADHERENT: tuple[str, ...] = ("confront", "persuade")
_BY_TOKEN = {token: code.name for code in CODES for token in (code.name, code.short.lower())}


def code_name(text: str) -> str | None:
    """The code that a coder wrote, by name or by short form in any case; None when unknown."""
    plain = unicodedata.normalize("NFKC", text)  # a Chinese keyboard's full-width letters too
    return _BY_TOKEN.get(plain.strip().lower().replace(" ", "_").replace("-", "_"))


def volley_faults(codes: Iterable[str]) -> list[str]:
    """What in the codes of one volley the parsing rules forbid; empty when all is well.

    `codes` are code names, one per coded utterance of the volley.
    """
    codes = list(codes)
    faults = [f"unknown code {code!r}" for code in codes if code not in CODE_NAMES]
    known = [code for code in codes if code in CODE_NAMES]
    faults += [
        f"{code} is coded {known.count(code)} times; each code counts once per volley"
        for code in CODE_NAMES
        if known.count(code) > 1
    ]
    if "complex_reflection" in known and "simple_reflection" in known:
        faults.append("simple_reflection beside complex_reflection; keep the complex one only")
    if len(known) > MAX_CODES_PER_VOLLEY:
        faults.append(f"{len(known)} codes; a volley holds at most {MAX_CODES_PER_VOLLEY}")
    return faults


def apply_volley_rules(codes: Iterable[str]) -> list[str]:
    """The codes of a volley as the rules count them: once each, CR instead of SR, at most 8.

    For labels that were made without the rules in mind (another scheme, a model). Codes keep the
    order in which they first occur. Raises ValueError on an unknown code.
    """
    kept = list(dict.fromkeys(codes))
    unknown = [code for code in kept if code not in CODE_NAMES]
    if unknown:
        raise ValueError(f"unknown codes: {', '.join(map(repr, unknown))}")
    if "complex_reflection" in kept and "simple_reflection" in kept:
        kept.remove("simple_reflection")
    return kept[:MAX_CODES_PER_VOLLEY]
