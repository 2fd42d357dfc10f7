"""Every reader on the layouts it must know and on the faults it will meet."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milm_ray.config import CORPORA
from milm_ray.corpora.readers import READERS
from milm_ray.corpora.reading import Parsed, Unusable, arrange, decode, stem
from milm_ray.schema import Turn, structure_fault


def read(corpus: str, data: str | bytes, name: str = "", limit: int | None = None) -> Parsed:
    name = name or {"cpsycound": "case_7.txt", "smilechat": "7.json"}.get(corpus, "file.json")
    return READERS[corpus].read(name, data.encode() if isinstance(data, str) else data, limit)


def texts(parsed: Parsed, index: int = 0) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in parsed.dialogues[index].turns]


def reasons(parsed: Parsed) -> list[str]:
    return [reject.reason for reject in parsed.rejects]


def repairs(parsed: Parsed) -> dict[str, int]:
    total: Counter[str] = Counter()
    for repair in parsed.repairs:
        total[repair.what] += repair.number
    return dict(total)


def test_every_corpus_of_the_config_has_a_reader() -> None:
    assert set(READERS) == set(CORPORA)
    assert all(name == reader.name for name, reader in READERS.items())


# --- the rules of a dialogue -------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.sampled_from(["client", "counselor"]), st.text("a \n", max_size=3)), max_size=9
    )
)
def test_arranged_turns_are_always_a_dialogue_and_nothing_goes_uncounted(pairs: Any) -> None:
    changes: Counter[str] = Counter()
    spoken = [role for role, content in pairs if content.strip()]
    if "client" in spoken and "counselor" in spoken[spoken.index("client") :]:
        turns = arrange(pairs, changes)
        assert structure_fault(turns) is None
        assert len(pairs) == len(turns) + changes.total()
    else:
        with pytest.raises(Unusable, match=r"empty|one_sided|no_exchange"):
            arrange(pairs, changes)


def test_neighbours_are_joined_and_ends_trimmed() -> None:
    changes: Counter[str] = Counter()
    turns = arrange(
        [
            ("counselor", "您好"),
            ("client", "睡不好"),
            ("client", "很久了"),
            ("counselor", " "),
            ("counselor", "多久？"),
            ("client", "半年"),
        ],
        changes,
    )
    assert turns == [Turn("client", "睡不好\n很久了"), Turn("counselor", "多久？")]
    assert changes == {
        "leading_counselor_turns_dropped": 1,
        "turns_merged": 1,
        "empty_turns_dropped": 1,
        "trailing_client_turns_dropped": 1,
    }


# --- encodings ---------------------------------------------------------------------------------

CHINESE = "来访者：我睡不好觉，已经半年了。\n\n心理咨询师：听起来这半年很不容易。\n"


@pytest.mark.parametrize(
    ("data", "repair"),
    [
        (CHINESE.encode(), None),
        (CHINESE.encode("utf-8-sig"), "byte_order_mark_removed"),
        (CHINESE.encode("gb18030"), "encoding_gb18030"),
        (CHINESE.encode("utf-16"), "encoding_utf16"),
    ],
)
def test_encodings_that_can_be_repaired(data: bytes, repair: str | None) -> None:
    assert decode(data) == (CHINESE, repair)
    parsed = read("cpsycound", data)
    assert len(parsed.dialogues) == 1
    assert list(repairs(parsed)) == ([repair] if repair else [])


@pytest.mark.parametrize(
    "data",
    [
        CHINESE.encode()[:-2],  # cut inside a character: GB18030 would read it as nonsense
        CHINESE.encode().replace("觉".encode(), b"\xff\xfe"),
        b"\xef\xbb\xbf\xff\xff",
        b"\xff\xfe\x00",
        bytes(range(256)),
    ],
)
def test_damaged_bytes_are_rejected_and_never_become_nonsense(data: bytes) -> None:
    with pytest.raises(Unusable, match="bad_encoding"):
        decode(data)
    parsed = read("cpsycound", data, "case_3.txt")
    assert reasons(parsed) == ["bad_encoding"]
    assert parsed.rejects[0].source_id == "case_3"
    assert parsed.rejects[0].detail.startswith("case_3.txt: ")


def test_half_an_emoji_is_replaced_and_counted() -> None:
    data = '[{"role":"client","content":"我\\ud83d累"},{"role":"counselor","content":"嗯"}]'
    parsed = read("smilechat", data)
    assert texts(parsed)[0] == ("client", "我\ufffd累")
    assert repairs(parsed) == {"characters_replaced": 1}
    assert parsed.ids == [parsed.dialogues[0].dialogue_id]


def test_a_file_name_without_its_endings() -> None:
    assert stem("Data/case_0.txt") == "case_0"
    assert stem("data/12.json.gz") == "12"
    assert stem("efaqa-corpus-zh.utf8.gz") == "efaqa-corpus-zh"


# --- one file per dialogue ---------------------------------------------------------------------


def test_smilechat() -> None:
    turns = [
        {"role": "client", "content": "烦", "annotation": [{"sentence": "烦", "label": ""}]},
        {"role": "counselor", "content": "怎么了？"},
        {"role": "client", "content": "没事"},
    ]
    parsed = read("smilechat", json.dumps(turns, ensure_ascii=False), "data/41.json")
    assert texts(parsed) == [("client", "烦"), ("counselor", "怎么了？")]
    assert parsed.dialogues[0].source_id == "41"
    assert repairs(parsed) == {"trailing_client_turns_dropped": 1}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n ", "empty"),
        ("[]", "empty"),
        ("[", "broken_json"),
        ('[{"role": "client", "content": "a"}', "broken_json"),
        ("[" * 100_000, "broken_json"),
        ("null", "wrong_shape"),
        ('{"role": "client"}', "wrong_shape"),
        ('["client"]', "wrong_shape"),
        ('[{"role": "client", "content": 3}]', "wrong_shape"),
        ('[{"role": "client", "content": null}]', "empty"),
        ('[{"role": "client", "content": "a"}]', "one_sided"),
        (
            '[{"role": "counselor", "content": "a"}, {"role": "client", "content": "b"}]',
            "no_exchange",
        ),
        ('[{"role": "system", "content": "a"}]', "unknown_speaker"),
        ('[{"content": "a"}]', "unknown_speaker"),
        ('[{"role": ["client"], "content": "a"}]', "unknown_speaker"),
    ],
)
def test_smilechat_faults(text: str, reason: str) -> None:
    parsed = read("smilechat", text)
    assert reasons(parsed) == [reason]
    assert not parsed.dialogues
    assert parsed.rejects[0].source_id == "7"
    assert len(parsed.rejects[0].raw) <= 2000


def test_cpsycound_continuations_narration_and_named_speakers() -> None:
    text = (
        "（咨询开始）\r\n来访者（小李）：我们总吵架。\r\n\r\n来访者2: 他不听我说。\r\n\r\n"
        "心理咨询师：可以试试：\r\n1. 倾听：先听完。\r\n2. 关注来访者的感受。\r\n\r\n"
        "您愿意吗？\r\n\r\n"
        "妈妈：我愿意。\r\n\r\n---\r\n\r\n咨询师：好。\r\n\r\n后续对话略。\r\n"
        "经过咨询，来访者好转。\r\n"
    )
    parsed = read("cpsycound", text, "Data/case_12.txt")
    assert parsed.dialogues[0].source_id == "case_12"
    assert texts(parsed) == [
        ("client", "我们总吵架。\n他不听我说。"),
        ("counselor", "可以试试：\n1. 倾听：先听完。\n2. 关注来访者的感受。\n您愿意吗？"),
        ("client", "我愿意。"),
        ("counselor", "好。"),
    ]
    assert repairs(parsed) == {
        "narration_lines_dropped": 4,
        "speaker_notes_dropped": 2,
        "third_speakers_taken_as_client": 1,
        "turns_merged": 1,
    }


def test_cpsycound_without_speakers_is_rejected_with_its_text() -> None:
    parsed = read("cpsycound", "这不是对话。\n只是一段话。")
    assert reasons(parsed) == ["unknown_speaker"]
    assert "这不是对话" in parsed.rejects[0].raw


# --- files of many records ---------------------------------------------------------------------


def psydt(identity: Any, *contents: str, system: str = "") -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    messages += [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
    return {"id": identity, "normalizedTag": "婚恋", "messages": messages}


def test_psydtcorpus_train() -> None:
    records = [psydt(0, "a", "b", system="s"), psydt(1, "c", "d", "e", "f")]
    parsed = read("psydtcorpus", json.dumps(records), "PsyDTCorpus_train_mulit_turn_packing.json")
    assert [(d.source_id, d.topic, len(d.turns)) for d in parsed.dialogues] == [
        ("0", "婚恋", 2),
        ("1", "婚恋", 4),
    ]
    assert repairs(parsed) == {"system_messages_dropped": 1}


def test_psydtcorpus_growing_prefixes_leave_the_longest() -> None:
    records = [
        psydt(0, "a", "b"),
        psydt(1, "a", "b", "c", "d"),
        psydt(2, "a", "b", "c", "d", "e", "f"),
        psydt(3, "a", "x"),
    ]
    parsed = read("psydtcorpus", json.dumps(records), "PsyDTCorpus_test_single_turn_split.json")
    assert [(d.source_id, len(d.turns)) for d in parsed.dialogues] == [("test-2", 6), ("test-3", 2)]
    assert repairs(parsed) == {"prefixes_of_a_longer_record_dropped": 2}


def test_a_list_that_breaks_off_gives_the_records_before_the_break() -> None:
    text = json.dumps([psydt(0, "a", "b"), psydt(1, "c", "d")])
    parsed = read("psydtcorpus", text[:-40])
    assert [d.source_id for d in parsed.dialogues] == ["0"]
    assert reasons(parsed) == ["broken_json"]
    assert parsed.rejects[0].source_id == "file#1"


@pytest.mark.parametrize("tail", ["", ",", "\n,", ", [1]", ', "x"', ", nul"])
def test_what_follows_the_last_whole_record_is_never_lost(tail: str) -> None:
    parsed = read("psydtcorpus", "[" + json.dumps(psydt(0, "a", "b")) + tail)
    assert len(parsed.dialogues) == 1
    assert len(parsed.rejects) >= 1


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (7, "wrong_shape"),
        ({"id": 5}, "wrong_shape"),
        ({"id": 5, "messages": {}}, "wrong_shape"),
        ({"id": 5, "messages": [{"role": "user", "content": ["a"]}]}, "wrong_shape"),
        ({"id": 5, "messages": [{"role": "tool", "content": "a"}]}, "unknown_speaker"),
        ({"id": 5, "messages": []}, "empty"),
        ({"id": 5, "normalizedTag": 3, "messages": []}, "wrong_shape"),
        (psydt(5, "z"), "one_sided"),
    ],
)
def test_one_bad_record_costs_only_itself(record: Any, reason: str) -> None:
    records = [psydt(0, "a", "b"), record, psydt(9, "c", "d")]
    parsed = read("psydtcorpus", json.dumps(records))
    assert [d.source_id for d in parsed.dialogues] == ["0", "9"]
    assert reasons(parsed) == [reason]


def test_a_limit_counts_records() -> None:
    records = [psydt(n, f"a{n}", "b") for n in range(5)]
    parsed = read("psydtcorpus", json.dumps(records), limit=2)
    assert [d.source_id for d in parsed.dialogues] == ["0", "1"]


def efaqa(said: list[tuple[str, str]], **fields: Any) -> str:
    messages = [{"sender": s, "type": "textMessage", "value": v, "time": "1"} for s, v in said]
    record = {"md5": "m", "title": "标题", "description": "标题，说明", "label": {"s1": "1.13"}}
    return json.dumps({**record, "chats": messages, **fields}, ensure_ascii=False)


def test_efaqa_owner_is_the_client_and_strangers_are_one_counselor() -> None:
    line = efaqa([("audience", "甲"), ("audience", "乙"), ("owner", "嗯"), ("audience", "丙")])
    parsed = read("efaqa", line)
    assert texts(parsed) == [
        ("client", "标题，说明"),
        ("counselor", "甲\n乙"),
        ("client", "嗯"),
        ("counselor", "丙"),
    ]
    assert (parsed.dialogues[0].source_id, parsed.dialogues[0].topic) == ("m", "低自尊")


def test_efaqa_title_that_the_description_does_not_repeat_is_kept() -> None:
    parsed = read("efaqa", efaqa([("audience", "甲")], title="失眠"))
    assert texts(parsed) == [("client", "失眠\n标题，说明"), ("counselor", "甲")]


def test_efaqa_images_silence_and_broken_lines() -> None:
    image = {"sender": "audience", "type": "imageMessage", "value": "http://x"}
    text = {"sender": "audience", "type": "textMessage", "value": "甲"}
    lines = [
        efaqa([], chats=[image, text]),
        '{"md5": "broken"',
        "",
        efaqa([("owner", "没人吗")], md5="alone"),
        efaqa([("moderator", "x")], md5="who"),
        efaqa([], md5="none", chats=None),
        efaqa([("audience", "答")], md5="untitled", title=None, description=None),
    ]
    parsed = read("efaqa", "\n".join(lines), "efaqa-corpus-zh.utf8.gz")
    assert [d.source_id for d in parsed.dialogues] == ["m"]
    assert repairs(parsed) == {"non_text_messages_dropped": 1}
    assert [(r.source_id, r.reason) for r in parsed.rejects] == [
        ("efaqa-corpus-zh#1", "broken_json"),
        ("alone", "one_sided"),
        ("who", "unknown_speaker"),
        ("none", "wrong_shape"),
        ("untitled", "one_sided"),
    ]


def test_psy_insight() -> None:
    turns = [("Supporter", "您好"), ("Seeker", "我害怕"), ("Supporter", "怕什么？")]
    record = {
        "dialog_id": "000009",
        "topic": "Job Crisis ",
        "dialog": [{"speaker": s, "content": c} for s, c in turns],
    }
    parsed = read("psy_insight", json.dumps([record, {**record, "dialog": turns}]))
    assert texts(parsed) == [("client", "我害怕"), ("counselor", "怕什么？")]
    assert (parsed.dialogues[0].source_id, parsed.dialogues[0].topic) == ("000009", "Job Crisis")
    assert reasons(parsed) == ["wrong_shape"]


ANNOMI = "transcript_id,topic,utterance_id,interlocutor,utterance_text,annotator_id\n"


def test_annomi_volleys_annotators_and_order() -> None:
    rows = (
        "3,quit ,1,client,Sure.,1\n3,quit ,0,therapist,May I?,1\n3,quit ,0,therapist,May I?,2\n"
        '3,quit ,2,therapist,"So, ",1\n3,quit ,3,therapist,how much?,1\n4,x,0,nurse,Hi,1\n'
    )
    parsed = read("annomi", ANNOMI + rows, "AnnoMI-full.csv")
    assert texts(parsed) == [("client", "Sure."), ("counselor", "So,\nhow much?")]
    assert (parsed.dialogues[0].source_id, parsed.dialogues[0].topic) == ("3", "quit")
    assert repairs(parsed) == {
        "rows_of_further_annotators_dropped": 1,
        "turns_merged": 1,
        "leading_counselor_turns_dropped": 1,
    }
    assert [(r.source_id, r.reason) for r in parsed.rejects] == [("4", "unknown_speaker")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a,b\n1,2\n", "wrong_shape"),
        (ANNOMI, "empty"),
        (ANNOMI + "3,quit,one,client,Hi,1\n", "wrong_shape"),
        (ANNOMI + '3,quit,0,client,"Hi\n', "broken_csv"),
    ],
)
def test_annomi_faults(text: str, reason: str) -> None:
    assert reason in reasons(read("annomi", text))


@given(st.sampled_from(CORPORA), st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_bytes_make_a_reader_raise(corpus: str, data: bytes) -> None:
    parsed = read(corpus, data)
    assert parsed.dialogues or parsed.rejects


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["id", "messages", "role", "content", "dialog", "speaker", "chats", "sender", "md5"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.sampled_from(CORPORA), json_values)
def test_no_json_value_makes_a_reader_raise(corpus: str, value: Any) -> None:
    parsed = read(corpus, json.dumps(value))
    assert all(structure_fault(dialogue.turns) is None for dialogue in parsed.dialogues)
