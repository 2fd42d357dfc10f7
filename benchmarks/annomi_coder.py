"""The trained coder against AnnoMI's own labels, beside human agreement and published figures.

    python benchmarks/annomi_coder.py --annomi AnnoMI-full.csv [--folds 10]

Prints Markdown tables: cross-validated by session, all figures out of fold. Two minutes.
"""

import argparse
from pathlib import Path

from milm_ray.miti import annomi, trained_coder
from milm_ray.miti.agreement import fleiss_kappa
from milm_ray.miti.comparison import compare, compare_pooled
from milm_ray.miti.summary import Coding, summarise_group

PUBLISHED = {"main_therapist_behaviour": ".72 / .83", "client_talk_type": ".55 / .66"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--annomi", type=Path, required=True)
    parser.add_argument("--folds", type=int, default=10)
    options = parser.parse_args()
    sessions = annomi.read(options.annomi)
    labels_table(sessions, options.folds)
    order_table(sessions, options.folds)


def labels_table(sessions, folds) -> None:
    print(
        "| Task | Utterances | Macro F1 | Published (text / + audio) | Kappa (95 %) | Ten people |"
    )
    print("|---|---|---|---|---|---|")
    details = []
    for task in trained_coder.TASKS:
        found = trained_coder.cross_validate(sessions, task, count=folds)
        people = fleiss_kappa(*annomi.ratings(sessions, task))
        print(
            f"| {task} | {found.utterances:,} | {found.macro_f1:.2f} | {PUBLISHED.get(task, '')} | "
            f"{interval(found.kappa)} | {interval(people)} |"
        )
        each = ", ".join(f"{k} {v:.2f} (n {found.counts[k]:,})" for k, v in found.f1.items())
        details.append(f"{task}: F1 {each}; accuracy {found.accuracy:.2f}")
    print("\n" + "\n".join(details) + "\n")


def order_table(sessions, folds) -> None:
    """Do the summary scores that AnnoMI's labels carry put high-quality sessions first?"""
    people = [
        Coding(s.transcript_id, "people", s.quality, s.counts(), scope=annomi.MAPPED)
        for s in sessions
    ]
    labelled = {
        "people": people,
        "trained coder": trained_coder.code_unseen(sessions, count=folds),
    }
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
