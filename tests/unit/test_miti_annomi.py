import csv

import pytest

from milm_ray.errors import UserError
from milm_ray.miti import annomi
from milm_ray.miti.agreement import fleiss_kappa

NONE = dict.fromkeys(annomi.COLUMNS[7:], "n/a")


def row(transcript, number, speaker, text, annotator="1", quality="high", **labels):
    given = dict(NONE)
    if speaker == "therapist":
        for name in ("therapist_input_exists", "reflection_exists", "question_exists"):
            given[name] = "False"
        given["main_therapist_behaviour"] = "other"
    else:
        given["client_talk_type"] = "neutral"
    return {
        "mi_quality": quality,
        "transcript_id": transcript,
        "topic": "sleeping better ",
        "utterance_id": number,
        "interlocutor": speaker,
        "utterance_text": text,
        "annotator_id": annotator,
        **given,
        **labels,
    }


def question(kind="open"):
    return {"question_exists": "True", "question_subtype": kind}


def reflection(kind):
    return {"reflection_exists": "True", "reflection_subtype": kind}


def advice(kind):
    return {"therapist_input_exists": "True", "therapist_input_subtype": kind}


def written(tmp_path, rows, columns=annomi.COLUMNS):
    path = tmp_path / "AnnoMI-full.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


SESSION = [
    row("0", 0, "therapist", "Hello there."),
    row("0", 1, "client", "I sleep badly."),
    # One volley of three utterances: two questions are one Q, the complex reflection is kept.
    row("0", 2, "therapist", "You sleep badly. How so?", **question(), **reflection("simple")),
    row("0", 3, "therapist", "And it wears you out?", **question(), **reflection("complex")),
    row("0", 4, "therapist", "Adults need seven hours.", **advice("information")),
    row("0", 5, "client", "Right."),
    row("0", 6, "therapist", "Try tea. Or not?", **advice("advice"), **question("closed")),
]


def test_labels_become_counts_by_the_rules_of_the_volley(tmp_path):
    (session,) = annomi.read(written(tmp_path, SESSION))
    assert session.counts() == {"question": 2, "complex_reflection": 1, "gi": 1}
    assert session.unmapped() == {"advice": 1, "options": 0, "negotiation": 0}
    assert session.scores() == {"complex_reflection_ratio": 1.0, "reflection_to_question": 0.5}
    assert session.topic == "sleeping better"


def test_rounds_and_words_are_of_volleys(tmp_path):
    sessions = annomi.read(written(tmp_path, SESSION))
    found = annomi.statistics(sessions)
    assert found["rounds"].mean == 2  # the opening hello answers nobody
    assert found["client_words"].mean == 2  # 3 and 1
    assert found["therapist_words"].mean == pytest.approx((2 + 14 + 4) / 3)


def test_annotators_are_reduced_to_their_majority(tmp_path):
    votes = [question(), question(), question(), {}, {}]
    kinds = [reflection("complex"), reflection("simple"), {}, {}, reflection("complex")]
    tie = [reflection("complex"), reflection("simple"), reflection("complex"), reflection("simple")]
    rows = [row("7", 0, "client", "Hm.")]
    rows += [row("7", 1, "therapist", "So?", str(i), **v) for i, v in enumerate(votes)]
    rows += [row("7", 2, "client", "Hm.")]
    rows += [row("7", 3, "therapist", "You doubt it.", str(i), **v) for i, v in enumerate(kinds)]
    rows += [row("7", 4, "client", "Hm.")]
    rows += [row("7", 5, "therapist", "You doubt.", str(i), **v) for i, v in enumerate(tie)]
    (session,) = annomi.read(written(tmp_path, rows))
    assert len(session.utterances) == 6
    # Three of five saw a reflection, two of those complex; the tie falls to simple.
    assert session.counts() == {"question": 1, "complex_reflection": 1, "simple_reflection": 1}


def test_agreement_is_over_utterances_with_several_annotators(tmp_path):
    rows = [
        row("7", n, "therapist", "So?", str(i), main_therapist_behaviour=label)
        for n, given in enumerate(
            [("question", "question"), ("other", "other"), ("other", "question")]
        )
        for i, label in enumerate(given)
    ]
    rows.append(row("7", 3, "client", "Hm."))
    labels, clusters = annomi.ratings(
        annomi.read(written(tmp_path, rows)), "main_therapist_behaviour"
    )
    assert (len(labels), clusters) == (3, ["7"] * 3)
    assert fleiss_kappa(labels, clusters).value == pytest.approx((2 / 3 - 0.5) / 0.5)


def test_quality_groups_keep_undefined_ratios_out(tmp_path):
    low = [
        row("1", 0, "client", "Hm.", quality="low"),
        row("1", 1, "therapist", "Why? Why?", quality="low", **question()),
    ]
    found = annomi.by_quality(annomi.read(written(tmp_path, SESSION + low)))
    assert found["low"]["complex_reflection_ratio"].n == 0
    assert found["low"]["reflection_to_question"].mean == 0
    assert found["high"]["reflection_to_question"].mean == 0.5


def test_files_without_the_labels_are_refused(tmp_path):
    simple = [c for c in annomi.COLUMNS if "subtype" not in c]
    with pytest.raises(UserError, match="no column therapist_input_subtype"):
        annomi.read(written(tmp_path, SESSION, simple))
    with pytest.raises(UserError, match="cannot be read"):
        annomi.read(written(tmp_path, [row("0", "one", "client", "Hm.")]))
    with pytest.raises(UserError, match="cannot be read"):
        annomi.read(tmp_path / "none.csv")
