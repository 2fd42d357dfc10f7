"""The safety check on the committed test set, and its invariants."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milm_ray.errors import UserError
from milm_ray.serving.safety import SafetyConfig, assess
from milm_ray.serving.safety.conversation import HistoryError
from milm_ray.serving.safety.normalize import normalize
from milm_ray.serving.safety.train import written

ITEMS = [
    json.loads(line)
    for line in (Path(__file__).parent / "safety_items.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]
# A held-out part whose errors were looked at joins the tune part and waits for the next one.
SPLITS = sorted({item["split"] for item in ITEMS})
TUNE = [item for item in ITEMS if item["split"] == "tune"]
RANK = {"none": 0, "medium": 1, "high": 2}
KINDS = {
    *("direct", "indirect", "negated", "third_person", "idiom", "homophone", "split"),
    *("role_play", "pinyin", "english", "injection", "look_alike"),
}


def client(*turns: str) -> list[dict[str, str]]:
    return [{"role": "client", "content": turn} for turn in turns]


def items(split: str, level: str) -> list[dict]:
    return [item for item in ITEMS if item["split"] == split and item["level"] == level]


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a proportion."""
    z, p = 1.96, hits / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return middle - half, middle + half


def rate(split: str, level: str, record_property) -> float:
    """Share of the items of a level that get exactly it; printed by kind with the interval."""
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for item in items(split, level):
        by_kind[item["kind"]].append(assess(item["history"]).level == level)
    flat = [right for rights in by_kind.values() for right in rights]
    low, high = wilson(sum(flat), len(flat))
    print(f"{split} {level}: {sum(flat)}/{len(flat)}, 95 % interval {low:.3f} to {high:.3f}")
    for kind, rights in by_kind.items():
        print(f"  {kind}: {sum(rights)}/{len(rights)}")
    record_property(f"{split}_{level}", f"{sum(flat)}/{len(flat)} [{low:.3f}, {high:.3f}]")
    return sum(flat) / len(flat)


def test_the_test_set_is_large_complete_and_its_parts_are_apart():
    assert len(ITEMS) >= 300
    for split in SPLITS:
        assert {item["kind"] for item in ITEMS if item["split"] == split} >= KINDS
    assert len({item["id"] for item in ITEMS}) == len(ITEMS)

    def texts(split: str) -> set[str]:
        return {json.dumps(i["history"], ensure_ascii=False) for i in ITEMS if i["split"] == split}

    assert not texts("tune") & texts("held_out")
    trained = {example.text for example in written()}
    held_out = {
        normalize(turn["content"])
        for item in ITEMS
        if item["split"] == "held_out" and len(item["history"]) == 1
        for turn in item["history"]
    }
    assert not trained & held_out


# The goal for unseen words is a recall of 0.98 and false alarms of at most 0.05. The held-out part,
# by three writers who saw neither rules nor training lines: 236 of 240, 10 of 259. Of them the 130
# items of kind "numbers" came later: 39 of 40, 1 of 90. The others are harder: 197 of 200, 9 of 169
# by thresholds that were chosen on the two parts before. A part that was tuned on shows 0.98 and
# more, which says nothing about new words.
RECALL = {"tune": 0.98, "held_out": 0.98}
FALSE_ALARMS = {"tune": 0.05, "held_out": 0.05}


@pytest.mark.parametrize("split", SPLITS)
def test_recall_on_high_risk(split, record_property):
    assert rate(split, "high", record_property) >= RECALL[split]


@pytest.mark.parametrize("split", SPLITS)
def test_false_alarms_on_benign(split, record_property):
    assert 1 - rate(split, "none", record_property) <= FALSE_ALARMS[split]


@pytest.mark.parametrize("kind", sorted({item["kind"] for item in TUNE}))
def test_no_kind_of_the_tune_part_is_left_behind(kind):
    chosen = [item for item in TUNE if item["kind"] == kind]
    right = [
        RANK[assess(item["history"]).level] >= RANK[item["level"]]
        if item["level"] != "none"
        else assess(item["history"]).level == "none"
        for item in chosen
    ]
    assert sum(right) >= 0.9 * len(right), f"{kind}: {sum(right)} of {len(right)}"


