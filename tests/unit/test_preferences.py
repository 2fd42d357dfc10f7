"""Preference pairs from a judge's rankings: what makes a pair, and what stays unscored."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pyarrow as pa
import pytest

from milm_ray.config import Config
from milm_ray.dataset.preferences import (
    PROMPT,
    Ranking,
    choose_rounds,
    groups_of,
    pair_of,
    plan,
    run,
)
from milm_ray.errors import UserError
from milm_ray.llm.ask import Asking
from milm_ray.llm.exchange import Answer, Unusable
from milm_ray.llm.replies import Reply, request_key
from milm_ray.llm.reply_store import ReplyStore
from milm_ray.schema import MI_DIALOGUES, PREDICTIONS, PREFERENCES
from milm_ray.serving import candidates
from milm_ray.workspace import Workspace

CONFIG = Config.model_validate(
    {"judge": {"model": "judge-1", "offline": True}, "preferences": {"rounds": 6}}
)
TEXTS = ["您很想改变。", "您必须戒烟。", "我明白。"]


def commit(workspace: Workspace, artifact: str, table: pa.Table) -> None:
    workspace.write_table(table, artifact)
    workspace.commit(
        artifact, stage="test", settings={}, fingerprint={}, counts={}, started=time.time()
    )


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A workspace with training dialogues, rounds chosen of them, and three replies to each."""
    place = Workspace.open(str(tmp_path))
    dialogues = [
        {
            "dialogue_id": f"d{number}",
            "topic": "",
            "turns": [
                {"role": role, "content": f"{role} {number} {turn}"}
                for turn in range(4)
                for role in ("client", "counselor")
            ],
        }
        for number in range(3)
    ]
    commit(place, "train", pa.Table.from_pylist(dialogues, MI_DIALOGUES))
    choose_rounds(CONFIG, place)
    return place


def sampled(workspace: Workspace, texts: list[str] = TEXTS) -> list[dict[str, object]]:
    rows = workspace.read_table("preference_rounds").to_pylist()
    found = [
        {
            "dialogue_id": row["dialogue_id"],
            "round_index": row["round_index"],
            "model": "llama3",
            "variant": "adapter",
            "sampling": f"seed-{seed}",
            "text": text,
        }
        for row in rows
        for seed, text in enumerate(texts)
    ]
    commit(workspace, "candidates", pa.Table.from_pylist(found, PREDICTIONS))
    return found


def groups(workspace: Workspace) -> list[dict[str, object]]:
    rounds = workspace.read_table("preference_rounds").to_pylist()
    return groups_of(workspace.read_table("candidates").to_pylist(), rounds, CONFIG.seed)


def judged(workspace: Workspace, group: dict, best_to_worst: list[str] | str, turned: bool) -> None:
    """Keep the judge's reply to one question in the store."""
    row = {**group, "order": group["order"][::-1] if turned else group["order"]}
    request = Ranking().request(row)
    text = best_to_worst
    if isinstance(best_to_worst, list):
        shown = [row["replies"][number] for number in row["order"]]
        places = [shown.index(reply) + 1 for reply in best_to_worst]
        text = json.dumps({"ranking": places, "reason": "第一条接住了来访者的话"})
    reply = Reply(request_key(CONFIG.judge, request), text, subject=request.subject)
    ReplyStore(workspace).put([reply])


def test_rounds_are_a_seeded_sample_of_the_training_rounds(workspace):
    rows = workspace.read_table("preference_rounds").to_pylist()
    assert len(rows) == 6
    assert rows == sorted(rows, key=lambda row: (row["dialogue_id"], row["round_index"]))
    assert all(len(row["history"]) == row["round_index"] - 1 for row in rows)
    more = Config.model_validate({"preferences": {"rounds": 12}})
    choose_rounds(more, workspace)
    larger = workspace.read_table("preference_rounds").to_pylist()
    assert len(larger) == 12
    assert all(row in larger for row in rows)


def test_what_is_judged_are_different_replies_in_a_seeded_order(workspace):
    sampled(workspace, [*TEXTS, TEXTS[0], "  "])
    found = groups(workspace)
    assert len(found) == 6
    assert all(group["replies"] == TEXTS for group in found)
    assert len({tuple(group["order"]) for group in found}) > 1
    question = Ranking().request(found[0]).messages[1]["content"]
    assert question.count("client") == found[0]["round_index"]
    for place, number in enumerate(found[0]["order"], 1):
        assert f"【{place}】{TEXTS[number]}" in question


def test_replies_from_elsewhere_are_ranked_and_not_replaced(workspace):
    sampled(workspace)
    given = workspace.manifest("candidates")
    assert candidates.plan(CONFIG, workspace).done
    assert candidates.run(CONFIG, workspace) == given
    assert workspace.read_table("candidates").num_rows == 18


