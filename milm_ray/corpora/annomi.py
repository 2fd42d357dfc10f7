"""AnnoMI: a CSV of English demonstration sessions, one utterance a row.

AnnoMI-full repeats the utterances of seven sessions once per annotator; AnnoMI-simple does not.
Neighbouring utterances of one speaker are one volley.
"""

from __future__ import annotations

import csv
import io
from itertools import islice

from milm_ray.corpora.reading import Pair, Parsed, Reader, Unusable, role_of
from milm_ray.schema import Role

_ROLES: dict[str, Role] = {"client": "client", "therapist": "counselor"}
_COLUMNS = ("transcript_id", "topic", "utterance_id", "interlocutor", "utterance_text")


def _parse(parsed: Parsed, text: str, limit: int | None) -> None:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    missing = [name for name in _COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        raise Unusable("wrong_shape", f"no column {', '.join(missing)}")
    sessions: dict[str, dict[int, dict[str, str]]] = {}
    annotators: dict[str, int] = {}
    try:
        for row in rows:
            session = sessions.setdefault(row["transcript_id"], {})
            try:
                number = int(row["utterance_id"])
            except (TypeError, ValueError):
                raise Unusable(
                    "wrong_shape", f"line {rows.line_num}: utterance_id is {row['utterance_id']!r}"
                ) from None
            if number in session:
                annotators[row["transcript_id"]] = annotators.get(row["transcript_id"], 0) + 1
            else:
                session[number] = row
    except csv.Error as error:
        parsed.reject("broken_csv", "", f"line {rows.line_num}: {error}")
    for session_id, utterances in islice(sessions.items(), limit):
        ordered = [utterances[number] for number in sorted(utterances)]
        try:
            pairs: list[Pair] = [
                (role_of(_ROLES, row["interlocutor"]), row["utterance_text"] or "")
                for row in ordered
            ]
        except Unusable as error:
            parsed.reject(error.reason, session_id, error.detail, str(ordered[0]))
            continue
        repeated = annotators.get(session_id, 0)
        repaired = {"rows_of_further_annotators_dropped": repeated} if repeated else {}
        parsed.add(session_id, pairs, (ordered[0]["topic"] or "").strip(), repaired)


READER = Reader(
    "annomi",
    "AnnoMI",
    ("AnnoMI-simple.csv", "AnnoMI-full.csv", "*.csv", "*.csv.gz"),
    _parse,
    one_per_file=False,
)
