"""Dialogues: identity and structure."""

from datetime import UTC, datetime

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from milm_ray.schema import (
    DIALOGUES,
    SESSIONS,
    TOPICS,
    Dialogue,
    Session,
    Turn,
    dialogue_id,
    structure_fault,
    turns_of,
)

CLIENT, COUNSELOR = Turn("client", "你好"), Turn("counselor", "您好")


def test_the_id_depends_on_corpus_roles_and_text_only():
    one = Dialogue("cpsycound", "case_1", [CLIENT, COUNSELOR], topic="a")
    other_name = Dialogue("cpsycound", "case_2", [CLIENT, COUNSELOR], topic="b")
    assert one.dialogue_id == other_name.dialogue_id
    assert one.dialogue_id != dialogue_id("smilechat", one.turns)
    assert one.dialogue_id != dialogue_id("cpsycound", [COUNSELOR, CLIENT])


@given(st.lists(st.tuples(st.sampled_from(["client", "counselor"]), st.text()), max_size=6))
def test_text_cannot_be_shifted_between_turns_unnoticed(pairs):
    turns = [Turn(role, text) for role, text in pairs]
    joined = [Turn("client", "".join(text for _, text in pairs))]
    if turns != joined:
        assert dialogue_id("x", turns) != dialogue_id("x", joined)


@pytest.mark.parametrize(
    ("turns", "fault"),
    [
        ([], "empty"),
        ([CLIENT], "one_sided"),
        ([CLIENT, Turn("counselor", " \n")], "empty_turn"),
        ([COUNSELOR, CLIENT], "roles_do_not_alternate"),
        ([CLIENT, CLIENT, COUNSELOR], "roles_do_not_alternate"),
        ([CLIENT, COUNSELOR, CLIENT], "ends_with_client"),
        ([CLIENT, COUNSELOR], None),
    ],
)
def test_structure_fault(turns, fault):
    assert structure_fault(turns) == fault


def test_a_row_fits_the_arrow_schema_and_comes_back():
    dialogue = Dialogue("cpsycound", "case_1", [CLIENT, COUNSELOR])
    table = pa.Table.from_pylist([dialogue.row()], schema=DIALOGUES)
    assert turns_of(table.to_pylist()[0]) == dialogue.turns


def test_a_session_fits_its_schema_and_comes_back():
    session = Session(
        session_id="s1",
        source="human",
        model="llama3",
        variant="adapter",
        topic=TOPICS[0],
        motivation="low",
        turns=[CLIENT, COUNSELOR],
        started_at=datetime(2026, 1, 1, tzinfo=UTC),
    )
    row = pa.Table.from_pylist([session.row()], schema=SESSIONS).to_pylist()[0]
    assert turns_of(row) == session.turns
    assert row["started_at"] == session.started_at
    assert row["ended_at"] is row["rating"] is None
    assert set(row) == set(session.row())
