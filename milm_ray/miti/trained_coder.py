"""A small trained coder of AnnoMI's labels, and how well it does on sessions it has not seen.

Three tasks: what a therapist mainly does in an utterance, whether a reflection is simple or
complex, and which way a client's utterance speaks (change, neutral, sustain). Words and character
n-grams of the utterance and of what the other speaker said before go into a linear classifier, so
it trains in a second on a CPU. It codes English, as AnnoMI does, and its codes are automatic: they
are never pooled with people's.

Published macro F1 for comparison (M3TCM, LREC-COLING 2024): therapist .72 from text and .83 with
audio, client .55 and .66.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from milm_ray.errors import UserError
from milm_ray.miti.agreement import Agreement, cohen_kappa
from milm_ray.miti.annomi import Session, Utterance
from milm_ray.miti.coding_scheme import apply_volley_rules
from milm_ray.miti.summary import Coding

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

Task = Literal["main_therapist_behaviour", "reflection_subtype", "client_talk_type"]
TASKS: tuple[Task, ...] = ("main_therapist_behaviour", "reflection_subtype", "client_talk_type")
_SPEAKER = {"client_talk_type": "client"}
_REFLECTIONS = {"simple": "simple_reflection", "complex": "complex_reflection"}
NAME = "trained-en"
SCOPE = ("question", "simple_reflection", "complex_reflection")
Example = tuple[str, str]  # the utterance, and what the other speaker said before it


@dataclass(frozen=True)
class Validation:
    """Out-of-fold results of one task; f1 by label, counts of the true labels."""

    task: Task
    utterances: int
    sessions: int
    accuracy: float
    macro_f1: float
    f1: dict[str, float]
    counts: dict[str, int]
    kappa: Agreement


def examples(session: Session, task: Task) -> list[tuple[Example, str]]:
    """The utterances of a session that the task labels, with their labels."""
    return [
        (example, utterance.labels[task])
        for utterance, example in _with_context(session)
        if utterance.speaker == _SPEAKER.get(task, "therapist")
        and utterance.labels[task] != "n/a"
        and (task != "reflection_subtype" or utterance.labels["reflection_exists"] == "True")
    ]


def _with_context(session: Session) -> list[tuple[Utterance, Example]]:
    found = []
    before = {"client": "", "therapist": ""}
    for utterance in session.utterances:
        other = "client" if utterance.speaker == "therapist" else "therapist"
        found.append((utterance, (utterance.text, before[other])))
        before[utterance.speaker] = utterance.text
    return found


def train(sessions: Sequence[Session], task: Task) -> Pipeline:
    """A classifier of the task's labels. Raises UserError when the sessions hold fewer than two."""
    rows = [row for session in sessions for row in examples(session, task)]
    labels = [label for _, label in rows]
    if len(set(labels)) < 2:
        raise UserError(
            f"{task}: {len(rows)} labelled utterances with {len(set(labels))} different labels",
            "train on more sessions of AnnoMI-full.csv",
        )
    model = _pipeline()
    model.fit([example for example, _ in rows], labels)
    return model


def _pipeline() -> Pipeline:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import FeatureUnion, Pipeline
    from sklearn.svm import LinearSVC

    words = r"\w+|[?!…]"
    features = FeatureUnion(
        [
            (
                "words",
                TfidfVectorizer(
                    preprocessor=_utterance,
                    token_pattern=words,
                    ngram_range=(1, 2),
                    sublinear_tf=True,
                ),
            ),
            (
                "characters",
                TfidfVectorizer(
                    preprocessor=_utterance,
                    analyzer="char_wb",
                    ngram_range=(2, 4),
                    min_df=3,
                    sublinear_tf=True,
                ),
            ),
            (
                "before",
                TfidfVectorizer(preprocessor=_before, token_pattern=words, sublinear_tf=True),
            ),
        ],
        transformer_weights={"words": 1.0, "characters": 1.0, "before": 0.5},
    )
    # Balanced: the rarer labels (reflections, change talk) are the ones a study is after.
    return Pipeline(
        [
            ("features", features),
            ("classify", LinearSVC(C=0.25, class_weight="balanced")),
        ]
    )


