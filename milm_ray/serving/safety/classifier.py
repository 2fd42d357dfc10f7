"""The small classifier beside the rules: n-grams, logistic regression, numpy only.

It catches wording that no rule foresaw. On the same features: how probable any risk is, how
probable high risk is, and which category. Weights are a plain .npz (no pickle) made by train.py.
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

_ORDERS = (1, 2, 3)
_WORD = re.compile(r"[a-z']+")
# A clock time and a decimal come as two numbers with a break between them.
_NUMBER = re.compile(r"[0-9]+(?:，[0-9]+)*")
_CODE = re.compile(r"(?<![0-9a-z])(?:[0-9]+[a-z]+[0-9]|[a-z]+[0-9]+[a-z])[0-9a-z]*")
LONGEST = 400  # characters of a text; a longer one is read in windows by the caller


@dataclass(frozen=True, slots=True)
class Opinion:
    """`risk`: P(any category); `high`: P(high risk); `category`: the likeliest one."""

    risk: float
    high: float
    category: Category


def features(text: str, answer: str = "") -> np.ndarray:
    """The keys, ascending, uint32 [n], of what a normalised text is made of.

    Character 1- to 3-grams; of words in Latin letters, whose letters alone say nothing, the
    words and their pairs instead; of a number how long it is, since 23:40 and 64.3 name no risk
    by their digits; of a code, as of a parcel, that it is one. `answer`, the last of several
    turns that `text` joins, counts once more and apart: what it says settles what the others
    meant. A key is the CRC-32 of its gram.
    """
    grams = _grams(text)
    if answer:
        grams |= {f"A{gram}" for gram in _grams(answer)}
    hashed = {zlib.crc32(gram.encode("utf-8", "replace")) for gram in grams}
    return np.asarray(sorted(hashed), np.uint32)


def _grams(text: str) -> set[str]:
    text = _CODE.sub("0000", text[-LONGEST:])
    text = _NUMBER.sub(lambda m: "0" * min(len(m.group().split("，")[0]), 4), text)
    words = _WORD.findall(text)
    grams = {*words, *(f"{first} {second}" for first, second in itertools.pairwise(words))}
    text = f"^{_WORD.sub('_', text)}$"
    return grams | {text[i : i + n] for n in _ORDERS for i in range(len(text) - n + 1)}


def length(squares: Any, strange: Any, rarity: np.ndarray) -> Any:
    """The length to scale a text by: of its known features' squares and of how many are strange."""
    return np.sqrt(np.maximum(squares + strange * float(rarity.max()) ** 2, 1e-9))


class Classifier:
    """The arrays of weights.npz, of n known features.

    keys: uint32 [n], ascending; rarity: float16 [n], what a feature counts before a text's are
    scaled to length 1; weights: int8 [n, 2 + 8] in units of scale [2 + 8], and bias [2 + 8], of
    the log odds of risk and of high risk, and of the categories. A feature not known says nothing,
    but makes the others count less: a text of strange words must not be judged by the one that is
    known.
    """

    def __init__(self, stored: dict[str, Any]) -> None:
        self._keys = np.asarray(stored["keys"], np.uint32)
        self._rarity = np.asarray(stored["rarity"], np.float32)
        self._weights = np.asarray(stored["weights"])
        self._scale = np.asarray(stored["scale"], np.float32)
        self._bias = np.asarray(stored["bias"], np.float32)
        if self._weights.shape != (len(self._keys), 2 + len(CATEGORIES)):
            raise ValueError("weights.npz does not fit this version: run the training again")

    def judge(self, text: str, answer: str = "") -> Opinion:
        """What the classifier makes of one normalised text (see `features`)."""
        keys = features(text, answer)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        at = at[self._keys[at] == keys]
        values = self._rarity[at]
        values = values / length(values @ values, len(keys) - len(at), self._rarity)
        odds = (values @ self._weights[at].astype(np.float32)) * self._scale + self._bias
        risk, high = 1 / (1 + np.exp(-odds[:2]))
        return Opinion(float(risk), float(high), CATEGORIES[int(odds[2:].argmax())])


@lru_cache(maxsize=1)
def classifier() -> Classifier:
    with (
        resources.files(__package__).joinpath("weights.npz").open("rb") as file,
        np.load(file, allow_pickle=False) as stored,
    ):
        return Classifier(dict(stored))
