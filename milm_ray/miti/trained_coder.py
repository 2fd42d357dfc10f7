"""A small trained coder of AnnoMI's labels, and how well it does on sessions it has not seen.

What a therapist mainly does in an utterance, whether it asks, whether it reflects, whether a
reflection is simple or complex, and which way a client's utterance speaks (change, neutral,
sustain). Linear classifiers over `trained_features`, so it trains in seconds on a CPU. It codes
English, as AnnoMI does, and its codes are automatic: they are never pooled with people's.

A session's counts are those of its best guesses, or expected ones (`expected_counts`): logistic
regression without class weights fits probabilities, on the training sessions alone. Against people
the two differ by less than their intervals (the benchmark has both); expected ones shrink the
differences between sessions and have the lower ICC, so the study takes best guesses here.

Published macro F1 for comparison (M3TCM, LREC-COLING 2024): therapist .72 from text and .83 with
audio, client .55 and .66.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from milm_ray.errors import UserError
from milm_ray.miti.agreement import Agreement, cohen_kappa
from milm_ray.miti.annomi import Session, Utterance
from milm_ray.miti.coding_scheme import apply_volley_rules
from milm_ray.miti.expected_counts import expected_counts
from milm_ray.miti.summary import Coding
from milm_ray.miti.trained_features import Context, contexts, features

Task = Literal[
    "main_therapist_behaviour",
    "question_exists",
    "reflection_exists",
    "reflection_subtype",
    "client_talk_type",
]
Speaker = Literal["therapist", "client"]
Counting = Literal["expected", "best guess"]
TASKS: tuple[Task, ...] = (
    "main_therapist_behaviour",
    "question_exists",
    "reflection_exists",
    "reflection_subtype",
    "client_talk_type",
)
COUNTED: tuple[Task, ...] = ("question_exists", "reflection_exists", "reflection_subtype")
_YES = {"question_exists": "True", "reflection_exists": "True", "reflection_subtype": "complex"}
NAME = "trained-en"
SCOPE = ("question", "simple_reflection", "complex_reflection")


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


def _speaker(task: Task) -> Speaker:
    return "client" if task == "client_talk_type" else "therapist"


def labelled(utterance: Utterance, task: Task) -> bool:
    """Whether the task is about this utterance."""
    return (
        utterance.speaker == _speaker(task)
        and utterance.labels[task] != "n/a"
        and (task != "reflection_subtype" or utterance.labels["reflection_exists"] == "True")
    )


class Coder:
    """Trained on sessions; one set of features a speaker, one classifier a task.

    Raises UserError when the sessions hold fewer than two labels of a task.
    """

    def __init__(self, sessions: Sequence[Session], tasks: Sequence[Task] = TASKS) -> None:
        self._features: dict[Speaker, Any] = {}
        self._models: dict[Task, Any] = {}
        surroundings = [contexts(session) for session in sessions]
        for speaker in dict.fromkeys(map(_speaker, tasks)):
            spoken = [
                (utterance, around[utterance.number])
                for session, around in zip(sessions, surroundings, strict=True)
                for utterance in session.utterances
                if utterance.speaker == speaker
            ]
            wanted = [task for task in tasks if _speaker(task) == speaker]
            for task in wanted:
                _check(task, [u.labels[task] for u, _ in spoken if labelled(u, task)])
            union = features()
            table = union.fit_transform([context for _, context in spoken]).tocsr()
            self._features[speaker] = union
            for task in wanted:
                used = [n for n, (utterance, _) in enumerate(spoken) if labelled(utterance, task)]
                labels = [spoken[n][0].labels[task] for n in used]
                self._models[task] = _classifier(task).fit(table[used], labels)

    def read(self, asked: Sequence[Context], speaker: Speaker) -> Any:
        """The features of a speaker's utterances, for `label` and `probability`."""
        return self._features[speaker].transform(asked)

    def label(self, task: Task, read: Any) -> list[str]:
        """The best guess for each utterance."""
        return [str(label) for label in self._models[task].predict(read)]

    def probability(self, task: Task, read: Any) -> NDArray[np.float64]:
        """How probable a question, a reflection, or a complex one (if a reflection) is."""
        model = self._models[task]
        return np.asarray(model.predict_proba(read)[:, list(model.classes_).index(_YES[task])])


def _check(task: Task, labels: Sequence[str]) -> None:
    if len(set(labels)) < 2:
        raise UserError(
            f"{task}: {len(labels)} labelled utterances with {len(set(labels))} different labels",
            "train on more sessions of AnnoMI-full.csv",
        )


def _classifier(task: Task) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    if task in COUNTED:
        return LogisticRegression(C=1.0, solver="liblinear", tol=1e-3)
    # Balanced: the rarer labels (reflections, change talk) are the ones a study is after.
    return LinearSVC(C=0.1, class_weight="balanced")


