"""The chat's sessions as the study's table, deletion on request, blind assignment."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from milm_ray.config import Config, load_config
from milm_ray.errors import ConfigError, UserError
from milm_ray.miti import study_packet
from milm_ray.report import run as report_run
from milm_ray.schema import MOTIVATIONS, SESSIONS, TOPICS
from milm_ray.serve_settings import ChatSection
from milm_ray.serving.chat import export
from milm_ray.serving.chat.database import Database, database_url
from milm_ray.serving.chat.roles import MOTIVATION_CARDS, TOPIC_CARDS, assigned
from milm_ray.serving.chat.store import Store
from milm_ray.serving.chat.tables import ChatSession
from milm_ray.serving.endpoints import chat_database, check_access
from milm_ray.workspace import Workspace


def session(session_id: str, participant: str) -> ChatSession:
    return ChatSession(
        session_id=session_id, person="p" * 64, participant=participant, model="llama3:mi",
        blind=True, seed=42, topic="insomnia", motivation="low", language="zh", risk="none",
        end_reason="", rating=None, comment="", started_at=1_700_000_000.25, ended_at=None,
    )  # fmt: skip


async def chats(store: Store) -> None:
    """P1: a full conversation with a failed reply in it; P2: nothing said; P3: still replying."""
    person = "p" * 64
    for number in (1, 2, 3):
        await store.create(session(f"session-{number}", f"P{number}"), 10)
    script = [
        ("睡不好。", "done", "听起来很累。", "model"),
        ("在吗？", "failed", "", "model"),
        ("还在吗？", "stopped", "在", "model"),
        ("我不想活了", "done", "请拨打12356。", "preset"),
    ]
    for number, (said, status, content, kind) in enumerate(script):
        reply = await store.send("session-1", person, f"message-{number}", said)
        assert reply is not None
        risk = "high" if kind == "preset" else "none"
        await store.finish(reply, status, content, kind, risk)
    await store.rate("session-1", person, 4, "好")
    await store.end("session-1", person, "safety")
    await store.send("session-3", person, "message-0", "你好")


@pytest.fixture
def place(tmp_path: Path) -> tuple[Config, Workspace, Path]:
    """A workspace in whose database the chats are, and its configuration as a file."""
    workspace = Workspace.open(str(tmp_path / "run"))
    url = database_url(ChatSection(), Path(chat_database(workspace) or ""))

    async def fill() -> None:
        database = Database(url)
        await database.migrate()
        await chats(Store(database, "me", max_rounds=10))
        await database.close()

    asyncio.run(fill())
    file = tmp_path / "study.yaml"
    file.write_text(f"workspace: {workspace.uri}\n", encoding="utf-8")
    return load_config(file), workspace, file


def test_sessions_become_the_study_s_table(place) -> None:
    config, workspace, _ = place
    assert export.plan(config, workspace).rows == 3
    counts = export.run(config, workspace)["counts"]
    assert counts == {"sessions": 2, "without_a_word": 1, "open": 1, "rated": 1, "high_risk": 1}
    table = workspace.read_table("sessions/human")
    assert table.schema.equals(SESSIONS)
    first, third = table.to_pylist()
    assert [(turn["role"], turn["content"]) for turn in first["turns"]] == [
        ("client", "睡不好。"),
        ("counselor", "听起来很累。"),
        ("client", "在吗？\n还在吗？"),
        ("counselor", "在"),
        ("client", "我不想活了"),
        ("counselor", "请拨打12356。"),
    ]
    assert (first["preset_turns"], first["stopped_turns"]) == ([5], [3])
    assert (first["model"], first["variant"], first["blind"]) == ("llama3", "adapter", True)
    assert (first["risk"], first["end_reason"], first["rating"]) == ("high", "safety", 4)
    assert first["started_at"].timestamp() == 1_700_000_000.25
    assert [turn["role"] for turn in third["turns"]] == ["client"]
    assert third["ended_at"] is None


def test_the_study_is_planned_and_made_from_exported_sessions(place) -> None:
    config, workspace, _ = place
    counts = export.run(config, workspace)["counts"]
    assert study_packet.plan(config, workspace).rows == 2
    study_packet.run(config, workspace)
    (item,) = study_packet.load_items(workspace)  # session-3 is open still
    # Neither the reply that was cut short nor the text of the safety check is there to be coded.
    spoken = [volley.utterances for volley in item.volleys if volley.role == "counselor"]
    assert spoken == [("听起来很累。",)]
    # An export of an earlier version, which calls its sessions rows.
    before = {"rows": counts.pop("sessions"), **counts}
    again = {"stage": "sessions", "settings": {}, "fingerprint": {}, "started": 0.0}
    found = {"sessions/human": workspace.commit("sessions/human", **again, counts=before)}
    workspace.clear("packet")
    assert study_packet.plan(config, workspace).rows == 2
    assert next(s.count for s in report_run.flow(found).steps if s.title == "Sessions") == "2"


def test_a_participant_s_sessions_are_forgotten_in_the_table_too(place, capsys) -> None:
    config, workspace, file = place
    export.run(config, workspace)
    assert export.forget("", ["--config", str(file), "--participant", "P9"]) == 1
    assert workspace.exists("sessions", "human", "manifest.json")
    assert export.forget("", ["--config", str(file), "--participant", "P1"]) == 0
    assert "deleted 1 session" in capsys.readouterr().out
    assert not workspace.exists("sessions", "human")
    assert export.run(config, workspace)["counts"]["sessions"] == 1
    assert export.forget("", ["--config", str(file), "--session", "session-3"]) == 0
    assert export.run(config, workspace)["counts"]["sessions"] == 0


def test_what_a_person_deleted_in_the_chat_is_forgotten_in_the_workspace_too(place, capsys) -> None:
    config, workspace, file = place
    export.run(config, workspace)
    study_packet.run(config, workspace)
    (item,) = study_packet.load_key(workspace)
    assert export.forget("", ["--config", str(file), "--participant", "P3"]) == 0
    assert item not in capsys.readouterr().out  # P1's, who is still there
    export.run(config, workspace)

    async def delete_in_the_page() -> None:
        database = Database(database_url(ChatSection(), Path(chat_database(workspace) or "")))
        await Store(database, "me", max_rounds=10).delete("p" * 64, "session-1")
        await database.close()

    asyncio.run(delete_in_the_page())
    assert export.forget("", ["--config", str(file), "--participant", "P1"]) == 0
    said = capsys.readouterr().out
    assert "deleted 0 session" in said
    assert not workspace.exists("sessions", "human")
    assert f"as {item}, and" in said


def test_where_nobody_has_chatted_the_job_says_so(tmp_path: Path) -> None:
    workspace = Workspace.open(str(tmp_path))
    with pytest.raises(UserError, match="no chat database"):
        export.plan(Config(), workspace)


def test_the_assignment_is_balanced_and_the_same_for_the_same_seed() -> None:
    models = ["glm4:mi", "llama3:mi", "baichuan2:mi"]
    roles = [assigned(number, 42, models) for number in range(60)]
    assert roles == [assigned(number, 42, models[::-1]) for number in range(60)]
    assert roles != [assigned(number, 43, models) for number in range(60)]
    for block in range(0, 60, 15):
        cells = Counter((role.model, role.topic) for role in roles[block : block + 15])
        assert set(cells.values()) == {1}
    assert {role.motivation for role in roles} == set(MOTIVATIONS)


def test_every_role_has_a_card_in_both_languages() -> None:
    assert set(TOPIC_CARDS) == set(TOPICS)
    assert set(MOTIVATION_CARDS) == set(MOTIVATIONS)
    for cards in (*TOPIC_CARDS.values(), *MOTIVATION_CARDS.values()):
        for language in ("zh", "en"):
            assert cards[language]["title"]
            assert cards[language]["card"]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://host/x", "sqlite:///"),
        ("postgresql://milm:secret@host/x", "MILM_DATABASE_URL"),
        ("nonsense", "sqlite:///"),
    ],
)
def test_a_database_url_that_cannot_be_used_is_refused(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ChatSection(database=url)


def test_the_environment_s_url_wins_and_its_password_is_in_no_error(monkeypatch) -> None:
    monkeypatch.setenv("MILM_DATABASE_URL", "postgresql://milm:geheim@host/x")
    assert database_url(ChatSection(database="sqlite:///x")).password == "geheim"
    monkeypatch.setenv("MILM_DATABASE_URL", "mysql://milm:geheim@host/x")
    with pytest.raises(UserError) as error:
        database_url(ChatSection())
    assert "geheim" not in str(error.value)


def test_other_machines_are_served_only_with_keys(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("MILM_API_KEY", raising=False)
    check_access(Config())
    keys = tmp_path / "keys.json"
    for access, said in [
        ({"host": "0.0.0.0"}, "keys_file"),
        ({"keys_file": str(keys)}, "no such file"),
    ]:
        with pytest.raises(ConfigError, match=said):
            check_access(Config.model_validate({"access": access}))
    keys.write_text("{}")
    config = Config.model_validate({"access": {"host": "0.0.0.0", "keys_file": str(keys)}})
    with pytest.raises(ConfigError, match="MILM_API_KEY"):
        check_access(config)
    monkeypatch.setenv("MILM_API_KEY", "milm_x")
    check_access(config)
