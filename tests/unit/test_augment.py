"""Augmentation: copies of training dialogues only, each still a dialogue, none twice."""

import json
import random
from pathlib import Path

import pytest

from milm_ray.config import Config
from milm_ray.dataset.augment import SYNONYMS, Paraphrasing, augment, replace_synonyms
from milm_ray.llm.replies import Reply, request_key
from milm_ray.llm.reply_store import ReplyStore
from milm_ray.schema import Turn, structure_fault, turns_of
from milm_ray.workspace import Workspace


def row(
    number: int, words: str = "但是我现在经常觉得特别疲惫，因为每天都睡不好。"
) -> dict[str, object]:
    contents = [f"{words}第{number}位。", "听起来您非常疲惫，其实您一直很努力。"] * 3
    roles = ["client", "counselor"] * 3
    return {
        "dialogue_id": f"d{number}",
        "corpus": "smilechat",
        "source_id": str(number),
        "topic": "",
        "turns": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)],
        "source_dialogue_id": f"s{number}",
        "target_behavior": "insomnia",
        "reply_key": "k",
    }


def test_a_synonym_group_is_symmetric_and_never_replaces_a_word_by_itself() -> None:
    for word, others in SYNONYMS.items():
        assert word not in others
        assert all(word in SYNONYMS[other] for other in others)


def test_replacing_words_keeps_roles_and_everything_else() -> None:
    turns = turns_of(row(1))
    changed = replace_synonyms(turns, 1.0, random.Random(0))
    assert [turn.role for turn in changed] == [turn.role for turn in turns]
    assert changed[0].content != turns[0].content
    assert changed[0].content.endswith("第1位。")
    assert "睡不好" in changed[0].content
    assert replace_synonyms(turns, 1e-9, random.Random(0)) == turns


def test_synonym_copies_are_seeded_and_keep_their_source(tmp_path: Path) -> None:
    workspace = Workspace.open(str(tmp_path))
    config = Config.model_validate({"augment": {"synonyms": 2, "synonym_rate": 0.5}})
    train = [row(1), row(2), row(3, "啊。")]
    result = augment(config, workspace, train)
    assert augment(config, workspace, train).rows == result.rows
    assert {copy["source_dialogue_id"] for copy in result.rows} <= {"s1", "s2", "s3"}
    ids = [copy["dialogue_id"] for copy in result.rows]
    assert len(ids) == len(set(ids))
    assert not set(ids) & {"d1", "d2", "d3"}
    assert all(structure_fault(turns_of(copy)) is None for copy in result.rows)


def test_off_by_default(tmp_path: Path) -> None:
    assert augment(Config(), Workspace.open(str(tmp_path)), [row(1)]).rows == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rounds", [3, 4])
def test_a_paraphrase_must_keep_every_turn(tmp_path: Path, rounds: int) -> None:
    """With the teacher's reply in the store: three rounds are kept, four are not."""
    workspace = Workspace.open(str(tmp_path))
    config = Config.model_validate({"teacher": {"offline": True}, "augment": {"paraphrases": 1}})
    turns = [
        {"role": role, "content": f"换个说法{number}"}
        for number in range(rounds)
        for role in ("client", "counselor")
    ]
    request = Paraphrasing().request({**row(1), "copy": 1})
    text = json.dumps({"dialogue": turns}, ensure_ascii=False)
    ReplyStore(workspace).put([Reply(request_key(config.teacher, request), text)])
    result = augment(config, workspace, [row(1)])
    if rounds == 3:
        (copy,) = result.rows
        assert turns_of(copy)[0] == Turn("client", "换个说法0")
        assert copy["source_id"] == "1 (paraphrase 1)"
        assert copy["reply_key"] == request_key(config.teacher, request)
    else:
        assert result.rows == []
        assert result.left_out == {"paraphrase_round_count": 1}


def test_copies_are_asked_for_apart() -> None:
    one, two = (Paraphrasing().request({**row(1), "copy": copy}) for copy in (1, 2))
    teacher = Config().teacher
    assert request_key(teacher, one) != request_key(teacher, two)