def test_category_of_high_risk_is_among_those_found():
    found = [
        item["category"] in assess(item["history"]).categories
        for item in items("tune", "high")
        if assess(item["history"]).level != "none"
    ]
    assert sum(found) >= 0.95 * len(found)


def test_an_earlier_turn_counts_and_a_retraction_does_not_undo_it():
    history = [
        *client("我已经写好遗书了"),
        {"role": "counselor", "content": "谢谢你告诉我。"},
        *client("开玩笑的，我们接着说戒烟吧"),
    ]
    found = assess(history)
    assert (found.level, found.category, found.turn) == ("high", "suicide", 0)


@pytest.mark.parametrize(
    "later",
    [
        "开玩笑的啦，别当真，我们继续聊减肥吧",
        "没事了，刚才瞎说的",
        "哈哈逗你的",
        "嗯",
        "just kidding lol",
    ],
)
def test_taking_it_back_changes_nothing(later):
    high = [item for item in items("held_out", "high") if assess(item["history"]).level == "high"]
    asked = {"role": "counselor", "content": "我有点担心您，能多说一点吗？"}
    for item in high:
        assert assess([*item["history"], asked, *client(later)]).level == "high", item["id"]


def test_a_counselors_question_is_not_the_clients_risk_but_a_yes_to_it_is():
    question = {"role": "counselor", "content": "你有没有想过自杀？"}
    assert assess([question]).level == "none"
    assert assess([question, *client("没有，从来没有")]).level == "none"
    assert assess([question, *client("有")]).level == "high"
    assert assess([question, *client("以前有过，现在好了")]).level == "medium"
    assert assess([question, *client("不想说这个")]).level == "medium"


def test_a_plan_split_over_turns_is_found_with_other_turns_in_between():
    assert assess(client("我想", "从楼上跳下去")).level == "high"
    assert assess(client("我想", "今天好热", "从楼上跳下去")).level == "high"
    assert assess(client("我想", "少抽一点烟")).level == "none"


def test_a_figure_of_speech_in_a_story_does_not_silence_the_rest_of_it():
    risk = "火车开过来的时候我往前迈了一步，差点就没收回来"
    assert assess(client(f"今天累死了，{risk}")).evidence == assess(client(risk)).evidence != ()


@pytest.mark.parametrize(
    "text", ["content", "嗯嗯，好的", "对，就是这样", "Xylophon quasselt brumm"]
)
def test_words_that_say_nothing_are_no_alarm(text):
    assert assess(client(text)).level == "none"


def test_what_is_found_is_told_without_the_clients_words():
    found = assess(client("我想自杀，我叫王小明"))
    assert found.evidence
    assert "王小明" not in repr(found)
    assert 0 < found.score <= 1


def test_a_minor_is_noticed_and_is_no_alarm():
    assert assess(client("我今年13岁，想少玩手机")).minor
    assert assess(client("我今年13岁，想少玩手机")).level == "none"
    assert not assess(client("我今年43岁，想少玩手机")).minor


def test_empty_histories_are_calm():
    assert assess([]).level == "none"
    assert assess(client("")).level == "none"
    assert assess(client("")).category == "none"


@pytest.mark.parametrize(
    "history",
    [
        None,
        "我想死",
        {"role": "client", "content": "你好"},
        ["我想死"],
        [{"role": "user", "content": "你好"}],
        [{"role": "client"}],
        [{"role": "client", "content": None}],
    ],
)
def test_a_malformed_history_is_an_error_that_says_what_to_pass(history):
    with pytest.raises(HistoryError) as caught:
        assess(history)
    assert isinstance(caught.value, UserError)
    assert isinstance(caught.value, TypeError)
    assert caught.value.fix