def test_replies_to_rounds_that_were_not_chosen_are_named(workspace):
    sampled(workspace)
    fewer = Config.model_validate({"preferences": {"rounds": 5}})
    choose_rounds(fewer, workspace)
    with pytest.raises(UserError, match=r"not in preference_rounds/ \(1, such as round"):
        groups(workspace)


@pytest.mark.parametrize(
    "text",
    ["没有", "{}", '{"ranking": [1, 2]}', '{"ranking": [1, 1, 2]}', '{"ranking": [true, 2, 3]}'],
)
def test_what_is_no_ranking_of_all_replies_is_unusable(text):
    with pytest.raises(Unusable):
        Ranking().parse({"order": [0, 1, 2]}, text)


def answered(group, ranking):
    return Answer(group, Reply("k", ""), value={"ranking": ranking, "reason": "r"})


def test_a_pair_is_what_both_orders_agree_on():
    group = {
        **{"dialogue_id": "d", "round_index": 1, "model": "m", "instruction": "", "input": ""},
        **{"history": [], "replies": ["a", "b", "c"], "order": [2, 0, 1]},
    }
    pair = pair_of(group, [answered(group, [0, 2, 1]), answered(group, [2, 0, 1])])
    assert (pair["chosen"], pair["rejected"]) in {("a", "b"), ("c", "b")}
    assert (pair["chosen_rank"], pair["rejected_rank"]) == (1.5, 3.0)
    clear = pair_of(group, [answered(group, [1, 0, 2])])
    assert (clear["chosen"], clear["rejected"]) == ("b", "c")
    disagreed = pair_of(group, [answered(group, [0, 1, 2]), answered(group, [2, 1, 0])])
    assert disagreed == "orders_disagree"
    unread = Answer(group, Reply("k", "?"), reason="not_json")
    assert pair_of(group, [answered(group, [0, 1, 2]), unread]) == "unscored: not_json"
    assert pair_of({**group, "replies": ["a"]}, []) == "no_two_different_replies"


def test_pairs_unscored_rounds_and_the_account(workspace):
    sampled(workspace)
    for number, group in enumerate(groups(workspace)):
        for turned in (False, True):
            ranking = [TEXTS[0], TEXTS[2], TEXTS[1]]
            if number == 0 and turned:
                ranking = ranking[::-1]
            judged(workspace, group, "看不出" if number == 1 else ranking, turned)
    assert plan(CONFIG, workspace).llm_calls == 0
    manifest = run(CONFIG, workspace)
    assert manifest["counts"]["pairs"] == 4
    assert manifest["counts"]["without_pair_by_reason"] == {
        "orders_disagree": 1,
        "unscored: not_json": 1,
    }
    assert manifest["counts"]["pairs_by_model"] == {"llama3": 4}
    assert manifest["prompt"]["name"] == PROMPT
    table = workspace.read_table("preferences")
    assert table.schema.equals(PREFERENCES)
    for row in table.to_pylist():
        assert (row["chosen"], row["rejected"]) == (TEXTS[0], TEXTS[1])
        assert row["judge"] == "judge-1"
        assert row["candidates"] == 3
        assert len(row["reply_keys"]) == 2
    assert plan(CONFIG, workspace).done
    rejects = pa.parquet.read_table(workspace.parquet_files("rejects/preferences")[0])
    assert rejects.num_rows == 2


def test_a_round_that_the_judge_did_not_get_to_rank_is_asked_again(workspace, monkeypatch):
    online = Config.model_validate({"judge": {"model": "judge-1"}})
    sampled(workspace)
    first, *others = groups(workspace)
    for group in others:
        for turned in (False, True):
            judged(workspace, group, TEXTS, turned)

    def unreached(asking, rows, missing):
        return {call.number: ("no_reply", "HTTP 500") for call in missing}

    with monkeypatch.context() as patch:
        patch.setattr(Asking, "_send", unreached)
        made = run(online, workspace)
    assert made["counts"]["without_pair_by_reason"] == {"unscored: no_reply": 1}
    assert not plan(CONFIG, workspace).done
    assert run(CONFIG, workspace) == made  # offline, nothing comes and nothing is lost
    for turned in (False, True):
        judged(workspace, first, TEXTS, turned)
    assert run(CONFIG, workspace)["counts"]["pairs"] == 6
    assert plan(CONFIG, workspace).done


def test_too_many_rounds_without_a_pair_fail_after_everything_is_written(workspace):
    sampled(workspace)
    for group in groups(workspace):
        for turned in (False, True):
            judged(workspace, group, "看不出", turned)
    with pytest.raises(UserError, match="6 of 6 rounds gave no pair"):
        run(CONFIG, workspace)
    assert workspace.parquet_files("rejects/preferences")
    assert not workspace.exists("preferences", "manifest.json")
