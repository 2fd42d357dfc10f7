"""The study's tables in the paper's shape, as plain rows that a page or a CSV can show."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from milm_ray.miti import paper_study
from milm_ray.miti.coding_scheme import CODES, GLOBAL_NAMES, GLOBALS
from milm_ray.miti.comparison import Estimate, compare, compare_pooled, pooled_ratio
from milm_ray.miti.packet import Item
from milm_ray.miti.paper_study import Cell
from milm_ray.miti.summary import (
    MEASURES,
    RATIOS,
    THRESHOLDS,
    Coding,
    GroupSummary,
    Spread,
    spread,
    standing,
    summarise_group,
    table_rows,
)
from milm_ray.miti.tables import INTERVAL, SPREAD, StudyColumn, StudyTable
from milm_ray.schema import MOTIVATIONS, TOPICS

LABELS = {
    **{code.name: code.label for code in CODES},
    **{score.name: score.label for score in GLOBALS},
    "technical_global": "Technical global",
    "relational_global": "Relational global",
    "complex_reflection_ratio": "Complex reflections, share of all",
    "reflection_to_question": "Reflections to questions",
    "total_mia": "Total MI-adherent",
    "total_mina": "Total MI-non-adherent",
    "mia_ratio": "MI-adherent ratio (the paper's addition)",
}
_EXPECTED = (
    "Counts are expected ones, sums of how probable each code is, which lean less to the coder's "
    "favourite codes than its best guesses do; a ratio over less than half an expected code is "
    "undefined."
)
_MARK = {"good": "Good", "fair": "Fair", "below": "below Fair"}
Groups = Mapping[str, Sequence[Coding]]
Key = Mapping[str, Mapping[str, Any]]


def by_group(codings: Sequence[Coding]) -> dict[str, list[Coding]]:
    """Codings by their dialogue's group, groups by name with the real dialogues last."""
    found: dict[str, list[Coding]] = {}
    for coding in sorted(codings, key=lambda c: (c.group.startswith("Real"), c.group)):
        found.setdefault(coding.group, []).append(coding)
    return found


def instrument_words(instrument: str) -> str:
    """How a caption names who coded."""
    if instrument.startswith("automatic"):
        return f"AUTOMATIC codes, by {instrument.removeprefix('automatic: ')}"
    if instrument.startswith("mapped"):
        return "codes mapped from AnnoMI's own labels"
    return "codes by people"


def slug(instrument: str) -> str:
    """A file-name part for who coded."""
    name = instrument.rpartition(": ")[2].lower()
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in name)


def lengths(item: Item, language: str) -> tuple[int, float | None, float | None]:
    """Rounds, and mean length of the client's and the counselor's turns.

    A round is a client turn that the counselor answers. Lengths are Chinese characters, letters
    and digits without punctuation, or words in English.
    """
    sizes: dict[str, list[int]] = {"client": [], "counselor": []}
    for volley in item.volleys:
        text = " ".join(volley.utterances)
        words = len(text.split()) if language == "en" else sum(c.isalnum() for c in text)
        sizes[volley.role].append(words)
    roles = [volley.role for volley in item.volleys]
    rounds = sum(pair == ("client", "counselor") for pair in itertools.pairwise(roles))
    means = [sum(s) / len(s) if s else None for s in (sizes["client"], sizes["counselor"])]
    return rounds, means[0], means[1]


def table4(items: Sequence[Item], key: Key, cells: Sequence[Cell]) -> StudyTable:
    """Table 4: dialogues, rounds and turn lengths of each group, with the paper's beside."""
    found: dict[tuple[str, str], list[tuple[int, float | None, float | None]]] = {}
    for item in items:
        entry = key[item.item_id]
        measured = lengths(item, entry["language"])
        found.setdefault((entry["group"], entry["language"]), []).append(measured)
    with_paper = any(cell.table == "4" for cell in cells)
    rows = []
    for (group, language), each in sorted(found.items(), key=lambda g: (g[0][0][:4] == "Real", g)):
        spreads = [spread([values[i] for values in each]) for i in range(3)]
        rows.append(
            [
                group,
                len(each),
                "words" if language == "en" else "characters",
                *(_cell(found_, n=False) for found_ in spreads),
                *([_paper_row(cells, group)] if with_paper else []),
            ]
        )
    quartiles = SPREAD[:2]
    return StudyTable(
        "table4",
        "Table 4. The dialogues: rounds and length of turns, mean (IQR)",
        [
            StudyColumn("Group"),
            StudyColumn("Dialogues", 0),
            StudyColumn("Length in"),
            StudyColumn("Rounds", 1, quartiles),
            StudyColumn("Client turn", 1, quartiles),
            StudyColumn("Counselor turn", 1, quartiles),
            *([StudyColumn("Paper: rounds / client / counselor")] if with_paper else []),
        ],
        rows,
        [
            "Mean over dialogues of the mean turn; IQR is the first to the third quartile. Chinese "
            "characters without punctuation, English words. The two are not comparable."
        ],
    )


