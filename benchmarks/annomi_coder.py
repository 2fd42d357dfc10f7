"""The trained coder against AnnoMI's own labels, beside human agreement and published figures.

    python benchmarks/annomi_coder.py --annomi AnnoMI-full.csv [--folds 10]

Prints Markdown tables: cross-validated by session, all figures out of fold. One minute.
"""

import argparse
from pathlib import Path

import numpy as np

from milm_ray.miti import annomi, trained_coder
from milm_ray.miti.agreement import fleiss_kappa, icc
from milm_ray.miti.comparison import compare, compare_pooled
from milm_ray.miti.summary import Coding, summarise_group

PUBLISHED = {"main_therapist_behaviour": ".72 / .83", "client_talk_type": ".55 / .66"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--annomi", type=Path, required=True)
    parser.add_argument("--folds", type=int, default=10)
    options = parser.parse_args()
    sessions = annomi.read(options.annomi)
    unseen = trained_coder.out_of_fold(sessions, count=options.folds)
    labels_table(sessions, unseen)
    calibration(unseen)
    ways = {way: [each.coding(way) for each in unseen] for way in ("best guess", "expected")}
    agreement_table(sessions, ways)
    order_table(sessions, ways)


def labels_table(sessions, unseen) -> None:
    print(
        "| Task | Utterances | Macro F1 | Published (text / + audio) | Kappa (95 %) | Ten people |"
    )
    print("|---|---|---|---|---|---|")
    details = []
    for task in trained_coder.TASKS:
        found = trained_coder.validate(unseen, task)
        people = fleiss_kappa(*annomi.ratings(sessions, task))
        print(
            f"| {task} | {found.utterances:,} | {found.macro_f1:.2f} | {PUBLISHED.get(task, '')} | "
            f"{interval(found.kappa)} | {interval(people)} |"
        )
        each = ", ".join(f"{k} {v:.2f} (n {found.counts[k]:,})" for k, v in found.f1.items())
        details.append(f"{task}: F1 {each}; accuracy {found.accuracy:.2f}")
    print("\n" + "\n".join(details) + "\n")


def calibration(unseen) -> None:
    """Do utterances that are said to be a question with 70 % turn out to be one in 70 %?"""
    for task in trained_coder.COUNTED:
        pairs = [
            (each.probabilities[task][u.number], u.labels[task] in ("True", "complex"))
            for each in unseen
            for u in each.session.utterances
            if trained_coder.labelled(u, task)
        ]
        said, true = np.array(pairs, float).T
        tenth = np.minimum((said * 10).astype(int), 9)
        off = sum(abs((said - true)[tenth == k].sum()) for k in range(10)) / len(said)
        print(f"{task}: expected calibration error {off:.3f}")
    print()


def agreement_table(sessions, ways) -> None:
    """How near a session's automatic figures come to those by people's labels, both ways."""
    print("| Of a session | Counting | Sessions | Mean absolute error | Correlation | ICC(2,1) |")
    print("|---|---|---|---|---|---|")
    for name, figure in FIGURES.items():
        people = [figure(coding) for coding in by_people(sessions)]
        for way, codings in ways.items():
            pairs = [
                pair for pair in zip(people, map(figure, codings), strict=True) if None not in pair
            ]
            table = np.array(pairs, float)
            draws = np.random.default_rng(0).integers(0, len(table), (1000, len(table)))
            cells = [
                spread(table, draws, error),
                spread(table, draws, correlation),
                interval(icc(table)["single"]),
            ]
            print(f"| {name} | {way} | {len(table)} | " + " | ".join(cells) + " |")
    print()


def error(table) -> float:
    return np.abs(table[:, 0] - table[:, 1]).mean()


def correlation(table) -> float:
    return np.corrcoef(table.T)[0, 1]


def spread(table, draws, statistic) -> str:
    low, high = np.percentile([statistic(table[draw]) for draw in draws], [2.5, 97.5])
    return f"{statistic(table):.2f} ({low:.2f} to {high:.2f})"


def per_round(*codes):
    return lambda coding: sum(coding.counts.get(code, 0) for code in codes) / coding.rounds


FIGURES = {
    "questions per round": per_round("question"),
    "simple reflections per round": per_round("simple_reflection"),
    "complex reflections per round": per_round("complex_reflection"),
    "reflections to questions": lambda coding: coding.scores()["reflection_to_question"],
    "complex reflections, share": lambda coding: coding.scores()["complex_reflection_ratio"],
}


def by_people(sessions) -> list[Coding]:
    return [
        Coding(
            s.transcript_id,
            "people",
            s.quality,
            s.counts(),
            rounds=s.rounds(),
            scope=annomi.MAPPED,
        )
        for s in sessions
    ]


def order_table(sessions, ways) -> None:
    """Do the summary scores that AnnoMI's labels carry put high-quality sessions first?"""
    labelled = {"people": by_people(sessions), **{f"coder, {w}": c for w, c in ways.items()}}
    print("| Summary score | Labels | | high | low | high − low (95 %) |")
    print("|---|---|---|---|---|---|")
    for measure in annomi.MEASURES:
        for name, codings in labelled.items():
            high, low = ([c for c in codings if c.group == q] for q in ("high", "low"))
            found = {
                "mean of ratios": next(c for c in compare(low, high) if c.variable == measure),
                "pooled": next(c for c in compare_pooled(low, high) if c.variable == measure),
            }
            a, b = summarise_group(high), summarise_group(low)
            for how, each in found.items():
                first, second = (
                    g.pooled[measure] if each.pooled else g.measures[measure].mean for g in (a, b)
                )
                cells = (
                    measure,
                    name,
                    how,
                    f"{first:.2f} (n {each.second_n})",
                    f"{second:.2f} (n {each.first_n})",
                    interval(each.difference),
                )
                print("| " + " | ".join(cells) + " |")
    few = [s.counts() for s in sessions if s.quality == "low"]
    held = sorted(c.get("simple_reflection", 0) + c.get("complex_reflection", 0) for c in few)
    print(f"\nReflections that people found in the low-quality sessions: {held}")


def interval(found) -> str:
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


if __name__ == "__main__":
    main()
