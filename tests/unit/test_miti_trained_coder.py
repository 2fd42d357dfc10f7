import numpy as np
import pytest

from milm_ray.errors import UserError
from milm_ray.miti import trained_coder
from milm_ray.miti.annomi import COLUMNS, Session, Utterance
from milm_ray.miti.expected_counts import expected_counts, expected_in_volley
from milm_ray.miti.trained_features import contexts

NEITHER = {"question_exists": "False", "reflection_exists": "False"}
OTHER = NEITHER | {"main_therapist_behaviour": "other"}
QUESTION = NEITHER | {"main_therapist_behaviour": "question", "question_exists": "True"}
REFLECTION = NEITHER | {"main_therapist_behaviour": "reflection", "reflection_exists": "True"}
TOPICS = ("sleep", "drinking", "smoking", "exercise", "phone")


def utterance(number, speaker, text, **labels):
    given = {name: labels.get(name, "n/a") for name in COLUMNS[7:]}
    return Utterance(number, speaker, text, given, {name: (v,) for name, v in given.items()})


def session(i):
    """A session whose labels follow its wording, so that a coder can learn them."""
    topic = TOPICS[i % len(TOPICS)]
    lines = [
        ("client", f"I really want to change my {topic}.", {"client_talk_type": "change"}),
        ("therapist", f"What bothers you about {topic}?", QUESTION),
        ("client", f"I like my {topic} as it is.", {"client_talk_type": "sustain"}),
        (
            "therapist",
            f"You like {topic}.",
            {
                **REFLECTION,
                "reflection_subtype": "simple",
            },
        ),
        ("client", f"Yes, {topic}.", {"client_talk_type": "neutral"}),
        (
            "therapist",
            f"It sounds as if deep down {topic} stands for freedom to you.",
            {
                **REFLECTION,
                "reflection_subtype": "complex",
            },
        ),
        ("therapist", "Okay.", OTHER),
    ]
    parts = [utterance(n, who, text, **labels) for n, (who, text, labels) in enumerate(lines)]
    return Session(str(i), "high" if i % 2 else "low", topic, tuple(parts))


SESSIONS = [session(i) for i in range(12)]


@pytest.fixture(scope="module")
def unseen():
    return trained_coder.out_of_fold(SESSIONS, count=4)


@pytest.mark.parametrize("task", trained_coder.TASKS)
def test_wording_that_decides_the_label_is_learnt(unseen, task):
    found = trained_coder.validate(unseen, task)
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
    unseen = trained_coder.out_of_fold(shuffled, tasks=["client_talk_type"], count=5)
    assert trained_coder.validate(unseen, "client_talk_type").kappa.value < 0.25


def test_no_session_is_in_two_folds():
    parts = trained_coder.folds(SESSIONS, 5, seed=3)
    assert sorted(i for part in parts for i in part) == list(range(12))
    assert parts == trained_coder.folds(SESSIONS, 5, seed=3)
    assert parts != trained_coder.folds(SESSIONS, 5, seed=4)
    with pytest.raises(UserError, match="12 sessions cannot be split into 13"):
        trained_coder.folds(SESSIONS, 13, seed=0)


def test_an_utterance_is_read_with_what_the_other_speaker_said_around_it():
    around = contexts(SESSIONS[0])
    asked = around[1]
    assert asked.text == "what bothers you about sleep?"
    assert (asked.before, asked.after) == (
        "i really want to change my sleep.",
        "i like my sleep as it is.",
    )
    assert (asked.earlier, around[3].earlier) == ("", asked.text)
    assert [(around[n].first, around[n].last) for n in (1, 5, 6)] == [
        (True, True),
        (True, False),
        (False, True),
    ]
    assert (around[0].before, around[6].after) == ("", "")


def test_automatic_codings_are_marked_and_keep_the_rules(unseen):
    codings = [each.coding("best guess") for each in unseen]
    assert [c.dialogue_id for c in codings] == [s.transcript_id for s in SESSIONS]
    assert all(c.automatic for c in codings)
    assert codings[0].counts == {"question": 1, "simple_reflection": 1, "complex_reflection": 1}
    assert {c.group for c in codings} == {"high", "low"}


def test_a_session_s_codes_do_not_depend_on_which_others_are_wanted():
    every = trained_coder.code_unseen(SESSIONS, {s.transcript_id for s in SESSIONS})
    assert [coding.dialogue_id for coding in every] == [s.transcript_id for s in SESSIONS]
    assert every[0].automatic
    assert every[0].counts["question"] == 1
    assert trained_coder.code_unseen(SESSIONS, {"0"}) == every[:1]


def test_expected_counts_stand_for_the_same_coding_in_fractions(unseen):
    coding = unseen[0].coding("expected")
    assert coding.scope == trained_coder.SCOPE
    volleys = sum(speaker == "therapist" for speaker, _ in SESSIONS[0].volleys())
    assert 0 < sum(coding.counts.values()) < 2 * volleys
    assert all(n != round(n) for n in coding.counts.values())
    assert coding.counts["question"] == pytest.approx(1, abs=0.5)


def test_expected_counts_by_hand():
    """Two utterances, each a question at 1/2: the volley has one at 3/4. Reflections: one at 1/2
    that is complex at 1/2, beside a sure simple one: CR 1/4, SR the rest of the sure reflection."""
    volley = {
        "question": [0.5, 0.5],
        "simple_reflection": [0.25, 1.0],
        "complex_reflection": [0.25, 0.0],
    }
    assert expected_in_volley(volley) == pytest.approx(
        {"question": 0.75, "simple_reflection": 0.75, "complex_reflection": 0.25}
    )
    assert expected_counts([volley, volley])["question"] == pytest.approx(1.5)
    sure = {"question": [1, 1], "simple_reflection": [1, 0], "complex_reflection": [0, 1]}
    assert expected_in_volley(sure) == {
        "question": 1,
        "simple_reflection": 0,
        "complex_reflection": 1,
    }


def test_too_few_labels_to_learn_from_are_refused():
    with pytest.raises(UserError, match="client_talk_type: 0 labelled utterances"):
        trained_coder.Coder([], ["client_talk_type"])