def _utterance(example: Example) -> str:
    return example[0].lower()


def _before(example: Example) -> str:
    return example[1].lower() or "startofsession"


def folds(sessions: Sequence[Session], count: int, seed: int) -> list[list[int]]:
    """Positions of the sessions, split at random into `count` parts: no session is in two."""
    if not 2 <= count <= len(sessions):
        raise UserError(
            f"{len(sessions)} sessions cannot be split into {count} folds",
            "choose between 2 and the number of sessions",
        )
    order = np.random.default_rng(seed).permutation(len(sessions))
    return [sorted(part.tolist()) for part in np.array_split(order, count)]


def cross_validate(
    sessions: Sequence[Session], task: Task, *, count: int = 10, seed: int = 0
) -> Validation:
    """Train on all folds but one, predict that one, and score all predictions together.

    Split by session, since a session's speakers and topic would give its utterances away.
    """
    from sklearn.metrics import accuracy_score, f1_score

    true: list[str] = []
    predicted: list[str] = []
    clusters: list[str] = []
    for part in folds(sessions, count, seed):
        held_out = set(part)
        model = train([s for i, s in enumerate(sessions) if i not in held_out], task)
        for i in part:
            rows = examples(sessions[i], task)
            if rows:
                true += [label for _, label in rows]
                predicted += model.predict([example for example, _ in rows]).tolist()
                clusters += [sessions[i].transcript_id] * len(rows)
    labels = sorted(set(true))
    each = f1_score(true, predicted, labels=labels, average=None, zero_division=0)
    return Validation(
        task,
        len(true),
        len(set(clusters)),
        float(accuracy_score(true, predicted)),
        float(each.mean()),
        dict(zip(labels, each.tolist(), strict=True)),
        {label: true.count(label) for label in labels},
        cohen_kappa(true, predicted, clusters),
    )


def code_unseen(sessions: Sequence[Session], *, count: int = 10, seed: int = 0) -> list[Coding]:
    """Automatic codings of every session by models that were not trained on it.

    Questions, simple and complex reflections by the rules of the volley; the group is the
    session's quality. Sessions stand in the given order.
    """
    codings: dict[int, Coding] = {}
    for part in folds(sessions, count, seed):
        held_out = set(part)
        rest = [s for i, s in enumerate(sessions) if i not in held_out]
        behaviour = train(rest, "main_therapist_behaviour")
        kind = train(rest, "reflection_subtype")
        for i in part:
            codings[i] = _code(sessions[i], behaviour, kind)
    return [codings[i] for i in range(len(sessions))]


def code_held_out(sessions: Sequence[Session], held_out: Collection[str]) -> list[Coding]:
    """Automatic codings of the sessions named in `held_out`, by models trained on all others."""
    rest = [s for s in sessions if s.transcript_id not in held_out]
    behaviour, kind = train(rest, "main_therapist_behaviour"), train(rest, "reflection_subtype")
    return [_code(s, behaviour, kind) for s in sessions if s.transcript_id in held_out]


def _code(session: Session, behaviour: Pipeline, kind: Pipeline) -> Coding:
    context = {u.number: example for u, example in _with_context(session)}
    counts: dict[str, int] = {}
    for speaker, utterances in session.volleys():
        if speaker != "therapist":
            continue
        texts = [context[u.number] for u in utterances]
        codes = []
        for main, subtype in zip(behaviour.predict(texts), kind.predict(texts), strict=True):
            if main == "question":
                codes.append("question")
            elif main == "reflection":
                codes.append(_REFLECTIONS[subtype])
        for code in apply_volley_rules(codes):
            counts[code] = counts.get(code, 0) + 1
    return Coding(
        session.transcript_id,
        NAME,
        session.quality,
        counts,
        rounds=session.rounds(),
        automatic=True,
        scope=SCOPE,
    )
