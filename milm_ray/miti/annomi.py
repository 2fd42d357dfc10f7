"""AnnoMI's labels as far as MITI can use them, and what its sessions look like.

AnnoMI (Wu et al. 2022) is 133 demonstration videos of high and low MI quality, labelled by the
utterance with a scheme of its own. Some of it carries over to MITI counts; affirming, seeking
collaboration, emphasising autonomy, confronting and the four global scores do not, and advice
cannot be told into persuasion with and without permission. So of the summary scores only the two
that rest on questions and reflections are defined here.
"""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from milm_ray.errors import UserError
from milm_ray.miti.coding_scheme import apply_volley_rules
from milm_ray.miti.summary import Spread, spread, summary_scores

Quality = Literal["high", "low"]
COLUMNS = (
    "mi_quality",
    "transcript_id",
    "topic",
    "utterance_id",
    "interlocutor",
    "utterance_text",
    "annotator_id",
    "therapist_input_exists",
    "therapist_input_subtype",
    "reflection_exists",
    "reflection_subtype",
    "question_exists",
    "question_subtype",
    "main_therapist_behaviour",
    "client_talk_type",
)
MEASURES = ("complex_reflection_ratio", "reflection_to_question")
MAPPED = ("gi", "question", "simple_reflection", "complex_reflection")  # what carries over
# Labels without one MITI code: counted by name, never guessed.
UNMAPPED = ("advice", "options", "negotiation")
_CAUTIOUS = ("False", "simple")  # what a tie falls to, as the manual decides when unsure
_INPUT = {"information": "gi"}
_REFLECTION = {"simple": "simple_reflection", "complex": "complex_reflection"}


@dataclass(frozen=True)
class Utterance:
    """One utterance with the labels of its annotators, majority by field."""

    number: int
    speaker: Literal["therapist", "client"]
    text: str
    labels: Mapping[str, str]
    votes: Mapping[str, tuple[str, ...]]

    def codes(self) -> list[str]:
        """MITI codes of a therapist's utterance; empty for what does not carry over."""
        found = []
        if self.labels["therapist_input_exists"] == "True":
            found.append(_INPUT.get(self.labels["therapist_input_subtype"], ""))
        if self.labels["reflection_exists"] == "True":
            found.append(_REFLECTION.get(self.labels["reflection_subtype"], ""))
        if self.labels["question_exists"] == "True":
            found.append("question")
        return [code for code in found if code]


@dataclass(frozen=True)
class Session:
    """One video's utterances in order."""

    transcript_id: str
    quality: Quality
    topic: str
    utterances: tuple[Utterance, ...]

    def volleys(self) -> list[tuple[str, list[Utterance]]]:
        """Neighbouring utterances of one speaker, with the speaker."""
        joined: list[tuple[str, list[Utterance]]] = []
        for utterance in self.utterances:
            if joined and joined[-1][0] == utterance.speaker:
                joined[-1][1].append(utterance)
            else:
                joined.append((utterance.speaker, [utterance]))
        return joined

    def counts(self) -> dict[str, int]:
        """MITI counts (gi, question, simple and complex reflection) by the rules of the volley."""
        total: Counter[str] = Counter()
        for speaker, utterances in self.volleys():
            if speaker == "therapist":
                total.update(apply_volley_rules(c for u in utterances for c in u.codes()))
        return dict(total)

    def unmapped(self) -> dict[str, int]:
        """Therapist utterances whose label has no one MITI code, by label."""
        found = [u.labels["therapist_input_subtype"] for u in self.utterances]
        return {label: found.count(label) for label in UNMAPPED}

    def scores(self) -> dict[str, float | None]:
        """The summary scores that AnnoMI's labels can carry; None where undefined."""
        scores = summary_scores(self.counts(), {})
        return {measure: scores[measure] for measure in MEASURES}

    def rounds(self) -> int:
        """Client-therapist exchanges, as in Table 4: therapist volleys that answer a client."""
        speakers = [speaker for speaker, _ in self.volleys()]
        return sum(pair == ("client", "therapist") for pair in pairwise(speakers))

    def words(self, speaker: Literal["therapist", "client"]) -> float | None:
        """Mean English words in a volley of the speaker; None when they never speak."""
        lengths = [
            sum(len(u.text.split()) for u in utterances)
            for who, utterances in self.volleys()
            if who == speaker
        ]
        return sum(lengths) / len(lengths) if lengths else None


