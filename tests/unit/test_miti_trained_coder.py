import numpy as np
import pytest

from milm_ray.errors import UserError
from milm_ray.miti import trained_coder
from milm_ray.miti.annomi import COLUMNS, Session, Utterance

TOPICS = ("sleep", "drinking", "smoking", "exercise", "phone")


def utterance(number, speaker, text, **labels):
    given = {name: labels.get(name, "n/a") for name in COLUMNS[7:]}
    return Utterance(number, speaker, text, given, {name: (v,) for name, v in given.items()})


def session(i):
    """A session whose labels follow its wording, so that a coder can learn them."""
    topic = TOPICS[i % len(TOPICS)]
    lines = [
        ("client", f"I really want to change my {topic}.", {"client_talk_type": "change"}),
        ("therapist", f"What bothers you about {topic}?", {"main_therapist_behaviour": "question"}),
        ("client", f"I like my {topic} as it is.", {"client_talk_type": "sustain"}),
        (
            "therapist",
            f"You like {topic}.",
            {
                "main_therapist_behaviour": "reflection",
                "reflection_exists": "True",
                "reflection_subtype": "simple",
            },
        ),
        ("client", f"Yes, {topic}.", {"client_talk_type": "neutral"}),
        (
            "therapist",
            f"It sounds as if deep down {topic} stands for freedom to you.",
            {
                "main_therapist_behaviour": "reflection",
                "reflection_exists": "True",
                "reflection_subtype": "complex",
            },
        ),
        ("therapist", "Okay.", {"main_therapist_behaviour": "other"}),
    ]
    parts = [utterance(n, who, text, **labels) for n, (who, text, labels) in enumerate(lines)]
    return Session(str(i), "high" if i % 2 else "low", topic, tuple(parts))


SESSIONS = [session(i) for i in range(12)]


@pytest.mark.parametrize("task", trained_coder.TASKS)
def test_wording_that_decides_the_label_is_learnt(task):
    found = trained_coder.cross_validate(SESSIONS, task, count=4)
    assert found.macro_f1 == pytest.approx(1)
    assert found.kappa.value == pytest.approx(1)
    assert found.sessions == 12
    assert sum(found.counts.values()) == found.utterances


def test_labels_without_pattern_are_not_learnt():
    """A leak between folds, or of the label into the input, would show as a score above chance."""
    rng = np.random.default_rng(0)
    shuffled = []
    for i in range(40):
        labels = rng.permutation(["change", "neutral", "sustain"])
        parts = [
            utterance(n, "client", f"word{i} noise{n}", client_talk_type=str(label))
            for n, label in enumerate(labels)
        ]
        shuffled.append(Session(str(i), "high", "", tuple(parts)))
    found = trained_coder.cross_validate(shuffled, "client_talk_type", count=5)
    assert found.kappa.value < 0.25


def test_no_session_is_in_two_folds():
    parts = trained_coder.folds(SESSIONS, 5, seed=3)
    assert sorted(i for part in parts for i in part) == list(range(12))
    assert parts == trained_coder.folds(SESSIONS, 5, seed=3)
    assert parts != trained_coder.folds(SESSIONS, 5, seed=4)
    with pytest.raises(UserError, match="12 sessions cannot be split into 13"):
        trained_coder.folds(SESSIONS, 13, seed=0)


def test_examples_carry_what_the_other_speaker_said_before():
    rows = trained_coder.examples(SESSIONS[0], "main_therapist_behaviour")
    assert rows[0][0] == ("What bothers you about sleep?", "I really want to change my sleep.")
    assert rows[-1][0] == ("Okay.", "Yes, sleep.")
    kinds = trained_coder.examples(SESSIONS[0], "reflection_subtype")
    assert [label for _, label in kinds] == ["simple", "complex"]


def test_automatic_codings_are_marked_and_keep_the_rules():
    codings = trained_coder.code_unseen(SESSIONS, count=4)
    assert [c.dialogue_id for c in codings] == [s.transcript_id for s in SESSIONS]
    assert all(c.automatic for c in codings)
    assert codings[0].counts == {"question": 1, "simple_reflection": 1, "complex_reflection": 1}
    assert {c.group for c in codings} == {"high", "low"}


def test_too_few_labels_to_learn_from_are_refused():
    with pytest.raises(UserError, match="client_talk_type: 0 labelled utterances"):
        trained_coder.train([], "client_talk_type")
