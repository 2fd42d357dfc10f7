"""What is known of the paper's MITI study, and what it leaves open.

Its Tables 4 to 6 could not be read for this release, so their cells are not here and are never
guessed. Who has the paper gives them as a CSV (`miti.paper_cells`) with the columns table, group,
variable, mean, q1, q3, n; they are then set beside ours and put through our summary code.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from milm_ray.errors import UserError
from milm_ray.miti.coding_scheme import CODE_NAMES, GLOBAL_NAMES
from milm_ray.miti.summary import MEASURES, NEEDS, summary_scores

# MI-adherent ratio of the three MI-LLMs in the paper's order of models: as reported (a mean of
# dialogues' ratios), and pooled from the paper's own mean counts.
MIA_RATIO = {"baichuan2": (0.75, 0.82), "glm4": (0.78, 0.86), "llama3": (0.72, 0.83)}
DIALOGUES, REAL_DIALOGUES = 10, 30
_TABLES = ("4", "6")
_GROUPS = (*MIA_RATIO, "real")
_COLUMNS = ("table", "group", "variable", "mean", "q1", "q3", "n")
# Sums and means of variables: the means of Table 6 must agree with them but for rounding.
_LINEAR = ("technical_global", "relational_global", "total_mia", "total_mina")

NOTES: tuple[tuple[str, str], ...] = (
    (
        "The client and counselor columns of Table 4 look swapped.",
        "Each column here says whose turns it measures.",
    ),
    (
        "The figures of one model in Table 6 fit nine dialogues by two coders, not ten.",
        "Every cell has its own n.",
    ),
    (
        "The real dialogues seem to have been coded in another way (whole numbers over 30) than "
        "the models' (half points).",
        "One procedure for all: coders of a dialogue are averaged first, then dialogues.",
    ),
    (
        "The reported MI-adherent ratios (0.75, 0.78, 0.72) differ from those pooled from the "
        "paper's own means (0.82, 0.86, 0.83).",
        "The mean of ratios and the pooled ratio stand side by side.",
    ),
    (
        "One model has 17.5 reflections in 17.4 rounds, which one reflection per volley does not "
        "allow.",
        "The rules of the volley are enforced on the coding page and in every sheet and reply.",
    ),
    (
        "No group reaches the manual's Fair threshold for complex reflections, and none its Good "
        "threshold for reflections to questions.",
        "The thresholds are printed beside the means.",
    ),
    (
        "There are no figures of agreement and no check of blinding, and the researchers were the "
        "clients.",
        "Agreement is reported with intervals wherever two people coded the same dialogues; who "
        "played the clients is in the groups' names.",
    ),
    (
        "How motivation levels were set and when a session ended is not stated.",
        "Levels are assigned at random, seeded, and each session says why it ended "
        "(simulate.max_rounds at the latest).",
    ),
    (
        "It is not said whether the 30 real dialogues leave out those of low quality.",
        "High quality only, unless miti.annomi_quality says otherwise; their ids are in the "
        "packet's key.",
    ),
)


@dataclass(frozen=True)
class Cell:
    """One cell of the paper's tables; group is a model's chat format, or "real"."""

    table: str
    group: str
    variable: str
    mean: float
    q1: float | None
    q3: float | None
    n: int | None


@dataclass(frozen=True)
class Check:
    """One summary score of the paper: as reported, and from its own mean counts and scores."""

    group: str
    measure: str
    reported: float
    recomputed: float | None
    verdict: str


def read_cells(path: str | None) -> list[Cell]:
    """The paper's cells as somebody typed them in; UserError naming every row that is wrong."""
    if not path:
        return []
    known = {*CODE_NAMES, *GLOBAL_NAMES, *MEASURES, "rounds", "client_length", "counselor_length"}
    faults, cells = [], []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read: {error}", "save it as UTF-8") from error
    reader = csv.DictReader(lines)
    missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}", "see docs/miti.md")
    for number, row in enumerate(reader, 2):
        if row["variable"] not in known:
            faults.append(f"row {number}: unknown variable {row['variable']!r}")
            continue
        if row["table"] not in _TABLES:
            faults.append(f"row {number}: table {row['table']!r} is none of {', '.join(_TABLES)}")
            continue
        if row["group"] not in _GROUPS:
            faults.append(f"row {number}: group {row['group']!r} is none of {', '.join(_GROUPS)}")
            continue
        try:
            q1, q3 = (float(row[name]) if row[name] else None for name in ("q1", "q3"))
            n = int(row["n"]) if row["n"] else None
            mean = float(row["mean"])
            cells.append(Cell(row["table"], row["group"], row["variable"], mean, q1, q3, n))
        except (TypeError, ValueError) as error:
            faults.append(f"row {number}: {error}")
    if faults:
        raise UserError(f"{path}: " + "; ".join(faults), "correct these rows")
    return cells


def reproduce(cells: Sequence[Cell]) -> list[Check]:
    """The paper's summary scores against those of its own means, group by group.

    Sums and averages must come out again but for rounding; a ratio of means is another number
    than a mean of ratios, and cannot.
    """
    checks = []
    for group in dict.fromkeys(cell.group for cell in cells):
        means = {cell.variable: cell.mean for cell in cells if cell.group == group}
        counts = {code: means[code] for code in CODE_NAMES if code in means}
        scores: dict[str, float | None] = {g: means[g] for g in GLOBAL_NAMES if g in means}
        found = summary_scores(counts, scores)
        for measure in MEASURES:
            if measure not in means:
                continue
            # A code that is not given is not one that nobody used.
            given = set(NEEDS.get(measure, ())) <= set(counts)
            reported, recomputed = means[measure], found[measure] if given else None
            if recomputed is None:
                verdict = "its parts are not given"
            elif abs(recomputed - reported) <= 0.05:
                verdict = "reproduced"
            elif measure in _LINEAR:
                verdict = "differs from the sum or mean of its own parts"
            else:
                verdict = "a mean of ratios; the means alone do not give it"
            checks.append(Check(group, measure, reported, recomputed, verdict))
    return checks
