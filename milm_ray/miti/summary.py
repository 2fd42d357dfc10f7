"""MITI summary scores of one dialogue, their thresholds, and their distribution in a group.

Source: MITI 4.2.1 (summary scores and the Fair and Good thresholds, which its authors derived
from expert opinion); the MI-adherent ratio is the paper's own addition, which the manual left
out of version 4.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from milm_ray.errors import UserError
from milm_ray.miti.coding_scheme import CODE_NAMES, GLOBAL_NAMES, MI_ADHERENT, MI_NON_ADHERENT

MEASURES = (
    "technical_global",
    "relational_global",
    "complex_reflection_ratio",
    "reflection_to_question",
    "total_mia",
    "total_mina",
    "mia_ratio",
)
# Fair and Good; the manual sets none for the other measures.
THRESHOLDS: dict[str, tuple[float, float]] = {
    "relational_global": (3.5, 4.0),
    "technical_global": (3.0, 4.0),
    "complex_reflection_ratio": (0.4, 0.5),
    "reflection_to_question": (1.0, 2.0),
}
# The codes that a measure is made of: a coder who does not give them all leaves it undefined.
NEEDS: dict[str, tuple[str, ...]] = {
    "complex_reflection_ratio": ("simple_reflection", "complex_reflection"),
    "reflection_to_question": ("simple_reflection", "complex_reflection", "question"),
    "total_mia": MI_ADHERENT,
    "total_mina": MI_NON_ADHERENT,
    "mia_ratio": (*MI_ADHERENT, *MI_NON_ADHERENT),
}
# What each ratio divides by what: sums of these codes.
RATIOS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "complex_reflection_ratio": (
        ("complex_reflection",),
        ("simple_reflection", "complex_reflection"),
    ),
    "reflection_to_question": (("simple_reflection", "complex_reflection"), ("question",)),
    "mia_ratio": (MI_ADHERENT, (*MI_ADHERENT, *MI_NON_ADHERENT)),
}
_HALF = 0.5
_UNDEFINED = {
    "technical_global": "needs cultivating_change_talk and softening_sustain_talk",
    "relational_global": "needs partnership and empathy",
    "complex_reflection_ratio": "no reflection was coded",
    "reflection_to_question": "no question was coded",
    "mia_ratio": "no MI-adherent or MI-non-adherent behaviour was coded",
}


class CodingError(UserError, ValueError):
    """Counts or global scores that no MITI coding can hold."""


def summary_scores(
    counts: Mapping[str, float], global_scores: Mapping[str, float | None]
) -> dict[str, float | None]:
    """The summary scores of one coding.

    counts: by code (`coding_scheme.CODE_NAMES`), whole numbers or coders' means; a code that is
    absent was never given and counts 0. global_scores: by name, 1 to 5, coders' means allowed.

    Returns technical_global and relational_global (1 to 5), complex_reflection_ratio
    CR / (SR + CR) and mia_ratio MIA / (MIA + MINA) as fractions, reflection_to_question
    (SR + CR) / Q, and the totals total_mia (seek, affirm, emphasize autonomy) and total_mina
    (confront, persuade). What is undefined is None: a ratio over nothing, or a global score whose
    two parts are not both given; `undefined_reasons` says why.
    Raises CodingError naming every unknown name and impossible value.
    """
    _check(counts, global_scores)
    mia = sum(counts.get(code, 0) for code in MI_ADHERENT)
    mina = sum(counts.get(code, 0) for code in MI_NON_ADHERENT)
    complex_ = counts.get("complex_reflection", 0)
    reflections = counts.get("simple_reflection", 0) + complex_
    return {
        "technical_global": _mean(
            global_scores, "cultivating_change_talk", "softening_sustain_talk"
        ),
        "relational_global": _mean(global_scores, "partnership", "empathy"),
        "complex_reflection_ratio": _ratio(complex_, reflections),
        "reflection_to_question": _ratio(reflections, counts.get("question", 0)),
        "total_mia": mia,
        "total_mina": mina,
        "mia_ratio": _ratio(mia, mia + mina),
    }


def undefined_reasons(scores: Mapping[str, float | None]) -> dict[str, str]:
    """For each summary score that is None, why."""
    return {name: _UNDEFINED[name] for name, value in scores.items() if value is None}


def standing(measure: str, value: float | None) -> str | None:
    """'good', 'fair' or 'below' by the manual's thresholds; None where it sets none."""
    if measure not in THRESHOLDS or value is None:
        return None
    fair, good = THRESHOLDS[measure]
    return "good" if value >= good else "fair" if value >= fair else "below"