def folds(sessions: Sequence[Session], count: int, seed: int) -> list[list[int]]:
    """Positions of the sessions, split at random into `count` parts: no session is in two."""
    if not 2 <= count <= len(sessions):
        raise UserError(
            f"{len(sessions)} sessions cannot be split into {count} folds",
            "choose between 2 and the number of sessions",
        )
    order = np.random.default_rng(seed).permutation(len(sessions))
    return [sorted(part.tolist()) for part in np.array_split(order, count)]


@dataclass(frozen=True)
class Unseen:
    """What coders said of one session that they were not trained on.

    labels: by task, a guess for every utterance of the task's speaker, by its number;
    probabilities: the same for the tasks that are counted.
    """

    session: Session
    labels: Mapping[Task, Mapping[int, str]]
    probabilities: Mapping[Task, Mapping[int, float]]

    def coding(self, counting: Counting = "best guess") -> Coding:
        """The session's automatic coding; its group is the session's quality."""
        counts = self._expected() if counting == "expected" else self._guessed()
        return Coding(
            self.session.transcript_id,
            NAME,
            self.session.quality,
            counts,
            rounds=self.session.rounds(),
            automatic=True,
            scope=SCOPE,
        )

    def _volleys(self) -> list[list[int]]:
        """The utterance numbers of each therapist volley."""
        return [
            [utterance.number for utterance in utterances]
            for speaker, utterances in self.session.volleys()
            if speaker == "therapist"
        ]

    def _expected(self) -> dict[str, float]:
        volleys = []
        for numbers in self._volleys():
            asks, reflects, adds = (
                np.array([self.probabilities[task][n] for n in numbers]) for task in COUNTED
            )
            volleys.append(
                {
                    "question": asks,
                    "simple_reflection": reflects * (1 - adds),
                    "complex_reflection": reflects * adds,
                }
            )
        return expected_counts(volleys)

    def _guessed(self) -> dict[str, float]:
        counts: dict[str, float] = {}
        for numbers in self._volleys():
            codes = []
            for n in numbers:
                if self.labels["question_exists"][n] == "True":
                    codes.append("question")
                if self.labels["reflection_exists"][n] == "True":
                    codes.append(f"{self.labels['reflection_subtype'][n]}_reflection")
            for code in apply_volley_rules(codes):
                counts[code] = counts.get(code, 0) + 1
        return counts


def _unseen(coder: Coder, session: Session, tasks: Sequence[Task]) -> Unseen:
    around = contexts(session)
    labels: dict[Task, dict[int, str]] = {task: {} for task in tasks}
    probabilities: dict[Task, dict[int, float]] = {t: {} for t in tasks if t in COUNTED}
    for speaker in dict.fromkeys(map(_speaker, tasks)):
        numbers = [u.number for u in session.utterances if u.speaker == speaker]
        if not numbers:
            continue
        read = coder.read([around[n] for n in numbers], speaker)
        for task in tasks:
            if _speaker(task) == speaker:
                labels[task] = dict(zip(numbers, coder.label(task, read), strict=True))
                if task in COUNTED:
                    found = coder.probability(task, read).tolist()
                    probabilities[task] = dict(zip(numbers, found, strict=True))
    return Unseen(session, labels, probabilities)


def out_of_fold(
    sessions: Sequence[Session],
    *,
    tasks: Sequence[Task] = TASKS,
    count: int = 10,
    seed: int = 0,
) -> list[Unseen]:
    """Every session as coders trained on the other folds see it, in the given order.

    Split by session, since a session's speakers and topic would give its utterances away.
    """
    found: dict[int, Unseen] = {}
    for part in folds(sessions, count, seed):
        held_out = set(part)
        coder = Coder([s for i, s in enumerate(sessions) if i not in held_out], tasks)
        found |= {i: _unseen(coder, sessions[i], tasks) for i in part}
    return [found[i] for i in range(len(sessions))]


def validate(unseen: Sequence[Unseen], task: Task) -> Validation:
    """The scores of one task over all out-of-fold predictions together."""
    from sklearn.metrics import accuracy_score, f1_score

    rows = [
        (utterance.labels[task], each.labels[task][utterance.number], each.session.transcript_id)
        for each in unseen
        for utterance in each.session.utterances
        if labelled(utterance, task)
    ]
    true, predicted, clusters = ([row[k] for row in rows] for k in range(3))
    names = sorted(set(true))
    each_f1 = f1_score(true, predicted, labels=names, average=None, zero_division=0)
    return Validation(
        task,
        len(true),
        len(set(clusters)),
        float(accuracy_score(true, predicted)),
        float(each_f1.mean()),
        dict(zip(names, each_f1.tolist(), strict=True)),
        {name: true.count(name) for name in names},
        cohen_kappa(true, predicted, clusters),
    )


def code_unseen(sessions: Sequence[Session], wanted: Collection[str]) -> list[Coding]:
    """Automatic codings of the sessions named in `wanted`, each by a coder that has not seen it.

    Out of fold over all sessions, as the coder was validated: what it says of a session then does
    not depend on which others are wanted, and wanting them all leaves enough to train on.
    """
    found = out_of_fold(sessions, tasks=COUNTED, count=min(10, len(sessions)))
    return [each.coding() for each in found if each.session.transcript_id in wanted]
