"""A small trained coder for Chinese counselors: one MITI code, or none, for every utterance.

It learns from 598 utterances of the shipped sample dialogues, each coded once for this project and
not by trained MITI coders, and trains in a second on a CPU. It gives nine of the ten codes
(persuading with permission occurs once in its material) and no global scores. Its codes are
automatic: they show that a study runs and roughly what a model does, and they are never pooled with
people's.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from milm_ray.miti.agreement import Agreement, cohen_kappa
from milm_ray.miti.coding_scheme import CODE_NAMES, MAX_CODES_PER_VOLLEY, code_name
from milm_ray.miti.expected_counts import expected_counts
from milm_ray.miti.packet import Item

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

NAME = "trained-zh"
NONE = "none"
SCOPE = tuple(code for code in CODE_NAMES if code != "persuade_with_permission")
# Out of fold, by source dialogue (`validate`); a test recomputes it. Six classifiers were tried.
VALIDATED: dict[str, Any] = {
    "utterances": 598,
    "dialogues": 29,
    "macro_f1": 0.54,
    "kappa": 0.60,
    "f1": {
        "affirm": 0.38,
        "complex_reflection": 0.72,
        "confront": 0.19,
        "emphasize_autonomy": 0.65,
        "gi": 0.40,
        "none": 0.58,
        "persuade": 0.79,
        "question": 0.94,
        "seek": 0.43,
        "simple_reflection": 0.31,
    },
    # Of the utterances: labelled so, best guessed so, and the sum of how probable it is.
    "totals": {
        "affirm": [49, 29, 44],
        "complex_reflection": [175, 263, 221],
        "confront": [28, 14, 20],
        "emphasize_autonomy": [30, 16, 25],
        "gi": [45, 25, 34],
        "none": [22, 26, 18],
        "persuade": [62, 62, 55],
        "question": [126, 140, 132],
        "seek": [11, 3, 8],
        "simple_reflection": [50, 20, 40],
    },
}
_FILE = "utterances.zh.csv"
Example = tuple[str, str]  # the utterance, and the client's words before its volley


@dataclass(frozen=True)
class Validation:
    """Out-of-fold results by code (none among them): f1, count, best guesses, expected count."""

    utterances: int
    dialogues: int
    accuracy: float
    macro_f1: float
    f1: dict[str, float]
    counts: dict[str, int]
    guessed: dict[str, int]
    expected: dict[str, float]
    kappa: Agreement


@cache
def examples() -> tuple[list[Example], list[str], list[str]]:
    """The shipped utterances, their codes (or NONE) and the source dialogue of each.

    An MI rewrite and the ordinary dialogue that it was made from count as one dialogue.
    """
    text = files("milm_ray.miti").joinpath(_FILE).read_text(encoding="utf-8")
    rows = [row for row in csv.DictReader(io.StringIO(text)) if row["code"] != "PWP"]
    return (
        [(row["utterance"], row["client"]) for row in rows],
        [code_name(row["code"]) or NONE for row in rows],
        [row["dialogue"].removesuffix("-mi") for row in rows],
    )


@cache
def trained() -> Pipeline:
    """The coder, trained on all examples."""
    texts, codes, _ = examples()
    return _pipeline().fit(texts, codes)


@cache
def weighing() -> Pipeline:
    """The same features under a classifier that says how probable each code is."""
    texts, codes, _ = examples()
    return _pipeline(weighing=True).fit(texts, codes)


def _pipeline(*, weighing: bool = False) -> Pipeline:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import FeatureUnion, Pipeline
    from sklearn.preprocessing import FunctionTransformer
    from sklearn.svm import LinearSVC

    features = FeatureUnion(
        [
            (
                "characters",
                TfidfVectorizer(
                    preprocessor=_utterance, analyzer="char", ngram_range=(1, 3), sublinear_tf=True
                ),
            ),
            ("marks", FunctionTransformer(_marks)),
        ]
    )
    if weighing:  # without class weights, since these would bend the probabilities
        each = LogisticRegression(C=10, solver="liblinear", tol=1e-3)
        return Pipeline([("features", features), ("classify", OneVsRestClassifier(each))])
    # Balanced: the rarer codes are the ones a study is after.
    return Pipeline(
        [
            ("features", features),
            ("classify", LinearSVC(C=0.5, class_weight="balanced")),
        ]
    )


def _utterance(example: Example) -> str:
    return f"^{example[0]}$"


def _marks(batch: Sequence[Example]) -> np.ndarray:
    """Length, whether it asks, and how much of it the client has just said."""
    rows = []
    for text, before in batch:
        grams = {text[i : i + 2] for i in range(len(text) - 1)}
        said = {before[i : i + 2] for i in range(len(before) - 1)}
        rows.append(
            [len(text) / 50, float(text[-1:] in "？?"), len(grams & said) / max(1, len(grams))]
        )
    return np.array(rows)


def validate(folds: int = 10, seed: int = 0) -> Validation:
    """Cross-validated by source dialogue: no client is in training and test at once."""
    from sklearn.metrics import accuracy_score, f1_score

    texts, codes, dialogues = examples()
    names = sorted(set(dialogues))
    order = np.random.default_rng(seed).permutation(len(names))
    predicted = [""] * len(codes)
    expected = dict.fromkeys(sorted(set(codes)), 0.0)
    for part in np.array_split(order, folds):
        held_out = {names[i] for i in part}
        test = [i for i, dialogue in enumerate(dialogues) if dialogue in held_out]
        rest = [i for i, dialogue in enumerate(dialogues) if dialogue not in held_out]
        model = _pipeline().fit([texts[i] for i in rest], [codes[i] for i in rest])
        for i, code in zip(test, model.predict([texts[i] for i in test]), strict=True):
            predicted[i] = str(code)
        model = _pipeline(weighing=True).fit([texts[i] for i in rest], [codes[i] for i in rest])
        sums = model.predict_proba([texts[i] for i in test]).sum(axis=0)
        for code, n in zip(model.classes_, sums.tolist(), strict=True):
            expected[str(code)] += n
    labels = sorted(set(codes))
    each = f1_score(codes, predicted, labels=labels, average=None, zero_division=0)
    return Validation(
        len(codes),
        len(names),
        float(accuracy_score(codes, predicted)),
        float(each.mean()),
        dict(zip(labels, each.tolist(), strict=True)),
        {label: codes.count(label) for label in labels},
        {label: predicted.count(label) for label in labels},
        expected,
        cohen_kappa(codes, predicted, dialogues),
    )


def code_item(item: Item) -> dict[tuple[int, int], str]:
    """Codes by (volley, utterance) of a dialogue, by the rules of the volley.

    An utterance whose code its volley already has, or a simple reflection beside a complex one,
    stays without a code.
    """
    found: dict[tuple[int, int], str] = {}
    predicted = iter(trained().predict(_asked(item)))
    for volley in item.volleys:
        if volley.role == "client":
            continue
        codes = [str(next(predicted)) for _ in volley.utterances]
        given: set[str] = set()
        for number, code in enumerate(codes, 1):
            beaten = code == "simple_reflection" and "complex_reflection" in codes
            full = len(given) == MAX_CODES_PER_VOLLEY
            if code != NONE and not beaten and code not in given and not full:
                given.add(code)
                found[volley.number, number] = code
    return found


def expected(item: Item) -> dict[str, float]:
    """Expected counts of a dialogue by code, by the rules of the volley.

    Best guesses call a complex reflection too often and the rarer codes too seldom; summed
    probabilities do so less: over the 29 source dialogues, out of fold, people's labels
    hold 175 complex and 50 simple reflections, best guesses 263 and 20, expected counts 221 and 40.
    """
    model = weighing()
    found = iter(model.predict_proba(_asked(item)))
    volleys = []
    for volley in item.volleys:
        if volley.role == "counselor":
            table = np.array([next(found) for _ in volley.utterances])
            volleys.append({code: table[:, k] for k, code in enumerate(model.classes_)})
    return {code: n for code, n in expected_counts(volleys).items() if code != NONE}


def _asked(item: Item) -> list[Example]:
    """The counselor's utterances in order, with the client's words before their volley."""
    before, asked = "", []
    for volley in item.volleys:
        if volley.role == "client":
            before = "".join(volley.utterances)
        else:
            asked += [(text, before) for text in volley.utterances]
    return asked