def _check(counts: Mapping[str, float], global_scores: Mapping[str, float | None]) -> None:
    faults = [f"unknown code {name!r}" for name in counts if name not in CODE_NAMES]
    faults += [
        f"unknown global score {name!r}" for name in global_scores if name not in GLOBAL_NAMES
    ]
    for name, value in counts.items():
        if not _is_number(value) or value < 0:
            faults.append(f"{name} is {value!r}; a count is a number from 0 up")
    for name, score in global_scores.items():
        if score is not None and not (_is_number(score) and 1 <= score <= 5):
            faults.append(f"{name} is {score!r}; a global score lies from 1 to 5")
    if faults:
        raise CodingError(
            "this coding cannot be summarised: " + "; ".join(faults),
            f"codes: {', '.join(CODE_NAMES)}; global scores: {', '.join(GLOBAL_NAMES)}",
        )


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float | np.integer | np.floating)
    return number and not isinstance(value, bool) and math.isfinite(value)


def _mean(scores: Mapping[str, float | None], first: str, second: str) -> float | None:
    a, b = scores.get(first), scores.get(second)
    return None if a is None or b is None else (a + b) / 2


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


@dataclass(frozen=True)
class Coding:
    """One coder's result for one dialogue.

    counts by code and global scores by name, as `summary_scores` takes them; group is the arm
    (a model, real dialogues); rounds is the dialogue's number of rounds, 0 when unknown;
    automatic marks a model's coding, which is never pooled with people's; scope names the codes
    that this coder gives at all: the others have no count, which is not a count of 0.
    """

    dialogue_id: str
    coder: str
    group: str
    counts: Mapping[str, float]
    global_scores: Mapping[str, float | None] = field(default_factory=dict)
    rounds: int = 0
    automatic: bool = False
    scope: tuple[str, ...] = CODE_NAMES

    def __post_init__(self) -> None:
        _check(self.counts, self.global_scores)

    def count(self, code: str) -> float | None:
        """How often a code was given; None for one that this coder does not give."""
        return self.counts.get(code, 0) if code in self.scope else None

    def scores(self) -> dict[str, float | None]:
        """`summary_scores`; None also where a measure needs codes outside the coder's scope.

        And, of automatic expected counts, a ratio over what is expected less than half a time:
        rounded, that is 0.
        """
        found = summary_scores(self.counts, self.global_scores)
        return {
            measure: None if self._undefined(measure) else value for measure, value in found.items()
        }

    def _undefined(self, measure: str) -> bool:
        if not set(NEEDS.get(measure, ())) <= set(self.scope):
            return True
        if not self.automatic or measure not in RATIOS:
            return False
        return sum(self.counts.get(code, 0) for code in RATIOS[measure][1]) < _HALF


class Spread(NamedTuple):
    """A measure over the dialogues of a group where it is defined."""

    n: int
    mean: float | None
    sd: float | None
    median: float | None
    q1: float | None
    q3: float | None


@dataclass(frozen=True)
class GroupSummary:
    """What a table says of one group.

    counts, per_round, global_scores and measures are spreads over dialogues, each with its own
    n (a ratio may be undefined for some). pooled holds the ratios of the summed counts: they
    weigh a long dialogue more than the mean of ratios does, and the two can differ much.
    """

    group: str
    dialogues: int
    codings: int
    automatic: bool
    counts: dict[str, Spread]
    per_round: dict[str, Spread]
    global_scores: dict[str, Spread]
    measures: dict[str, Spread]
    pooled: dict[str, float | None]


def summarise_group(codings: Sequence[Coding]) -> GroupSummary:
    """Spreads and pooled ratios of one group; coders of a dialogue are averaged first.

    Raises CodingError when the codings are of more than one group, mix people's and automatic
    ones, or hold the same coder twice for a dialogue.
    """
    _check_group(codings)
    dialogues = _average_coders(codings)
    scores = [d.scores() for d in dialogues]
    totals = {c: math.fsum(d.counts.get(c, 0) for d in dialogues) for c in CODE_NAMES}
    pooled = Coding("", "", "", totals, scope=dialogues[0].scope).scores()
    with_rounds = [d for d in dialogues if d.rounds]
    return GroupSummary(
        group=codings[0].group,
        dialogues=len(dialogues),
        codings=len(codings),
        automatic=codings[0].automatic,
        counts={c: spread([d.count(c) for d in dialogues]) for c in CODE_NAMES},
        per_round={
            c: spread([_per_round(d.count(c), d.rounds) for d in with_rounds]) for c in CODE_NAMES
        },
        global_scores={
            g: spread([d.global_scores.get(g) for d in dialogues]) for g in GLOBAL_NAMES
        },
        measures={m: spread([s[m] for s in scores]) for m in MEASURES},
        pooled={m: pooled[m] for m in RATIOS},
    )


