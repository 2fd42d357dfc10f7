"""Simulate: sessions of a client simulator with every MI-LLM. Artifact `sessions/simulated/`.

In: `adapters/<model>/` through model endpoints. Out: rows of schema.SESSIONS, one per session;
`rejects/simulate/` for sessions that could not be held.

Every reply, of the models and of a language model that plays the clients, is in the reply store
before it is a turn. A run that was killed holds the same sessions again and asks only for what it
had not received.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

import pyarrow as pa

from milm_ray.config import Config
from milm_ray.errors import ConfigError, UserError
from milm_ray.job import Plan, Stage, finished, log
from milm_ray.llm.client import BudgetReached, LLMClient, Rejected
from milm_ray.llm.exchange import Usage
from milm_ray.llm.prices import cost_of, price_of
from milm_ray.llm.replies import Reply
from milm_ray.llm.reply_store import ReplyStore, answered_by
from milm_ray.miti import llm_simulator
from milm_ray.miti.client_model import TARGETS, Assignment, ClientModel, assignments, profiles
from milm_ray.miti.consistency import consistency
from milm_ray.miti.scripted_client import ScriptedClient
from milm_ray.prompts import load
from milm_ray.schema import REJECTS, SESSIONS, Reject, Session, Turn, Variant
from milm_ray.workspace import Workspace, digest

ARTIFACT = "sessions/simulated"
REJECTED = "rejects/simulate"
_PROMPTS = (llm_simulator.READING, llm_simulator.TURN, llm_simulator.RECOGNISE)
_CALL_TOKENS = (1100, 60)  # prompt and completion of a simulator's call, for the plan

Arm = tuple[str, Variant]
# A model's reply to a session that ends with the client, and how many rounds had to be dropped
# from its start to fit the model's context. Raises Rejected.
Counselor = Callable[[Sequence[Turn], int], Awaitable[tuple[Reply, int]]]
# Opens the endpoints of the arms asked for. Serving is another room; the job brings the two
# together.
Counselors = Callable[
    [Config, Workspace, Sequence[Arm]], AbstractContextManager[Mapping[Arm, Counselor]]
]


class Client(Protocol):
    """Who plays the client of one session."""

    name: str
    model: ClientModel

    async def speak(self, turns: Sequence[Turn]) -> str: ...

    async def recognised(self, turns: Sequence[Turn]) -> list[str] | None: ...


@dataclass
class Outcome:
    """One session as it was held; session is None where there is none worth keeping."""

    session: Session | None
    client: Client
    recognised: list[str] | None = None
    reject: Reject | None = None
    turns: list[Turn] = field(default_factory=list)


def arms(config: Config) -> list[Arm]:
    """Who answers: every model, in each variant asked for."""
    return [(model, variant) for model in config.models for variant in config.simulate.variants]


def _fingerprint(config: Config, workspace: Workspace) -> dict[str, Any]:
    simulated = config.simulate
    settings: dict[str, Any] = {
        "seed": config.seed,
        "simulate": simulated.model_dump(exclude={"concurrency", "max_reject_rate"}),
        "generate": config.generate.model_dump(
            include={"max_new_tokens", "temperature", "top_p", "top_k"}
        ),
        "serve": config.serve.model_dump(include={"max_model_len", "dtype", "engine"}),
        "models": {name: section.model_dump() for name, section in config.models.items()},
        "profiles": digest([asdict(profile) for profile in profiles()]),
    }
    if simulated.simulator == "llm":
        settings["client"] = answered_by(config.client)
        settings["prompts"] = {name: load(name).version for name in _PROMPTS}
    return workspace.fingerprint(settings, workspace.input_digests(*_adapters(config)))


def _adapters(config: Config) -> list[str]:
    tuned = [f"adapters/{model}" for model in config.models]
    further = [f"{place}/dpo" for place in tuned if "dpo" in config.simulate.variants]
    return [*tuned, *further]


def plan(config: Config, workspace: Workspace) -> Plan:
    """What the sessions would take; writes nothing."""
    if not config.models:
        raise ConfigError(["models: name at least one model to hold sessions with"])
    simulated = config.simulate
    sessions = simulated.sessions * len(arms(config))
    calls = 0
    if simulated.simulator == "llm":
        calls = sessions * (2 * simulated.max_rounds + 1)
    notes = (
        f"{simulated.sessions} sessions with each of {len(arms(config))} models, at most "
        f"{simulated.max_rounds} rounds; client: {simulated.simulator}",
    )
    resources = f"{len(config.models)} engines, as generate starts them"
    known = all(workspace.exists(name, "manifest.json") for name in _adapters(config))
    if known and workspace.is_done(ARTIFACT, _fingerprint(config, workspace)):
        return Plan(done=True)
    prompt, completion = (calls * tokens for tokens in _CALL_TOKENS)
    cost = cost_of(price_of(config.client), prompt, completion)
    return Plan(sessions, calls, prompt, completion, cost, resources, notes=notes)


def run(config: Config, workspace: Workspace, counselors: Counselors) -> Mapping[str, Any]:
    """Hold every session; returns the manifest of `sessions/simulated/`.

    Raises UserError, after everything is written, when too many sessions could not be held.
    """
    fingerprint = _fingerprint(config, workspace)
    if finished(workspace, ARTIFACT, fingerprint):
        return workspace.manifest(ARTIFACT)
    started = time.time()
    usage = Usage()
    with counselors(config, workspace, arms(config)) as answering:
        outcomes = asyncio.run(hold(config, workspace, answering, usage))
    return _write(config, workspace, outcomes, usage, fingerprint, started)


async def hold(
    config: Config, workspace: Workspace, answering: Mapping[Arm, Counselor], usage: Usage
) -> list[Outcome]:
    """All sessions of all arms, `concurrency` at a time, in the order of arms and assignments."""
    store = ReplyStore(workspace, config.client.recorded)
    llm = LLMClient(config.client, store)
    places = asyncio.Semaphore(config.simulate.concurrency)
    planned = assignments(config.simulate.sessions, config.seed)
    total, done = len(planned) * len(answering), 0

    async def one(arm: Arm, assignment: Assignment) -> Outcome:
        nonlocal done
        client: Client
        if config.simulate.simulator == "llm":
            client = llm_simulator.LLMSimulator(assignment, llm, usage)
        else:
            client = ScriptedClient(assignment)
        async with places:
            outcome = await hold_session(
                arm, assignment, client, answering[arm], config.simulate.max_rounds
            )
        done += 1
        if done % max(1, total // 10) == 0:
            log.info("simulate | %d of %d sessions held", done, total)
        return outcome

    try:
        return list(await asyncio.gather(*(one(arm, a) for arm in answering for a in planned)))
    except BudgetReached:
        raise UserError(
            "client.max_cost is reached",
            "raise it and run the same command again; the replies received so far are kept",
        ) from None


async def hold_session(
    arm: Arm, assignment: Assignment, client: Client, counselor: Counselor, max_rounds: int
) -> Outcome:
    """One session: the client speaks first, until it ends it, the limit, or an empty reply."""
    model, variant = arm
    started_at = datetime.now(UTC)
    turns: list[Turn] = []
    dropped, end = 0, "limit"
    outcome = Outcome(None, client, turns=turns)
    try:
        for _ in range(max_rounds):
            turns.append(Turn("client", await client.speak(turns)))
            reply, lost = await counselor(turns, assignment.seed)
            dropped = max(dropped, lost)
            if not reply.text.strip():
                end = "empty_reply"
                break
            turns.append(Turn("counselor", reply.text.strip()))
            if client.model.state == "termination":
                end = "client"
                break
    except (llm_simulator.SimulatorFailed, Rejected) as error:
        outcome.reject = _reject(arm, assignment, error.reason, error.detail, turns)
        return outcome
    if not any(turn.role == "counselor" for turn in turns):
        outcome.reject = _reject(arm, assignment, "no_reply", "the first reply was empty", turns)
        return outcome
    outcome.recognised = await client.recognised(turns)
    details = {
        "simulator": client.name,
        "profile": assignment.profile.profile_id,
        "assignment": assignment.number,
        "steps": [asdict(step) for step in client.model.steps],
        "recognised": outcome.recognised,
        "dropped_rounds": dropped,
    }
    outcome.session = Session(
        session_id=f"simulated-{model}-{variant}-{assignment.number:03d}",
        source="simulated",
        model=model,
        variant=variant,
        topic=assignment.profile.topic,
        motivation=assignment.motivation,
        turns=turns,
        started_at=started_at,
        ended_at=datetime.now(UTC),
        end_reason=end,
        seed=assignment.seed,
        details=json.dumps(details, ensure_ascii=False),
    )
    return outcome


def _reject(
    arm: Arm, assignment: Assignment, reason: str, detail: str, turns: Sequence[Turn]
) -> Reject:
    return Reject(
        stage="simulate",
        reason=reason,
        corpus="simulated",
        source_id=f"{arm[0]}/{arm[1]}/{assignment.number}",
        detail=detail,
        raw=llm_simulator.transcript(turns),
    )


def _write(
    config: Config,
    workspace: Workspace,
    outcomes: Sequence[Outcome],
    usage: Usage,
    fingerprint: Mapping[str, Any],
    started: float,
) -> Mapping[str, Any]:
    held = [o.session for o in outcomes if o.session is not None]
    rejects = [o.reject for o in outcomes if o.reject is not None]
    workspace.clear(ARTIFACT)
    workspace.clear(REJECTED)
    if rejects:
        rows = [reject.row() for reject in rejects]
        workspace.write_table(pa.Table.from_pylist(rows, REJECTS), REJECTED)
    # Nobody ran a safety check over these: the level is unknown, which is not "none".
    rows = [{**session.row(), "risk": None} for session in held]
    workspace.write_table(pa.Table.from_pylist(rows, SESSIONS), ARTIFACT)
    reasons = Counter(reject.reason for reject in rejects)
    if len(rejects) > config.simulate.max_reject_rate * len(outcomes):
        raise UserError(
            f"{len(rejects)} of {len(outcomes)} sessions could not be held ({dict(reasons)})",
            f"see {REJECTED}/; try another client.model, or raise simulate.max_reject_rate",
        )
    kept = [outcome for outcome in outcomes if outcome.session is not None]
    scripted = config.simulate.simulator == "scripted"
    return workspace.commit(
        ARTIFACT,
        stage="simulate",
        settings=config.simulate,
        fingerprint=fingerprint,
        counts={
            "sessions": len(held),
            "rounds": sum(turn.role == "counselor" for s in held for turn in s.turns),
            "rejected": len(rejects),
            "rejected_by_reason": dict(reasons),
            "by_topic": dict(Counter(s.topic for s in held)),
            "by_motivation": dict(Counter(s.motivation for s in held)),
            "by_end": dict(Counter(s.end_reason for s in held)),
        },
        started=started,
        consistency=consistency([(o.client.model, o.turns, o.recognised) for o in kept]),
        consistency_targets=TARGETS,
        simulator=config.simulate.simulator,
        usage=None if scripted else usage.facts(),
        llm=None if scripted else answered_by(config.client),
    )


def stage(counselors: Counselors, around: Any = None) -> Stage:
    """The simulate stage over the endpoints that `counselors` opens."""
    return Stage(
        "simulate",
        plan,
        lambda config, workspace: run(config, workspace, counselors),
        check_paths=("models", "llm"),
        around=around,
    )
