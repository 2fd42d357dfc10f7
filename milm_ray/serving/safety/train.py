"""Train the classifier's weights: `python -m milm_ray.serving.safety.train --smilechat DIR`.

Data: train.tsv and the tune part of the test set, both written for this project, and a fixed
sample of the client turns of SmileChat (CC0; DIR holds its JSON files). The sample stands for
ordinary talk. Each turn of a benign conversation counts as benign on its own, too. Turns with an
alarm by a rule are left out of both. The same data give the same weights.

Features count by a power of their rarity, log(texts / texts with it): what is said is in the rare
ones, and the common ones of a style would otherwise decide.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from milm_ray.serving.safety.classifier import features, length
from milm_ray.serving.safety.config import CATEGORIES
from milm_ray.serving.safety.conversation import TOGETHER
from milm_ray.serving.safety.normalize import BREAK, normalize
from milm_ray.serving.safety.rules import SIGNAL, rule_book

HERE = Path(__file__).parent
_RARITY_POWER = 2.0
_STRENGTH = 30.0  # C of the logistic regressions: the inverse of their L2 penalty
_SMILECHAT_WEIGHT = 1.0
_MEDIUM_WEIGHT = 0.5
_TURN_WEIGHT = 0.5
_FEWEST = 5  # texts that a feature must be in for a say in which category it is


class Example(NamedTuple):
    """A normalised text, its class, whether it is high risk, what it counts in the loss, and the
    last of the turns that the text joins, if it joins several."""

    text: str
    category: str
    high: bool
    weight: float = 1.0
    answer: str = ""


def written(path: Path = HERE / "train.tsv") -> Iterator[Example]:
    """The lines of train.tsv; a conversation is told as `C: … | K: … | C: …`."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            label, category, text = line.split("\t")
            turns = [turn.strip() for turn in text.split("|")]
            if len(turns) > 1 and turns[0][:2] in ("C:", "K:"):
                client = [turn.removeprefix("C:").strip() for turn in turns if turn[:2] == "C:"]
            else:
                client = [text.removeprefix("C:").strip()]
            yield from _examples(client, label, category)


def tune_items(path: Path) -> Iterator[Example]:
    """Items of the test set's tune part. The held-out part is never read."""
    for line in path.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        if item["split"] == "tune":
            client = [turn["content"] for turn in item["history"] if turn["role"] == "client"]
            yield from _examples(client, item["level"], item["category"])


def _examples(client: list[str], label: str, category: str) -> Iterator[Example]:
    """The client's turns of one history as the check reads them: the last ones joined."""
    turns = [normalize(turn) for turn in client][-TOGETHER:]
    weight = _MEDIUM_WEIGHT if label == "medium" else 1.0
    answer = turns[-1] if len(turns) > 1 else ""
    yield Example(BREAK.join(turns), category, label == "high", weight, answer)
    if label == "none" and answer:
        calm = (turn for turn in turns if _calm(turn))
        yield from (Example(turn, category, False, _TURN_WEIGHT) for turn in calm)


def _calm(text: str) -> bool:
    """Whether no rule sees a risk; "我想死" is one, though the next turn made it a typing error."""
    return all(hit.level == SIGNAL for hit in rule_book().scan(text).hits)


def smilechat(directory: Path, dialogues: int, seed: int) -> Iterator[Example]:
    """Client turns of a sample of SmileChat in which no rule sees a risk."""
    files = sorted(directory.glob("*.json"), key=lambda path: int(path.stem))
    for path in random.Random(seed).sample(files, min(dialogues, len(files))):
        for turn in json.loads(path.read_text(encoding="utf-8")):
            text = normalize(turn["content"]) if turn["role"] == "client" else ""
            if text and _calm(text):
                yield Example(text, "none", False, _SMILECHAT_WEIGHT)


def train(examples: list[Example]) -> dict[str, np.ndarray]:
    """The arrays of weights.npz: logistic regressions on the same features."""
    from scipy.sparse import csr_matrix, diags
    from sklearn.linear_model import LogisticRegression

    rows = [features(example.text, example.answer) for example in examples]
    every = np.concatenate(rows)
    keys, column, texts_with = np.unique(every, return_inverse=True, return_counts=True)
    rarity = np.log((len(rows) + 1) / (texts_with + 1)) ** _RARITY_POWER
    ends = np.cumsum([0, *(len(row) for row in rows)])
    counts = csr_matrix((rarity[column], column, ends), (len(rows), len(keys)))
    squares = np.asarray(counts.multiply(counts).sum(1)).ravel()
    matrix = (diags(1 / length(squares, 0, rarity)) @ counts).tocsr()
    weights = np.array([example.weight for example in examples])

    def fit(labels: np.ndarray, chosen: np.ndarray | slice = slice(None)) -> tuple[Any, float]:
        model = LogisticRegression(
            C=_STRENGTH,
            solver="liblinear",
            dual=True,
            tol=1e-2,
            max_iter=1000,
            intercept_scaling=3.0,
            random_state=0,
        )
        model.fit(matrix[chosen], labels[chosen], weights[chosen])
        return model.coef_[0], float(model.intercept_[0])

    classes = np.array([example.category for example in examples])
    # Which risk it is learns from texts at risk alone, one category against the others.
    risky = np.flatnonzero(classes != "none")
    fits = [
        fit(classes != "none"),
        fit(np.array([example.high for example in examples])),
        *(fit(classes == category, risky) for category in CATEGORIES),
    ]
    coefficients = np.stack([coefficient for coefficient, _ in fits], axis=1)
    coefficients[texts_with < _FEWEST, 2:] = 0
    # A step of 1/127 of the largest weight moves a text's odds by a hundredth.
    scale = np.abs(coefficients).max(0) / 127
    steps = np.round(coefficients / scale).astype(np.int8)
    # A feature of one text alone that weighs next to nothing can go: one not known counts as long.
    kept = (texts_with > 1) | (np.abs(steps[:, :2]).max(1) > 2)
    return {
        "keys": keys[kept],
        "rarity": rarity[kept].astype(np.float16),
        "weights": steps[kept],
        "scale": scale.astype(np.float32),
        "bias": np.array([bias for _, bias in fits], np.float32),
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
