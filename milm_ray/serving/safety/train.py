"""Train the classifier's weights: `python -m milm_ray.serving.safety.train --smilechat DIR`.

Data: train.tsv and the tune part of the test set, both written for this project, and a fixed
sample of the client turns of SmileChat (CC0; DIR holds its JSON files). The sample takes its label
from the rules, counts little, and is there for what ordinary talk looks like: without it every
second turn of it would be an alarm. Turns with a rule at medium are left out. The same data give
the same weights.

Features count by a power of their rarity, log(texts / texts with it): what is said is in the rare
ones, and the common ones of a style would otherwise decide. Those of one text only are left out.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from milm_ray.serving.safety.classifier import features, length
from milm_ray.serving.safety.config import CATEGORIES
from milm_ray.serving.safety.normalize import normalize
from milm_ray.serving.safety.rules import HIGH, SIGNAL, rule_book

HERE = Path(__file__).parent
_RARITY_POWER = 1.5
_STRENGTH = 50.0  # C of the logistic regressions: the inverse of their L2 penalty
_SMILECHAT_WEIGHT = 0.1


class Example(NamedTuple):
    """A normalised text, its class, whether it is high risk, and what it counts in the loss."""

    text: str
    category: str
    high: bool
    weight: float = 1.0


def written(path: Path = HERE / "train.tsv") -> Iterator[Example]:
    """The lines of train.tsv."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            label, category, text = line.split("\t")
            yield Example(normalize(text), category, label == "high")


def tune_items(path: Path) -> Iterator[Example]:
    """Items of the test set's tune part. The held-out part is never read.

    Of several turns the client's count, joined as the check joins them.
    """
    for line in path.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        if item["split"] == "tune":
            turns = [turn["content"] for turn in item["history"] if turn["role"] == "client"]
            text = "".join(normalize(turn) for turn in turns)
            yield Example(text, item["category"], item["level"] == "high")


def smilechat(directory: Path, dialogues: int, seed: int) -> Iterator[Example]:
    """Client turns of a sample of SmileChat, labelled by the rules."""
    files = sorted(directory.glob("*.json"), key=lambda path: int(path.stem))
    for path in random.Random(seed).sample(files, min(dialogues, len(files))):
        for turn in json.loads(path.read_text(encoding="utf-8")):
            if turn["role"] != "client":
                continue
            text = normalize(turn["content"])
            alarms = [hit for hit in rule_book().scan(text).hits if hit.level > SIGNAL]
            if not alarms:
                yield Example(text, "none", False, _SMILECHAT_WEIGHT)
            elif any(hit.level == HIGH for hit in alarms):
                worst = max(alarms, key=lambda hit: hit.level)
                yield Example(text, worst.category, True, _SMILECHAT_WEIGHT)


def train(examples: list[Example]) -> dict[str, np.ndarray]:
    """The arrays of weights.npz: three logistic regressions on the same features."""
    from scipy.sparse import csr_matrix, diags
    from sklearn.linear_model import LogisticRegression

    rows = [features(example.text) for example in examples]
    keys, texts_with = np.unique(np.concatenate(rows), return_counts=True)
    keys, texts_with = keys[texts_with > 1], texts_with[texts_with > 1]
    rarity = np.log((len(rows) + 1) / (texts_with + 1)) ** _RARITY_POWER
    sizes = np.array([len(row) for row in rows])
    every = np.concatenate(rows)
    at = np.minimum(np.searchsorted(keys, every), len(keys) - 1)
    known = keys[at] == every
    text_of = np.repeat(np.arange(len(rows)), sizes)[known]
    counts = csr_matrix((rarity[at[known]], (text_of, at[known])), (len(rows), len(keys)))
    strange = sizes - np.bincount(text_of, minlength=len(rows))
    matrix = diags(1 / length(counts.multiply(counts).sum(1).A1, strange, rarity)) @ counts
    weights = np.array([example.weight for example in examples])

    def fit(labels: np.ndarray, chosen: np.ndarray | slice = slice(None)) -> LogisticRegression:
        # A hundred steps end a little short of convergence, which scikit-learn warns of.
        model = LogisticRegression(C=_STRENGTH, max_iter=100)
        return model.fit(matrix[chosen], labels[chosen], weights[chosen])

    classes = np.array([example.category for example in examples])
    risk = fit(classes != "none")
    high = fit(np.array([example.high for example in examples]))
    # Which risk it is learns from the written lines at risk alone.
    category = fit(
        np.array([CATEGORIES.index(c) if c != "none" else -1 for c in classes]),
        np.flatnonzero((classes != "none") & (weights == 1)),
    )
    return {
        "keys": keys,
        "rarity": rarity.astype(np.float32),
        "weights": np.vstack([risk.coef_, high.coef_, category.coef_]).T.astype(np.float16),
        "bias": np.hstack([risk.intercept_, high.intercept_, category.intercept_]).astype(
            np.float32
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=Path, default=Path("tests/unit/safety_items.jsonl"))
    parser.add_argument("--smilechat", type=Path, required=True, help="SmileChat's JSON files")
    parser.add_argument("--dialogues", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "weights.npz")
    args = parser.parse_args()
    examples = [
        *written(),
        *tune_items(args.items),
        *smilechat(args.smilechat, args.dialogues, args.seed),
    ]
    print("examples:", dict(Counter(example.category for example in examples)))
    np.savez_compressed(args.out, allow_pickle=False, **train(examples))
    print(f"wrote {args.out} ({args.out.stat().st_size / 1024:.0f} KiB)")


if __name__ == "__main__":
    main()