def read(path: Path) -> list[Session]:
    """The sessions of AnnoMI-full.csv, in file order, one set of labels an utterance.

    Seven transcripts carry ten annotators each; a field's label is the one most of them gave,
    in a tie the more cautious one, else the first in the file.
    Raises UserError naming what is missing.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise UserError(
                    f"{path} has no column {', '.join(missing)}",
                    "use AnnoMI-full.csv: AnnoMI-simple.csv has no reflection subtypes",
                )
            rows: dict[str, dict[int, list[dict[str, str]]]] = defaultdict(
                lambda: defaultdict(list)
            )
            for row in reader:
                rows[row["transcript_id"]][int(row["utterance_id"])].append(row)
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read: {error}", "give the path of AnnoMI-full.csv"
        ) from error
    return [_session(transcript, utterances) for transcript, utterances in rows.items()]


def _session(transcript: str, utterances: Mapping[int, list[dict[str, str]]]) -> Session:
    found = []
    for number in sorted(utterances):
        rows = utterances[number]
        votes = {name: tuple(row[name] for row in rows) for name in COLUMNS[7:]}
        labels = {name: _majority(name, given) for name, given in votes.items()}
        speaker: Literal["therapist", "client"] = (
            "therapist" if rows[0]["interlocutor"] == "therapist" else "client"
        )
        found.append(Utterance(number, speaker, rows[0]["utterance_text"], labels, votes))
    first = utterances[min(utterances)][0]
    quality: Quality = "high" if first["mi_quality"] == "high" else "low"
    return Session(transcript, quality, first["topic"].strip(), tuple(found))


def _majority(field: str, given: Sequence[str]) -> str:
    """The label that most gave. A subtype is decided by those who gave one."""
    if field.endswith("_subtype"):
        given = [label for label in given if label != "n/a"] or given
    counts = Counter(given)
    tied = [label for label, n in counts.items() if n == max(counts.values())]
    return next((label for label in _CAUTIOUS if label in tied), tied[0])


def statistics(sessions: Sequence[Session]) -> dict[str, Spread]:
    """Rounds and words a volley over sessions, for the row of real dialogues in Table 4."""
    return {
        "rounds": spread([s.rounds() for s in sessions]),
        "client_words": spread([s.words("client") for s in sessions]),
        "therapist_words": spread([s.words("therapist") for s in sessions]),
    }


def by_quality(sessions: Sequence[Session]) -> dict[Quality, dict[str, Spread]]:
    """The two defined summary scores of high- and low-quality sessions: high should lead."""
    qualities: tuple[Quality, ...] = ("high", "low")
    return {
        quality: {
            measure: spread([s.scores()[measure] for s in sessions if s.quality == quality])
            for measure in MEASURES
        }
        for quality in qualities
    }


def ratings(sessions: Iterable[Session], field: str) -> tuple[list[tuple[str, ...]], list[str]]:
    """Every annotator's label of each utterance that more than one labelled, and its transcript.

    field: one of the label columns; "n/a" everywhere (the other speaker's field) is left out.
    The input of `agreement.fleiss_kappa`: how far people agree bounds what a model can reach.
    """
    labels, clusters = [], []
    for session in sessions:
        for utterance in session.utterances:
            given = utterance.votes[field]
            if len(given) > 1 and set(given) != {"n/a"}:
                labels.append(given)
                clusters.append(session.transcript_id)
    return labels, clusters
