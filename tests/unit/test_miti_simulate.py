"""The client simulator: its state model, its scripted and LLM clients, the sessions it writes."""

import asyncio
import json
from collections import Counter

import pytest
from miti_sample import config_of, counselors, held, with_adapters, with_sessions

from milm_ray.errors import UserError
from milm_ray.llm.replies import Reply
from milm_ray.miti import simulate
from milm_ray.miti.client_model import (
    ACTIONS,
    RESISTANT,
    ClientModel,
    Reading,
    assignments,
    profiles,
)
from milm_ray.miti.scripted_client import LINES, ScriptedClient, read
from milm_ray.schema import SESSIONS, TOPICS, structure_fault
from tests.llm_server_process import KEY, ServerProcess


def test_every_topic_of_the_paper_has_profiles_and_every_action_has_lines():
    assert Counter(p.topic for p in profiles()) == dict.fromkeys(TOPICS, 2)
    assert all(len(p.cues) == 1 + len(p.beliefs) for p in profiles())
    assert {action for allowed in ACTIONS.values() for action in allowed} == set(LINES)


def test_assignments_are_seeded_turn_through_the_topics_and_vary_the_motivation():
    planned = assignments(10, seed=1)
    assert planned == assignments(10, seed=1) != assignments(10, seed=2)
    assert [a.profile.topic for a in planned[:5]] == list(TOPICS)
    assert len({a.profile.profile_id for a in planned}) == 10
    levels = Counter(a.motivation for a in assignments(300, seed=1))
    assert min(levels.values()) > 70


def test_states_move_by_the_rules_only():
    model = ClientModel(profiles()[0], "low", seed=0)
    model.open()
    for _ in range(30):  # pleasant replies that never touch the reason
        model.next(Reading(engagement=5, met_belief=0, offers_plan=True))
    assert {step.state for step in model.steps} == {"precontemplation"}
    model.next(Reading(engagement=3, touches_reason=True))
    assert model.state == "contemplation"
    model.next(Reading(engagement=3, met_belief=0))
    assert model.state == "contemplation"
    assert model.unmet_beliefs() == [profiles()[0].beliefs[1]]
    model.next(Reading(engagement=3, met_belief=1))
    assert model.state == "preparation"
    for _ in range(60):
        if model.state == "termination":
            break
        model.next(Reading(engagement=4, offers_plan=True))
    assert model.state == "termination"
    assert all(step.action in ACTIONS[step.state] for step in model.steps)


def test_receptivity_stays_near_its_start_and_lowers_resistance():
    def resistance(motivation, engagement):
        model = ClientModel(profiles()[0], motivation, seed=3)
        model.open()
        steps = [model.next(Reading(engagement)) for _ in range(400)]
        assert all(abs(step.receptivity - steps[-1].receptivity) <= 1 for step in steps[3:])
        return sum(step.action in RESISTANT for step in steps) / len(steps)

    closed, open_ = resistance("low", 1), resistance("medium", 5)
    assert closed == pytest.approx(0.66, abs=0.08)  # receptivity 1
    assert open_ == pytest.approx(0.345, abs=0.08)  # receptivity 4


def test_the_scripted_client_reads_words():
    planned = next(a for a in assignments(10, 1) if a.profile.profile_id == "weight-1")
    model = ClientModel(planned.profile, "low", 0)
    said = "我一般十点多下班，路上买份炸鸡。"
    touched = read("您想陪女儿跑得动。", model, said)
    assert (touched.touches_reason, touched.met_belief) == (True, None)
    assert read("压力大的时候，炸鸡是您的出口。", model, said).met_belief == 0
    pushed, heard = read("您必须马上戒掉。", model, said), read("下班路上那份炸鸡。", model, said)
    assert pushed.engagement < 3 < heard.engagement


def test_a_session_ends_when_its_client_has_accepted_a_plan():
    planned = assignments(10, 1)[0]

    async def counselor(turns, seed):
        cues = "，".join(word for words in planned.profile.cues for word in words)
        return Reply("k", f"{cues}。您打算从哪一步开始试试？"), 2

    outcome = asyncio.run(
        simulate.hold_session(("m", "adapter"), planned, ScriptedClient(planned), counselor, 60)
    )
    session = outcome.session
    assert session.end_reason == "client"
    assert structure_fault(session.turns) is None
    assert session.turns[-2].content == LINES["terminate"][0]
    details = json.loads(session.details)
    assert details["dropped_rounds"] == 2
    assert [step["state"] for step in details["steps"]][-1] == "termination"