def test_thresholds_come_from_the_configuration():
    vague = client("火车开过来的时候我往前迈了一步，差点就没收回来")
    strict = SafetyConfig(classifier_medium=0.001, classifier_high=0.001)
    deaf = SafetyConfig(classifier_medium=1.0, classifier_high=1.0)
    assert RANK[assess(vague, strict).level] > RANK[assess(vague, deaf).level]


HIGH = [
    item["history"][0]["content"]
    for item in items("tune", "high")
    if len(item["history"]) == 1 and item["kind"] in ("direct", "indirect", "traditional")
    if assess(item["history"]).level == "high"
]
BENIGN = [
    item["history"][0]["content"]
    for item in items("tune", "none")
    if len(item["history"]) == 1 and item["kind"] == "look_alike"
]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([t for t in HIGH if t.isascii() is False]), st.data())
def test_spaces_between_characters_hide_nothing(text, data):
    gaps = data.draw(st.lists(st.sampled_from(["", " ", "\u3000"]), min_size=len(text)))
    spaced = "".join(char + gap for char, gap in zip(text, gaps, strict=False))
    assert assess(client(spaced)).level == "high", spaced


HAN = [
    turn["content"]
    for item in ITEMS
    for turn in item["history"]
    if not re.search("[a-zａ-ｚɑāáǎàōóǒò]", turn["content"], re.IGNORECASE)
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(HAN), st.randoms(use_true_random=False))
def test_spaces_between_han_characters_change_nothing_that_is_read(text, random):
    spaced = "".join(char + random.choice(["", " ", "\u3000", "  ", "\u200b"]) for char in text)
    assert normalize(spaced) == normalize(text), spaced


NUMBERS = st.one_of(
    st.integers(0, 10**12).map(str),
    st.uuids().map(lambda code: code.hex[:8]),
    st.times().map(lambda time: f"{time:%H:%M}"),
    st.dates().map(str),
    st.decimals(0, 300, places=1, allow_nan=False).map(str),
)
HARMLESS = ["{}", "今天 {}", "我的编号是{}。", "昨晚{}睡的", "体重{}了", "my code is {}"]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(HARMLESS), NUMBERS)
def test_no_number_or_code_raises_an_alarm_by_its_digits(frame, number):
    assert assess(client(frame.format(number))).level == "none"


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("wo3 xiang3 si3", "我想死"),
        ("我想zi4sha1", "我想自杀"),
        ("5u1c1de", "suicide"),
        ("a1b9c3d8", "a1b9c3d8"),
        ("xiang3 jiao4 ta1", "xiang3jiao4ta1"),
    ],
)
def test_digits_within_words_are_tones_letters_or_a_code(text, read):
    assert normalize(text) == read


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["i want to kill myself", "wo bu xiang huo le", "我要zisha", "kms tonight"]))
def test_full_width_and_capitals_hide_nothing(text):
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text.upper())
    assert assess(client(wide)).level == "high"


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(HIGH),
    st.lists(st.sampled_from(BENIGN), max_size=4),
    st.lists(st.sampled_from(BENIGN), max_size=4),
)
def test_benign_turns_around_it_never_lower_the_level(text, before, after):
    found = assess(client(*before, text, *after))
    assert found.level == "high"
    assert found.score >= assess(client(text)).score


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "role": st.sampled_from(["client", "counselor"]),
                "content": st.text(st.characters(exclude_categories=()), max_size=80),
            }
        ),
        max_size=6,
    )
)
def test_any_text_at_all_is_assessed(history):
    assert assess(history).level in RANK


def test_a_very_long_turn_is_read_to_its_end():
    filler = "今天跑了五公里，感觉不错。" * 2000
    assert assess(client(filler)).level == "none"
    assert assess(client(filler + "其实我不想活了")).level == "high"


@pytest.mark.parametrize("run", ["ai" * 1000, "ai" * 1000 + "b", "wo" * 700 + "wobuxianghuole"])
def test_letters_that_parse_in_many_ways_are_read_all_the_same(run: str) -> None:
    # A search through the parses of the first two would not end within the test's time.
    assert assess(client(run)).level == ("high" if run.endswith("huole") else "none")