def _paper_row(cells: Sequence[Cell], group: str) -> str | None:
    wanted = paper_group(group)
    known = {c.variable: c.mean for c in cells if c.table == "4" and c.group == wanted}
    if not known:
        return None
    parts = (known.get(name) for name in ("rounds", "client_length", "counselor_length"))
    return " / ".join("–" if part is None else f"{part:g}" for part in parts)


def paper_group(group: str) -> str:
    """The paper's name of a group: "real", or an MI-LLM's model; "" for what it does not have."""
    if group.startswith("Real"):
        return "real"
    tuned = group.startswith("MI-LLM ")
    return group.removeprefix("MI-LLM ").split(",")[0] if tuned else ""


def table5(key: Key) -> StudyTable:
    """Table 5: topics of each group, and the motivation levels that clients were given."""
    groups = sorted({entry["group"] for entry in key.values() if entry["source"] != "annomi"})
    rows = []
    for kind, names in (("topic", TOPICS), ("motivation", MOTIVATIONS)):
        counts = Counter((e["group"], e[kind]) for e in key.values())
        for name in names:
            label = name.replace("_", " ")
            rows.append([kind, label, *(counts[group, name] for group in groups)])
    return StudyTable(
        "table5",
        "Table 5. Topics and motivation of the models' dialogues",
        [StudyColumn("Kind"), StudyColumn("Level"), *(StudyColumn(group, 0) for group in groups)],
        rows,
        [
            "Topics are the paper's five. Motivation is assigned at random, seeded; the paper does "
            "not define its levels."
        ],
    )


def coded_tables(instrument: str, groups: Groups, cells: Sequence[Cell]) -> list[StudyTable]:
    """Table 6 of one instrument: counts, global and summary scores; counts per round.

    cells: the paper's, where they are known; its groups get columns of their own.
    """
    summaries = [summarise_group(codings) for codings in groups.values()]
    words, tail = instrument_words(instrument), slug(instrument)
    automatic = instrument.startswith("automatic")
    names = [summary.group for summary in summaries]
    paper = {(c.group, c.variable): [c.mean, c.q1, c.q3, c.n] for c in cells if c.table == "6"}
    in_paper = [g for g in dict.fromkeys(map(paper_group, names)) if any(k[0] == g for k in paper)]
    rows = []
    for kind, variables in (
        ("count", [code.name for code in CODES]),
        ("global score", list(GLOBAL_NAMES)),
        ("summary score", list(MEASURES)),
    ):
        for name in variables:
            ours = [_cell(_spread(summary, kind, name)) for summary in summaries]
            if any(ours):
                theirs = [paper.get((group, name)) for group in in_paper]
                rows.append([kind, LABELS[name], *ours, *theirs, _threshold(name)])
    table6 = StudyTable(
        f"table6_{tail}",
        f"Table 6. Behaviour counts and scores, mean (IQR) n; {words}",
        [
            StudyColumn("Kind"),
            StudyColumn("Variable"),
            *(StudyColumn(name, 2, SPREAD) for name in names),
            *(StudyColumn(f"Paper, {group}", 2, SPREAD) for group in in_paper),
            StudyColumn("Fair / Good"),
        ],
        rows,
        [
            "Each cell: mean over dialogues (first to third quartile), n dialogues where it is "
            "defined. Coders of a dialogue are averaged first. A variable that this coder does not "
            "give is left out; it is not zero.",
            *(["These codes are automatic and stand for nobody's judgement."] if automatic else []),
            *([_EXPECTED] if _expected(groups) else []),
        ],
        automatic,
    )
    rates = StudyTable(
        f"rates_{tail}",
        f"Behaviour counts per round, mean (IQR) n; {words}",
        [StudyColumn("Variable"), *(StudyColumn(name, 3, SPREAD) for name in names)],
        [
            [LABELS[code.name], *(_cell(s.per_round[code.name]) for s in summaries)]
            for code in CODES
            if any(s.per_round[code.name].n for s in summaries)
        ],
        ["Dialogues differ in length, so counts per round compare better than counts."],
        automatic,
    )
    return [table6, rates]


def ratios(instrument: str, groups: Groups, *, resamples: int, seed: int) -> StudyTable:
    """Every group's ratios both ways: the mean of its dialogues' ratios, and that of the sums."""
    rows: list[list[Any]] = []
    for group, codings in groups.items():
        summary = summarise_group(codings)
        for name in RATIOS:
            found = summary.measures[name]
            pooled = pooled_ratio(codings, name, resamples=resamples, seed=seed)
            if found.n or pooled.value is not None:
                mark = standing(name, found.mean)
                counts = (found.n, summary.dialogues)
                how = _MARK[mark] if mark else None
                rows.append([group, LABELS[name], found.mean, *counts, _estimate(pooled), how])
    return StudyTable(
        f"ratios_{slug(instrument)}",
        f"Ratios: mean of the dialogues' ratios, and pooled; {instrument_words(instrument)}",
        [
            StudyColumn("Group"),
            StudyColumn("Ratio"),
            StudyColumn("Mean of ratios", 2),
            StudyColumn("Defined in", 0),
            StudyColumn("of dialogues", 0),
            StudyColumn("Pooled", 2, INTERVAL),
            StudyColumn("Standing of the mean"),
        ],
        rows,
        [
            "A ratio is undefined where its lower part is 0 (no question, no reflection). In the "
            "mean of ratios a dialogue with one reflection weighs as much as one with forty. "
            "Pooled: the ratio of the summed counts, in which long dialogues weigh more, with its "
            "95 % interval by dialogue."
        ],
        instrument.startswith("automatic"),
    )