def dialogue_values(codings: Sequence[Coding]) -> dict[str, list[float | None]]:
    """Per code, global score and summary score one value for each dialogue, None if undefined.

    Coders of a dialogue are averaged first; dialogues stand in the order of their first coding.
    Raises CodingError as `summarise_group` does.
    """
    _check_group(codings)
    dialogues = _average_coders(codings)
    scores = [d.scores() for d in dialogues]
    return {
        **{c: [d.count(c) for d in dialogues] for c in CODE_NAMES},
        **{g: [d.global_scores.get(g) for d in dialogues] for g in GLOBAL_NAMES},
        **{m: [s[m] for s in scores] for m in MEASURES},
    }


def ratio_parts(codings: Sequence[Coding], ratio: str) -> np.ndarray | None:
    """Dialogues × (upper, lower part) of a ratio, coders averaged; None outside the coders' scope.

    The pooled ratio is that of the column sums. Raises CodingError as `summarise_group` does.
    """
    _check_group(codings)
    if not set(NEEDS[ratio]) <= set(codings[0].scope):
        return None
    return np.array(
        [
            [sum(d.counts.get(code, 0) for code in part) for part in RATIOS[ratio]]
            for d in _average_coders(codings)
        ],
        float,
    )


def _per_round(count: float | None, rounds: int) -> float | None:
    return None if count is None else count / rounds


def table_rows(summaries: Sequence[GroupSummary]) -> list[dict[str, Any]]:
    """Group summaries as the rows of one long table, ready for a CSV file.

    One row per group and variable: coder ("human" or "automatic"), kind (count, per round,
    global score or summary score), n, mean, sd, median, q1, q3, pooled, and the standing of the
    mean by the manual's thresholds where it sets any.
    """
    rows = []
    for summary in summaries:
        kinds = (
            ("count", summary.counts),
            ("count per round", summary.per_round),
            ("global score", summary.global_scores),
            ("summary score", summary.measures),
        )
        for kind, spreads in kinds:
            for name, found in spreads.items():
                is_measure = kind == "summary score"
                rows.append(
                    {
                        "group": summary.group,
                        "coder": "automatic" if summary.automatic else "human",
                        "kind": kind,
                        "variable": name,
                        **found._asdict(),
                        "pooled": summary.pooled.get(name) if is_measure else None,
                        "standing": standing(name, found.mean) if is_measure else None,
                    }
                )
    return rows


def spread(values: Sequence[float | None]) -> Spread:
    """n, mean, sample standard deviation, median and quartiles of the values that are not None.

    Quartiles interpolate linearly (numpy's default, R's type 7).
    """
    kept = np.array([v for v in values if v is not None], float)
    if not len(kept):
        return Spread(0, None, None, None, None, None)
    q1, median, q3 = np.percentile(kept, [25, 50, 75])
    sd = float(kept.std(ddof=1)) if len(kept) > 1 else None
    return Spread(len(kept), float(kept.mean()), sd, float(median), float(q1), float(q3))


def _check_group(codings: Sequence[Coding]) -> None:
    if not codings:
        raise CodingError("no codings to summarise", "code at least one dialogue of the group")
    groups = sorted({c.group for c in codings})
    if len(groups) > 1:
        raise CodingError(
            f"codings of several groups: {', '.join(groups)}", "summarise one group at a time"
        )
    if len({c.automatic for c in codings}) > 1:
        raise CodingError(
            f"group {groups[0]} mixes people's and automatic codings",
            "summarise the two apart; automatic codes are not a stand-in for a coder",
        )
    if len({c.scope for c in codings}) > 1:
        raise CodingError(
            f"group {groups[0]} mixes coders who give different sets of codes",
            "summarise them apart",
        )
    pairs = [(c.dialogue_id, c.coder) for c in codings]
    twice = sorted({p for p in pairs if pairs.count(p) > 1})
    if twice:
        named = ", ".join(f"{coder} on {dialogue}" for dialogue, coder in twice)
        raise CodingError(f"coded twice: {named}", "keep one coding per coder and dialogue")


def _average_coders(codings: Sequence[Coding]) -> list[Coding]:
    """One coding per dialogue: the coders' mean counts and mean global scores."""
    by_dialogue: dict[str, list[Coding]] = {}
    for coding in codings:
        by_dialogue.setdefault(coding.dialogue_id, []).append(coding)
    averaged = []
    for dialogue_id, group in by_dialogue.items():
        counts = {c: math.fsum(g.counts.get(c, 0) for g in group) / len(group) for c in CODE_NAMES}
        globals_: dict[str, float | None] = {
            name: spread([g.global_scores.get(name) for g in group]).mean for name in GLOBAL_NAMES
        }
        first = group[0]
        averaged.append(
            Coding(
                dialogue_id,
                "mean" if len(group) > 1 else first.coder,
                first.group,
                counts,
                globals_,
                max(g.rounds for g in group),
                first.automatic,
                first.scope,
            )
        )
    return averaged
