"""What a reply must not say, the guard that holds a stream back, and the preset messages."""

from __future__ import annotations

from datetime import date, timedelta
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from milm_ray.serving.safety import (
    CATEGORIES,
    SafetyConfig,
    SentenceGuard,
    assess,
    check_reply,
    help_message,
    intervention_record,
)
from milm_ray.serving.safety.reply import sentences

SAFE = [
    "听起来你一直在努力，也有些累了。",
    "你提到想为了孩子把烟戒掉，这对你很重要。",
    "如果从小的一步开始，你会想先试什么？",
    "每天走三十分钟，是你自己选的，对吗？",
    "你有没有想过自杀？",
    "关于用药，请问问你的医生。",
    "医生说你有高血压，你有些担心。",
    "不要去死，我很担心你。",
    "可以拨打12356，和专业的人聊聊。",
    "我是一个 AI 程序，不能代替医生。",
    "You have tried three times, and you are still here asking how.",
    "What would be a good first step for you?",
]
UNSAFE = {
    "diagnosis": ["你这是抑郁症。", "你的症状符合焦虑症的标准。", "You have depression."],
    "drug": ["可以试试舍曲林。", "建议你吃点安眠药。", "Try some melatonin tonight."],
    "dose": ["每次两片，饭后服用。", "先从50毫克开始。", "Take 20 mg daily.", "你可以停药了。"],
    "cure_promise": ["我保证能治好你。", "这个方法包治失眠。", "I promise you will be cured."],
    "self_harm_method": ["安眠药吃五十片就会死。", "最不痛苦的自杀方式是这样的。"],
    "encourages_harm": ["那你去死吧。", "自杀也是一种选择。", "you should kill yourself"],
    "claims_human": ["我是真人，不是机器人。", "I am a real person."],
    "hours_promise": ["热线12356是24小时的。", "12356全天候有人接听。"],
    "unknown_number": [
        "请拨打热线400-161-9995。",
        "请拨打12356或400-161-9995。",
        "热线：12356、400-161-9995。",
        "请打400-161-9995。",
        "请打12320。",
        "可以联系010-82951332。",
        "这里有人能听你说：010 8295 1332。",
        "他们的微信是13800138000。",
        "拨打988，也可以拨打１２３５６。",
        "Call 1-800-273-8255.",
        "You can call 12356 or 988 right now.",
        "Text HOME to 741741.",
        "You can reach someone at 988.",
        "Call 1-800-273-8255 24 hours a day.",
        "拨打 95003 天津热线。",
        "拨打12320 层层转接。",
        "可以打这些热线：\n1. 400-161-9995 希望热线",
    ],
}
NO_NUMBERS_TO_CALL = [
    "你打了3小时游戏，也打了365天卡。",
    "如果给自己打分，你会打120分吗？",
    "2023-2024年那段时间你常给她打电话。",
    "你说每天10000步，或者800-1200大卡，哪个更容易？",
    "每天的量在800-1200之间，你觉得合适吗？",
    "2026-05-01那天，你打电话时花了1500元。",
    "一通电话聊了100多分钟，第100天了。",
    "你联系了200个客户，跑了3000米。",
    "跟着数：1 2 3 4 5 6 7 8，慢慢呼气。",
    "可以拨打12356、12355，紧急时拨打110或 120。",
    "12356 —— 全国统一心理援助热线；12355 —— 青少年服务台。",
    "你给他打了 30 通电话，花了 300 分钟。",
    "You called her in 2019, and you walked 10,000 steps.",
    "You want to reach 150 pounds, and to text less: 300 times a day is a lot.",
]


@pytest.mark.parametrize("text", SAFE)
def test_a_counselors_ordinary_words_pass(text):
    assert check_reply(text) == []


@pytest.mark.parametrize("text", NO_NUMBERS_TO_CALL)
def test_a_configured_number_an_amount_and_a_date_are_no_invented_number(text):
    assert check_reply(text) == []
    assert "".join(stream(SentenceGuard(), list(text))) == text


@pytest.mark.parametrize(
    "text", ["求助热线：\n- 12356\n- 12320\n", "有一条热线可以打。12320就是。"]
)
def test_an_invented_number_apart_from_the_word_for_it_is_not_shown(text):
    assert "12320" not in "".join(stream(SentenceGuard(), list(text)))


@pytest.mark.parametrize(("kind", "text"), [(k, t) for k, ts in UNSAFE.items() for t in ts])
def test_what_must_not_be_said_is_found_under_its_kind(kind, text):
    assert kind in {violation.kind for violation in check_reply(text)}


