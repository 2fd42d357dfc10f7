"""The small classifier beside the rules: n-grams, logistic regression, numpy only.

It catches wording that no rule foresaw. Two heads on the same hashed features: which category
(or none), and how probable high risk is. Weights are a plain .npz (no pickle) made by train.py.
"""

from __future__ import annotations

import itertools
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np

from milm_ray.serving.safety.config import CATEGORIES, Category

BUCKETS = 1 << 13
CLASSES: tuple[str, ...] = ("none", *CATEGORIES)
_ORDERS = (1, 2, 3)
_WORD = re.compile(r"[a-z']+")
_LONGEST = 400  # characters read; a longer turn is read in windows by the caller


@dataclass(frozen=True, slots=True)
class Opinion:
    """`risk`: P(any category); `high`: P(high risk); `category`: the likeliest one."""

    risk: float
    high: float
    category: Category


def features(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Bucket numbers and L2-normalised weights of what `text` is made of.

    Character 1- to 3-grams; of words in Latin letters, whose letters alone say nothing, the
    words and their pairs instead.
    """
    text = text[:_LONGEST]
    words = _WORD.findall(text)
    grams = {*words, *(f"{first} {second}" for first, second in itertools.pairwise(words))}
    text = f"^{_WORD.sub('_', text)}$"
    grams |= {text[i : i + n] for n in _ORDERS for i in range(len(text) - n + 1)}
    grams = {gram for gram in grams if "〇" not in gram}
    if not grams:
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    hashed = [zlib.crc32(gram.encode("utf-8", "replace")) % BUCKETS for gram in sorted(grams)]
    buckets, counts = np.unique(np.asarray(hashed, np.int64), return_counts=True)
    weights = np.sqrt(counts.astype(np.float32))
    return buckets, weights / np.linalg.norm(weights)


class Classifier:
    """weights: category [BUCKETS, 9], category_bias [9], high [BUCKETS], high_bias []."""

    def __init__(self, weights: dict[str, Any]) -> None:
        self._category = np.asarray(weights["category"], np.float32)
        self._category_bias = np.asarray(weights["category_bias"], np.float32)
        self._high = np.asarray(weights["high"], np.float32)
        self._high_bias = float(weights["high_bias"])
        if self._category.shape != (BUCKETS, len(CLASSES)) or self._high.shape != (BUCKETS,):
            raise ValueError("weights.npz does not fit this version: run the training again")

    def judge(self, text: str) -> Opinion:
        """What the classifier makes of one normalised text."""
        buckets, values = features(text)
        logits = values @ self._category[buckets] + self._category_bias
        odds = np.exp(logits - logits.max())
        probability = odds / odds.sum()
        high = float(values @ self._high[buckets]) + self._high_bias
        return Opinion(
            risk=float(1 - probability[0]),
            high=float(1 / (1 + np.exp(-high))),
            category=CATEGORIES[int(probability[1:].argmax())],
        )


@lru_cache(maxsize=1)
def classifier() -> Classifier:
    with (
        resources.files(__package__).joinpath("weights.npz").open("rb") as file,
        np.load(file, allow_pickle=False) as stored,
    ):
        return Classifier(dict(stored))