def test_an_empty_reply_ends_a_session_and_an_empty_first_one_is_no_session():
    planned = assignments(1, 1)[0]

    def outcome(replies):
        async def counselor(turns, seed):
            return Reply("k", replies[len(turns) // 2]), 0

        client = ScriptedClient(planned)
        return asyncio.run(simulate.hold_session(("m", "base"), planned, client, counselor, 9))

    kept = outcome(["您慢慢说。", " "]).session
    assert (kept.end_reason, len(kept.turns)) == ("empty_reply", 3)
    assert outcome([""]).reject.reason == "no_reply"


def test_sessions_are_written_with_figures_and_made_once(tmp_path):
    config = config_of(tmp_path)
    assert "rows: 6" in simulate.plan(config, with_adapters(config)).lines()
    ws, manifest = with_sessions(config)
    rows = ws.read_table("sessions/simulated").to_pylist()
    assert set(rows[0]) == set(SESSIONS.names)
    assert manifest["counts"]["sessions"] == len(rows) == 6
    assert {(row["model"], row["source"], row["risk"]) for row in rows} == {
        ("glm4", "simulated", None),
        ("llama3", "simulated", None),
    }
    # The same clients for every model.
    by_model = [
        [(r["topic"], r["motivation"], r["seed"]) for r in rows if r["model"] == m]
        for m in ("glm4", "llama3")
    ]
    assert by_model[0] == by_model[1]
    figures = manifest["consistency"]
    assert figures["client_turns"] == 24
    assert figures["lawful"] == 1
    assert figures["recognised"] is None
    assert simulate.run(config, ws, counselors) == manifest
    assert simulate.plan(config, ws).done


@pytest.fixture
def llm(tmp_path, monkeypatch):
    """A configuration whose clients an LLM server plays; starts with the faults given."""
    monkeypatch.setenv("TEST_LLM_KEY", KEY)
    servers = []

    def start(*overrides, **faults):
        servers.append(ServerProcess(tmp_path / f"log-{len(servers)}.jsonl", **faults))
        config = config_of(
            tmp_path,
            "simulate.simulator=llm",
            "simulate.sessions=2",
            "simulate.max_rounds=3",
            f"client.base_url={servers[-1].url}",
            "client.api_key_env=TEST_LLM_KEY",
            *overrides,
        )
        return config, with_adapters(config), servers[-1]

    yield start
    for server in servers:
        server.kill()


def test_an_llm_plays_clients_within_the_rules_and_nothing_is_asked_twice(llm):
    config, ws, server = llm()
    outcomes = held(config, ws)
    assert len(outcomes) == 4
    for outcome in outcomes:
        assert structure_fault(outcome.session.turns) is None
        steps = outcome.client.model.steps
        assert all(step.action in ACTIONS[step.state] for step in steps)
        assert len(outcome.recognised) == len(steps) - 1
    asked = len(server.events("asked"))
    again = held(config, ws)
    assert [o.session.turns for o in again] == [o.session.turns for o in outcomes]
    assert len(server.events("asked")) == asked


def test_broken_replies_are_asked_for_once_more_and_then_cost_the_session(llm):
    config, ws, _ = llm(unusable=1.0)
    outcomes = held(config, ws)
    assert all(outcome.session is None for outcome in outcomes)
    assert {outcome.reject.reason for outcome in outcomes} <= {"not_json", "not_a_turn"}
    with pytest.raises(UserError, match="could not be held"):
        simulate.run(config, ws, counselors)
    assert ws.exists("rejects/simulate")
    assert not ws.exists("sessions/simulated", "manifest.json")


def test_a_preference_tuned_adapter_holds_sessions_of_its_own(tmp_path):
    config = config_of(tmp_path, "simulate.variants=[adapter,dpo]", "simulate.sessions=1")
    ws = with_adapters(config)
    with pytest.raises(UserError, match="adapters/glm4/dpo"):
        simulate.run(config, ws, counselors)
    for model in config.models:
        ws.commit(
            f"adapters/{model}/dpo",
            stage="finetune",
            settings={},
            fingerprint={},
            counts={},
            started=0.0,
        )
    simulate.run(config, ws, counselors)
    rows = ws.read_table("sessions/simulated").to_pylist()
    assert sorted((row["model"], row["variant"]) for row in rows) == [
        ("glm4", "adapter"),
        ("glm4", "dpo"),
        ("llama3", "adapter"),
        ("llama3", "dpo"),
    ]
    assert len({row["session_id"] for row in rows}) == 4
