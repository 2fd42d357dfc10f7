"""Train the classifier's weights: `python -m milm_ray.serving.safety.train [--smilechat DIR]`.

Data: train.tsv and the tune part of the test set, both written for this project, and, when a
directory of SmileChat's JSON files (CC0) is given, a fixed sample of its client turns. The
sample takes its label from the rules, so that the classifier learns how people in fact word what
the rules know; turns with a rule at medium are left out. The same data give the same weights.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from milm_ray.serving.safety.classifier import BUCKETS, CLASSES, features
from milm_ray.serving.safety.normalize import BREAK, normalize
from milm_ray.serving.safety.rules import HIGH, SIGNAL, rule_book

Example = tuple[str, str, bool]  # normalised text, class, high risk
HERE = Path(__file__).parent


def written(path: Path = HERE / "train.tsv") -> Iterator[Example]:
    """The lines of train.tsv, with denials blanked as at run time."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            label, category, text = line.split("\t")
            yield prepared(text), category, label == "high"


def tune_items(path: Path) -> Iterator[Example]:
    """Single-turn items of the test set's tune part. The held-out part is never read."""
    for line in path.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        if item["split"] == "tune" and len(item["history"]) == 1:
            text = prepared(item["history"][0]["content"])
            yield text, item["category"], item["level"] == "high"


def smilechat(directory: Path, dialogues: int, seed: int) -> Iterator[Example]:
    """Client turns of a sample of SmileChat, labelled by the rules."""
    files = sorted(directory.glob("*.json"), key=lambda path: int(path.stem))
    for path in random.Random(seed).sample(files, min(dialogues, len(files))):
        for turn in json.loads(path.read_text(encoding="utf-8")):
            if turn["role"] != "client":
                continue
            scan = rule_book().scan(normalize(turn["content"]))
            alarms = [hit for hit in scan.hits if hit.level > SIGNAL]
            if not alarms:
                yield scan.unexplained, "none", False
                # Alone as well: a chat's turns are shorter than SmileChat's.
                for clause in scan.unexplained.split(BREAK)[:3]:
                    yield clause, "none", False
            elif any(hit.level == HIGH for hit in alarms):
                worst = max(alarms, key=lambda hit: hit.level)
                yield scan.unexplained, worst.category, True


def prepared(text: str) -> str:
    return rule_book().scan(normalize(text)).unexplained


def train(examples: list[Example], epochs: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    """The arrays of weights.npz. Classes are weighted by the root of their rarity.

    Both heads are one matrix [BUCKETS, 9 + 1]: softmax over the classes, sigmoid for high risk.
    """
    import torch
    from torch.nn import functional

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    rows = [features(text) for text, _, _ in examples]
    classes = torch.tensor([CLASSES.index(category) for _, category, _ in examples])
    high = torch.tensor([float(is_high) for _, _, is_high in examples])
    weights = torch.bincount(classes, minlength=len(CLASSES))[classes].float().rsqrt()
    weights /= weights.mean()
    model = torch.nn.EmbeddingBag(BUCKETS, len(CLASSES) + 1, mode="sum")
    torch.nn.init.zeros_(model.weight)
    bias = torch.zeros(len(CLASSES) + 1, requires_grad=True)
    optimizer = torch.optim.AdamW([*model.parameters(), bias], lr=0.05, weight_decay=0.02)
    for _ in range(epochs):
        for batch in torch.randperm(len(rows)).split(256):
            picked = [rows[i] for i in batch.tolist()]
            sizes = torch.tensor([0, *(len(b) for b, _ in picked[:-1])])
            logits = bias + model(
                torch.from_numpy(np.concatenate([b for b, _ in picked])),
                sizes.cumsum(0),
                per_sample_weights=torch.from_numpy(np.concatenate([v for _, v in picked])),
            )
            losses = functional.cross_entropy(
                logits[:, :-1], classes[batch], reduction="none"
            ) + functional.binary_cross_entropy_with_logits(
                logits[:, -1], high[batch], reduction="none"
            )
            optimizer.zero_grad()
            (losses * weights[batch]).mean().backward()
            optimizer.step()
    matrix, offset = model.weight.detach().numpy(), bias.detach().numpy()
    return {
        "category": matrix[:, :-1].astype(np.float16),
        "category_bias": offset[:-1].astype(np.float32),
        "high": matrix[:, -1].astype(np.float16),
        "high_bias": offset[-1].astype(np.float32),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=Path, default=Path("tests/unit/safety_items.jsonl"))
    parser.add_argument("--smilechat", type=Path, help="directory of SmileChat's JSON files")
    parser.add_argument("--dialogues", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "weights.npz")
    args = parser.parse_args()
    # Ours count five times: they are few, and hold what SmileChat has little of.
    examples = [*written(), *tune_items(args.items)] * 5
    if args.smilechat:
        examples += smilechat(args.smilechat, args.dialogues, args.seed)
    print("examples:", dict(Counter(category for _, category, _ in examples)))
    np.savez_compressed(args.out, allow_pickle=False, **train(examples))
    print(f"wrote {args.out} ({args.out.stat().st_size / 1024:.0f} KiB)")


if __name__ == "__main__":
    main()