def comparisons(instrument: str, groups: Groups, *, resamples: int, seed: int) -> list[StudyTable]:
    """Every pair of groups on the summary and global scores, with effect sizes and intervals."""
    rows: list[list[Any]] = []
    wanted = {*MEASURES, *GLOBAL_NAMES}
    for (first, a), (second, b) in itertools.combinations(groups.items(), 2):
        each = compare(a, b, resamples=resamples, seed=seed)
        for found in [*each, *compare_pooled(a, b, resamples=resamples, seed=seed)]:
            if found.variable in wanted and found.difference.value is not None:
                rows.append(
                    [
                        f"{second} − {first}",
                        LABELS[found.variable] + (", pooled" if found.pooled else ""),
                        f"{found.second_n}, {found.first_n}",
                        _estimate(found.difference),
                        _estimate(found.hedges_g),
                        _estimate(found.cliffs_delta),
                        found.p,
                    ]
                )
    if not rows:
        return []
    table = StudyTable(
        f"comparisons_{slug(instrument)}",
        f"Groups compared; {instrument_words(instrument)}",
        [
            StudyColumn("Groups"),
            StudyColumn("Variable"),
            StudyColumn("n"),
            StudyColumn("Difference", 2, INTERVAL),
            StudyColumn("Hedges' g", 2, INTERVAL),
            StudyColumn("Cliff's delta", 2, INTERVAL),
            StudyColumn("p", 3),
        ],
        rows,
        [
            "Intervals are 95 % and resample dialogues; p is two-sided, by permutation, and not "
            "corrected for the number of comparisons. With ten dialogues a group only large "
            "differences show. A pooled ratio has an interval only."
        ],
        instrument.startswith("automatic"),
    )
    return [table]


def paper_tables(cells: Sequence[Cell]) -> list[StudyTable]:
    """What is known of the paper's ratios, and its own summary scores put through our code."""
    known = StudyTable(
        "paper_mia_ratio",
        "The paper's MI-adherent ratios",
        [
            StudyColumn("Model"),
            StudyColumn("As reported", 2),
            StudyColumn("Pooled from its own means", 2),
        ],
        [[model, *pair] for model, pair in paper_study.MIA_RATIO.items()],
        [
            "In the paper's order of models."
            + ("" if cells else " The other cells of its Tables 4 to 6 were not available to us.")
        ],
    )
    checks = paper_study.reproduce([cell for cell in cells if cell.table == "6"])
    if not checks:
        return [known]
    return [
        known,
        StudyTable(
            "paper_reproduced",
            "The paper's Table 6 means through our summary code",
            [
                StudyColumn("Group"),
                StudyColumn("Summary score"),
                StudyColumn("Reported", 2),
                StudyColumn("From its means", 2),
                StudyColumn("Result"),
            ],
            [[c.group, LABELS[c.measure], c.reported, c.recomputed, c.verdict] for c in checks],
            ["Within 0.05 counts as reproduced: the paper rounds its means."],
        ),
    ]


def long_rows(instrument: str, groups: Groups) -> list[dict[str, Any]]:
    """Every figure of every group as one long table, for other programs."""
    summaries = [summarise_group(codings) for codings in groups.values()]
    return [{"instrument": instrument, **row} for row in table_rows(summaries)]


def _expected(groups: Groups) -> bool:
    """Whether an automatic coder gave expected counts; the means of people's are no such thing."""
    return any(
        coding.automatic and any(n != int(n) for n in coding.counts.values())
        for codings in groups.values()
        for coding in codings
    )


def _spread(summary: GroupSummary, kind: str, name: str) -> Spread:
    if kind == "count":
        return summary.counts[name]
    return summary.global_scores[name] if kind == "global score" else summary.measures[name]


def _cell(found: Spread, *, n: bool = True) -> list[Any] | None:
    """Mean, quartiles and n as a SPREAD cell; None where no dialogue defines it."""
    cell = [found.mean, found.q1, found.q3, found.n]
    return cell[: 4 if n else 3] if found.n else None


def _estimate(estimate: Estimate) -> list[float | None] | None:
    """An INTERVAL cell."""
    return None if estimate.value is None else [estimate.value, estimate.low, estimate.high]


def _threshold(measure: str) -> str | None:
    return "{:g} / {:g}".format(*THRESHOLDS[measure]) if measure in THRESHOLDS else None