def test_a_configured_number_may_be_named():
    lines = [*SafetyConfig().help_lines]
    own = lines[0].model_copy(update={"number": "400-161-9995"})
    assert check_reply("请拨打热线400-161-9995。", SafetyConfig(help_lines=[*lines, own])) == []


def test_what_follows_does_not_excuse_encouragement_of_harm():
    assert check_reply("you should kill yourself你提到想为了孩子把烟戒掉，这对你很重要。")
    assert check_reply("你可以结束自己的生命你说呢")
    assert not check_reply("你不可以自杀，请先联系身边的人。")


def stream(guard: SentenceGuard, pieces: list[str]) -> list[str]:
    return [*(guard.feed(piece) for piece in pieces), guard.finish()]


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted({place % (len(text) + 1) for place in places}), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(SAFE[:4] + SAFE[-2:]), min_size=1, max_size=6),
    st.lists(st.integers(0, 400), max_size=20),
)
def test_a_safe_reply_comes_out_as_it_went_in(parts, places):
    text = " ".join(parts)
    guard = SentenceGuard()
    assert "".join(stream(guard, cut(text, places))) == text
    assert not guard.blocked


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(SAFE[:4]), max_size=3),
    st.sampled_from([text for texts in UNSAFE.values() for text in texts]),
    st.lists(st.sampled_from(SAFE[:4]), max_size=3),
    st.lists(st.integers(0, 400), max_size=20),
)
def test_no_part_of_an_unsafe_sentence_nor_what_follows_is_shown(before, bad, after, places):
    guard = SentenceGuard()
    shown = "".join(stream(guard, cut("".join([*before, bad, *after]), places)))
    assert guard.blocked
    assert "".join(before).startswith(shown)
    assert check_reply(shown) == []
    assert guard.feed("还有一句。") == ""


def test_what_is_said_across_a_full_stop_is_found():
    guard = SentenceGuard(check=lambda text, _: check_reply(text.replace("。", "")))
    shown = "".join(stream(guard, ["你得了。", "抑郁症。", "别怕。"]))
    assert shown == "你得了。"
    assert guard.blocked


@given(st.text("ab1。！？.!? \n”’）", max_size=60))
def test_cutting_into_sentences_loses_nothing(text):
    assert "".join(sentences(text)) == text


def test_a_decimal_point_and_a_doubled_mark_do_not_end_a_sentence():
    assert sentences("服用0.5") == ["服用0.5"]
    assert sentences("真的？！”他说") == ["真的？！”", "他说"]


@pytest.mark.parametrize("lang", ["zh", "en"])
@pytest.mark.parametrize("level", ["medium", "high"])
@pytest.mark.parametrize("category", CATEGORIES)
def test_every_message_gives_a_line_says_it_is_an_ai_and_promises_no_hours(category, level, lang):
    text = help_message(level, category, lang)
    assert "AI" in text
    assert any(line.number in text for line in SafetyConfig().help_lines)
    assert "24" not in text
    assert check_reply(text) == []


def test_the_lines_fit_the_need():
    assert "120" in help_message("high", "medical_emergency")
    assert "110" in help_message("high", "abuse")
    assert "12356" in help_message("high", "suicide")
    assert "12355" not in help_message("high", "suicide")
    assert "12355" in help_message("high", "suicide", minor=True)
    assert help_message("none", "none") == ""


def test_lines_come_from_the_configuration():
    other = SafetyConfig().help_lines[0].model_copy(update={"number": "010-82951332"})
    text = help_message("high", "suicide", lines=[other])
    assert "010-82951332" in text
    assert "12356" not in text


def test_a_line_checked_long_ago_is_reported():
    config = SafetyConfig(check_again_after_days=30)
    checked = config.help_lines[0].checked_on
    assert config.stale_lines(checked + timedelta(days=30)) == []
    assert config.stale_lines(checked + timedelta(days=31)) == config.help_lines


def test_a_line_without_a_date_or_with_an_unknown_key_is_refused():
    line = {"number": "12356", "name_zh": "热线", "name_en": "line"}
    with pytest.raises(ValidationError, match="checked_on"):
        SafetyConfig(help_lines=[line])
    with pytest.raises(ValidationError, match="hours"):
        SafetyConfig(help_lines=[{**line, "checked_on": date(2026, 1, 1), "hours": "24"}])


def test_the_record_has_no_words_of_the_client_unless_configured():
    history = [{"role": "client", "content": "我想自杀，我叫王小明"}]
    found = assess(history)
    assert "王小明" not in str(intervention_record(found, history))
    assert intervention_record(found, history)["level"] == "high"
    logged = intervention_record(found, history, SafetyConfig(log_text=True))
    assert logged["text"] == history[0]["content"]
