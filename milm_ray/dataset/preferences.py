"""Preference pairs: a judge ranks several replies to one round, and the best and worst make a pair.

In: `train/`, then `candidates/` (schema.PREDICTIONS, several per round). Out: `preference_rounds/`
(schema.ROUNDS) and `preferences/` (schema.PREFERENCES), `rejects/preferences/`. Test dialogues are
never in it.
"""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from milm_ray.config import Config
from milm_ray.dataset.rounds import ROUNDS_PER_GROUP, rounds
from milm_ray.dataset.sampling import rank
from milm_ray.dataset.table_rows import Row
from milm_ray.dataset.transcript import transcript
from milm_ray.errors import UserError
from milm_ray.job import Plan, Stage, finished
from milm_ray.llm.ask import Asking, make_or_ask_again, unasked
from milm_ray.llm.exchange import Answer, Unusable
from milm_ray.llm.replies import Request, Subject, json_object
from milm_ray.llm.reply_store import answered_by
from milm_ray.prompts import load
from milm_ray.schema import PREFERENCES, REJECTS, ROUNDS, Reject, Turn
from milm_ray.workspace import Workspace

PROMPT = "preference_rank.zh.md"
ROUNDS_TABLE = "preference_rounds"
CANDIDATES = "candidates"
ARTIFACT = "preferences"
REJECTED = "rejects/preferences"
_UNSCORED = "unscored: "


# --- training rounds to reply to: train/ (1→n) preference_rounds/


def _rounds_fingerprint(config: Config, workspace: Workspace) -> dict[str, Any]:
    settings = {"seed": config.seed, "rounds": config.preferences.rounds}
    return workspace.fingerprint(settings, workspace.input_digests("train"))


def plan_rounds(config: Config, workspace: Workspace) -> Plan:
    """How many training rounds will be replied to."""
    if not workspace.exists("train", "manifest.json"):
        return Plan()
    done = workspace.is_done(ROUNDS_TABLE, _rounds_fingerprint(config, workspace))
    return Plan(config.preferences.rounds, done=done)


def choose_rounds(config: Config, workspace: Workspace) -> Mapping[str, Any]:
    """A seeded sample of the training rounds; returns its manifest."""
    fingerprint = _rounds_fingerprint(config, workspace)
    if finished(workspace, ROUNDS_TABLE, fingerprint):
        return workspace.manifest(ROUNDS_TABLE)
    started = time.time()
    table = workspace.read_table("train").to_pylist()
    every = [row for dialogue in table for row in rounds(dialogue)]
    every.sort(key=lambda row: rank(config.seed, "preferences", _round_name(row)))
    # In the dialogues' order an engine's prefix cache holds round k when round k+1 comes.
    chosen = sorted(every[: config.preferences.rounds], key=_round)
    workspace.clear(ROUNDS_TABLE)
    table = pa.Table.from_pylist(chosen, ROUNDS)
    workspace.write_table(table, ROUNDS_TABLE, rows_per_group=ROUNDS_PER_GROUP)
    return workspace.commit(
        ROUNDS_TABLE,
        stage="preference_rounds",
        settings=config.preferences,
        fingerprint=fingerprint,
        counts={"rounds": len(chosen), "of": len(every)},
        started=started,
    )


