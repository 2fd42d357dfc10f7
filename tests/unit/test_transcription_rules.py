"""What makes a teacher's reply an MI dialogue, and what is rejected with which reason."""

import json

import pytest

from milm_ray.config import TranscribeSection
from milm_ray.dataset.target import target_behavior
from milm_ray.dataset.transcribe import parse_transcription
from milm_ray.llm.exchange import Unusable
from milm_ray.schema import Turn


def reply(rounds: int = 4, **replaced: str) -> str:
    """A teacher's reply; `c2="…"` or `a3="…"` replaces a client's or counselor's turn."""
    turns = []
    for number in range(1, rounds + 1):
        client = replaced.get(f"c{number}", f"最近总是熬夜，第{number}次想改。")
        counselor = replaced.get(f"a{number}", f"您第{number}次提到想改，这对您很重要。")
        turns.append({"role": "client", "content": client})
        turns.append({"role": "counselor", "content": counselor})
    return json.dumps({"dialogue": turns}, ensure_ascii=False)


def fault(text: str, source_rounds: int = 4, **settings: object) -> str:
    with pytest.raises(Unusable) as caught:
        parse_transcription(text, TranscribeSection.model_validate(settings), source_rounds)
    return caught.value.reason


def test_a_good_reply_becomes_turns() -> None:
    turns = parse_transcription(f"```json\n{reply(5)}\n```", TranscribeSection(), 4)
    assert [turn.role for turn in turns] == ["client", "counselor"] * 5
    assert turns[0] == Turn("client", "最近总是熬夜，第1次想改。")


def test_rounds_outside_the_limits_are_rejected() -> None:
    assert fault(reply(2)) == "round_count"
    assert fault(reply(9), max_rounds=8) == "round_count"
    assert fault(reply(5), preserve_rounds=True) == "rounds_not_preserved"
    assert len(parse_transcription(reply(4), TranscribeSection(preserve_rounds=True), 4)) == 8


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("抱歉，我不能。", "not_json"),
        (reply()[:-3], "not_json"),
        ('{"turns": []}', "off_schema"),
        ('{"dialogue": "来访者：你好"}', "off_schema"),
        ('{"dialogue": [{"role": "user", "content": "你好"}]}', "off_schema"),
        ('{"dialogue": [{"role": "client", "content": 3}]}', "off_schema"),
        ('{"dialogue": []}', "empty"),
        (reply(c2=" "), "empty_turn"),
    ],
)
def test_what_is_not_a_dialogue(text: str, reason: str) -> None:
    assert fault(text) == reason


def test_turns_must_alternate_and_end_with_the_counselor() -> None:
    turns = json.loads(reply())["dialogue"]
    assert fault(json.dumps({"dialogue": turns[1:]})) == "roles_do_not_alternate"
    assert fault(json.dumps({"dialogue": turns[:-1]})) == "ends_with_client"
    assert fault(json.dumps({"dialogue": turns[:1]})) == "one_sided"


@pytest.mark.parametrize(
    "said", ["（点头）您说得对。", "您愿意说说吗？(微笑)", "【停顿】好的。", "*叹气*我明白了。"]
)
def test_stage_directions_are_rejected(said: str) -> None:
    assert fault(reply(a2=said)) == "stage_direction"


@pytest.mark.parametrize(
    "said",
    [
        "根据动机式访谈的原则，您觉得呢？",
        "这是一个复杂反映。",
        "作为一个AI，我不能回答。",
        "心理咨询师：您好。",
        "请按JSON输出。",
    ],
)
def test_leaked_instructions_are_rejected(said: str) -> None:
    assert fault(reply(a1=said)) == "leaked_instruction"


def test_ordinary_speech_with_figures_is_not_a_stage_direction() -> None:
    said = "从0到10分，您给自己打几分？3*2=6，您算得很清楚。"
    assert len(parse_transcription(reply(a2=said), TranscribeSection(), 4)) == 8


@pytest.mark.parametrize(
    ("client", "behavior"),
    [
        ("我想戒烟，抽了十年，一天一包烟。", "smoking"),
        ("花呗和信用卡都还不上了，还在网购。", "advance_consumption"),
        ("天天刷短视频到半夜，放不下手机。", "phone_use"),
        ("医生说我血压高，可我老忘了吃药。", "medication_and_chronic_illness"),
        ("我感觉人生没有意义。", ""),
    ],
)
def test_the_target_behavior_is_tagged(client: str, behavior: str) -> None:
    turns = [Turn("client", client), Turn("counselor", "您愿意多说一点吗？")]
    assert target_behavior(turns) == behavior


def test_the_corpus_own_topic_counts() -> None:
    turns = [Turn("client", "我最近很烦。"), Turn("counselor", "发生了什么？")]
    assert target_behavior(turns, "减肥") == "weight_and_diet"