def _round(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["dialogue_id"], row["round_index"]


def _round_name(row: Mapping[str, Any]) -> str:
    return f"{row['dialogue_id']}/{row['round_index']}"


# --- the judge: candidates/ (n→1) preferences/


class Ranking:
    """One round's replies in one order, to their numbers (from 0) from best to worst."""

    reply_tokens = 60

    def request(self, row: Row) -> Request:
        turns = [
            turn
            for exchange in row["history"]
            for turn in (
                Turn("client", exchange["client"]),
                Turn("counselor", exchange["counselor"]),
            )
        ]
        dialogue = transcript([*turns, Turn("client", row["input"])])
        replies = "\n".join(
            f"【{place}】{row['replies'][number]}" for place, number in enumerate(row["order"], 1)
        )
        return Request(
            messages=[
                {"role": "system", "content": load(PROMPT).text},
                {"role": "user", "content": f"{dialogue}\n\n# 候选回复\n{replies}"},
            ],
            schema=_schema(len(row["order"])),
            subject=Subject(row["model"], _round_name(row)[:20], PROMPT),
        )

    def parse(self, row: Row, text: str) -> dict[str, Any]:
        """{"ranking": reply numbers, best first, "reason": str}; Unusable when not a ranking."""
        try:
            data = json_object(text)
        except ValueError as error:
            raise Unusable("not_json", str(error)) from None
        places: Any = data.get("ranking")
        count = len(row["order"])
        plain = isinstance(places, list) and all(type(place) is int for place in places)
        if not plain or sorted(places) != list(range(1, count + 1)):
            raise Unusable("not_a_ranking", f"{places!r} is no order of 1 to {count}")
        ranking = [row["order"][place - 1] for place in places]
        return {"ranking": ranking, "reason": str(data.get("reason", ""))}


def _schema(count: int) -> dict[str, Any]:
    number = {"type": "integer", "enum": list(range(1, count + 1))}
    return {
        "type": "object",
        "properties": {
            "ranking": {"type": "array", "items": number},
            "reason": {"type": "string"},
        },
        "required": ["ranking", "reason"],
        "additionalProperties": False,
    }


def groups_of(
    candidates: Sequence[Mapping[str, Any]], asked: Sequence[Mapping[str, Any]], seed: int
) -> list[Row]:
    """One row per model and round with the different replies to it, in a seeded order to show.

    candidates: schema.PREDICTIONS; asked: schema.ROUNDS. Empty and repeated replies are dropped; a
    group may be left with fewer than two. UserError for replies to other rounds.
    """
    by_round = {_round(row): row for row in asked}
    others = {_round(row) for row in candidates} - by_round.keys()
    if others:
        name, index = min(others)
        raise UserError(
            f"{CANDIDATES}/ replies to rounds that are not in {ROUNDS_TABLE}/ ({len(others)}, such "
            f"as round {index} of {name})",
            "leave them out, or raise preferences.rounds so that more training rounds are in it",
        )
    replies: dict[tuple[str, str, int], list[str]] = defaultdict(list)
    for row in candidates:
        text = row["text"].strip()
        kept = replies[row["model"], row["dialogue_id"], row["round_index"]]
        if text and text not in kept:
            kept.append(text)
    groups = []
    for (model, dialogue, index), texts in sorted(replies.items()):
        order = list(range(len(texts)))
        random.Random(f"{seed}/{model}/{dialogue}/{index}").shuffle(order)
        source = by_round[dialogue, index]
        groups.append({**source, "model": model, "replies": texts, "order": order})
    return groups


def pair_of(group: Row, answers: Sequence[Answer]) -> Row | str:
    """The pair that all answers about a group agree on, or the reason why there is none.

    An answer that could not be read leaves the group unscored, never ranked.
    """
    if len(group["replies"]) < 2:
        return "no_two_different_replies"
    for answer in answers:
        if not answer.ok:
            return f"{_UNSCORED}{answer.reason}"
    rankings = [answer.value["ranking"] for answer in answers]
    places = {
        number: sum(ranking.index(number) + 1 for ranking in rankings) / len(rankings)
        for number in group["order"]
    }
    best, worst = min(places, key=lambda n: places[n]), max(places, key=lambda n: places[n])
    if any(ranking.index(best) >= ranking.index(worst) for ranking in rankings):
        return "orders_disagree"
    return {
        **{name: group[name] for name in ("dialogue_id", "round_index", "model")},
        **{name: group[name] for name in ("instruction", "input", "history")},
        "chosen": group["replies"][best],
        "rejected": group["replies"][worst],
        "candidates": len(group["replies"]),
        "chosen_rank": places[best],
        "rejected_rank": places[worst],
        "reason": answers[0].value["reason"],
        "reply_keys": [answer.reply.key for answer in answers if answer.reply],
    }


def _asking(config: Config, workspace: Workspace) -> Asking:
    return Asking(config, config.judge, workspace, Ranking(), "preferences")


def _fingerprint(config: Config, workspace: Workspace) -> dict[str, Any]:
    settings = {
        "seed": config.seed,
        "both_orders": config.preferences.both_orders,
        "judge": answered_by(config.judge),
        "prompt": load(PROMPT).version,
    }
    return workspace.fingerprint(settings, workspace.input_digests(ROUNDS_TABLE, CANDIDATES))


def _groups(config: Config, workspace: Workspace) -> list[Row]:
    candidates = workspace.read_table(CANDIDATES).to_pylist()
    asked = workspace.read_table(ROUNDS_TABLE).to_pylist()
    return groups_of(candidates, asked, config.seed)


def _questions(config: Config, groups: Sequence[Row]) -> list[Row]:
    """What the judge is asked: every group with two replies, in one order or in both."""
    asked = [group for group in groups if len(group["replies"]) > 1]
    turned = [{**group, "order": group["order"][::-1]} for group in asked]
    return [*asked, *turned] if config.preferences.both_orders else asked


def plan(config: Config, workspace: Workspace) -> Plan:
    """What ranking would take: rounds, calls not in the reply store, tokens, cost."""
    if not all(workspace.exists(name, "manifest.json") for name in (ROUNDS_TABLE, CANDIDATES)):
        return Plan(notes=(f"judge: {config.judge.model}, prompt {PROMPT}",))
    if workspace.is_done(ARTIFACT, _fingerprint(config, workspace)) and not _unasked(workspace):
        return Plan(done=True)
    asking, groups = _asking(config, workspace), _groups(config, workspace)
    return asking.plan(_questions(config, groups), count=len(groups))


def run(config: Config, workspace: Workspace) -> Mapping[str, Any]:
    """Rank every round's replies and write the pairs; returns the manifest of `preferences/`."""
    fingerprint = _fingerprint(config, workspace)
    make = partial(_rank, config, workspace, fingerprint)
    make_or_ask_again(workspace, ARTIFACT, fingerprint, _unasked, make)
    return workspace.manifest(ARTIFACT)


def _unasked(workspace: Workspace) -> bool:
    reasons = workspace.manifest(ARTIFACT)["counts"]["without_pair_by_reason"]
    return unasked(reason.removeprefix(_UNSCORED) for reason in reasons)


def _rank(config: Config, workspace: Workspace, fingerprint: Mapping[str, Any]) -> None:
    started = time.time()
    groups, asking = _groups(config, workspace), _asking(config, workspace)
    answers: dict[tuple[str, str], list[Answer]] = defaultdict(list)
    for answer in asking.run(_questions(config, groups)):
        answers[answer.row["model"], _round_name(answer.row)].append(answer)
    pairs, rejects, reasons = [], [], Counter[str]()
    for group in groups:
        found = answers[group["model"], _round_name(group)]
        pair = pair_of(group, found)
        if isinstance(pair, dict):
            pairs.append({**pair, "judge": config.judge.model})
            continue
        reasons[pair] += 1
        raw = "\n".join(answer.reply.text for answer in found if answer.reply)
        rejects.append(
            Reject(
                stage="preferences",
                reason=pair,
                source_id=f"{group['model']}, round {group['round_index']}",
                dialogue_id=group["dialogue_id"],
                detail="; ".join(answer.detail for answer in found if answer.detail),
                raw=raw,
            ).row()
        )
    workspace.clear(REJECTED)
    if rejects:
        workspace.write_table(pa.Table.from_pylist(rejects, REJECTS), REJECTED)
    allowed = config.preferences.max_reject_rate
    if not pairs or len(rejects) > allowed * len(groups):
        raise UserError(
            f"{len(rejects)} of {len(groups)} rounds gave no pair ({dict(reasons)}); "
            f"preferences.max_reject_rate allows {allowed:.0%}",
            f"see {REJECTED}/; try another judge model, more preferences.seeds, or raise the rate",
        )
    workspace.clear(ARTIFACT)
    workspace.write_table(pa.Table.from_pylist(pairs, PREFERENCES), ARTIFACT)
    workspace.commit(
        ARTIFACT,
        stage="preferences",
        settings=config.preferences,
        fingerprint=fingerprint,
        counts={
            "rounds": len(groups),
            "pairs": len(pairs),
            "without_pair": len(rejects),
            "without_pair_by_reason": dict(reasons),
            "pairs_by_model": dict(Counter(pair["model"] for pair in pairs)),
        },
        started=started,
        usage=asking.usage.facts(),
        llm=answered_by(config.judge),
        prompt={"name": PROMPT, "version": load(PROMPT).version},
        note="Automatic judgements by the LLM named, not by people.",
    )


ROUNDS_STAGE = Stage("preference_rounds", plan_rounds, choose_rounds, uses_ray=False)
STAGE = Stage("preferences", plan, run, check_paths=("llm",), uses_ray=False)
