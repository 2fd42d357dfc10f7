import csv
import datetime
import pickle
import zipfile
from pathlib import Path

import openpyxl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from milm_ray.errors import UserError
from milm_ray.miti import sheet
from milm_ray.miti.packet import MASK, Candidate, make_packet
from milm_ray.miti.volleys import split_utterances, volleys
from milm_ray.schema import Turn

TURNS = [
    Turn("client", "我又熬夜了。=1+1这样算睡眠债对吗？"),
    Turn("counselor", "=听起来你很累。你最担心的是什么？"),
    Turn("client", "怕影响上班。"),
    Turn("counselor", "工作对你很重要，你不想再拖累同事。"),
]


def packet():
    other = [Turn("client", "想减肥。"), Turn("counselor", "你愿意说说吗？")]
    return make_packet([Candidate("d-a", "llama3", TURNS), Candidate("d-b", "real", other)], seed=1)


def fill(work, table):
    """A coder's finished tables: every counsellor question Q, every other utterance SR."""
    header, *rows = table
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        if cells["speaker"] == "counselor":
            row[header.index("code")] = "Q" if "？" in cells["text"] else "sr"
    return [header, *rows]


def finished(folder: Path):
    """Two CSV files filled in without a fault, as lists of rows."""
    work = packet()
    paths = sheet.write_csv(work.items, folder, "anna")
    tables = []
    for path in paths:
        with path.open(encoding="utf-8-sig", newline="") as file:
            tables.append(list(csv.reader(file)))
    utterances = fill(work, tables[0])
    scores = [tables[1][0]] + [[row[0], "早睡", "3", "4", "3", "5", ""] for row in tables[1][1:]]
    return work, utterances, scores


def read_back(folder, work, utterances, scores, encoding="utf-8-sig", delimiter=","):
    paths = []
    for name, table in (("u.csv", utterances), ("g.csv", scores)):
        path = folder / name
        with path.open("w", encoding=encoding, newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows(table)
        paths.append(path)
    return sheet.read_csv(*paths, work, "anna")


def faults(folder, work, utterances, scores) -> str:
    with pytest.raises(sheet.SheetError) as caught:
        read_back(folder, work, utterances, scores)
    return str(caught.value)


@pytest.mark.parametrize(
    ("encoding", "delimiter"),
    [("utf-8-sig", ","), ("utf-8", ";"), ("gb18030", ","), ("utf-16", "\t")],
)
def test_csv_sheets_come_back_in_any_encoding_a_spreadsheet_saves(tmp_path, encoding, delimiter):
    work, utterances, scores = finished(tmp_path)
    coded = read_back(tmp_path, work, utterances, scores, encoding, delimiter)
    by_dialogue = {work.key[item.item_id][0]: item for item in coded}
    item = by_dialogue["d-a"]
    assert item.codes == {
        (2, 1): "simple_reflection",
        (2, 2): "question",
        (4, 1): "simple_reflection",
    }
    assert item.target_behavior == "早睡"
    coding = item.coding(work)
    assert (coding.dialogue_id, coding.group, coding.coder, coding.rounds) == (
        "d-a",
        "llama3",
        "anna",
        2,
    )
    assert coding.counts == {"simple_reflection": 2, "question": 1}
    assert coding.global_scores["empathy"] == 5


def test_workbook_comes_back_as_it_was_filled(tmp_path):
    work = packet()
    path = tmp_path / "anna.xlsx"
    sheet.write_xlsx(work.items, path)
    book = openpyxl.load_workbook(path)
    utterances, scores = book[sheet.UTTERANCES], book[sheet.GLOBAL_SHEET]
    texts = [row[4].value for row in utterances.iter_rows(min_row=2)]
    assert "=听起来你很累。" in texts
    assert all(row[4].data_type == "s" for row in utterances.iter_rows(min_row=2))
    for row in utterances.iter_rows(min_row=2):
        if row[3].value == "counselor":
            row[5].value = "CR"
            break
    for row in scores.iter_rows(min_row=2):
        row[1].value = "早睡"
        for cell in row[2:6]:
            cell.value = 3.0
        row[6].value = "no codes in the other"
    book.save(path)
    coded = sheet.read_xlsx(path, work, "anna")
    assert sum(len(item.codes) for item in coded) == 1
    assert coded[0].global_scores["empathy"] == 3
    guide = [row[0] for row in openpyxl.load_workbook(path)[sheet.GUIDE].values]
    assert "EMPH" in guide


def test_excels_date_in_a_score_is_named(tmp_path):
    work = packet()
    path = tmp_path / "anna.xlsx"
    sheet.write_xlsx(work.items, path)
    book = openpyxl.load_workbook(path)
    book[sheet.GLOBAL_SHEET]["C2"] = datetime.datetime(2026, 4, 3)
    book[sheet.UTTERANCES]["B3"] = datetime.date(2026, 1, 2)
    book.save(path)
    with pytest.raises(sheet.SheetError) as caught:
        sheet.read_xlsx(path, work, "anna")
    assert "globals, row 2: cultivating_change_talk is a date" in str(caught.value)
    assert "utterances, row 3: volley is a date" in str(caught.value)


def change(table, row, column, value):
    table[row - 1][table[0].index(column)] = value


def test_each_fault_is_named_by_sheet_and_row(tmp_path):
    work, utterances, scores = finished(tmp_path)
    counselor = [i for i, row in enumerate(utterances, 1) if row[3] == "counselor"]
    client = next(i for i, row in enumerate(utterances, 1) if row[3] == "client")
    change(utterances, counselor[0], "code", "open question")
    change(utterances, counselor[1], "code", "SR/Q")
    change(utterances, client, "code", "Q")
    change(utterances, counselor[2], "text", "改过的话")
    change(scores, 2, "empathy", "6")
    change(scores, 2, "partnership", "")
    change(scores, 3, "item", "item-99")
    message = faults(tmp_path, work, utterances, scores)
    for part in (
        f"utterances, row {counselor[0]}: unknown code 'open question'",
        f"utterances, row {counselor[1]}: two codes on one utterance",
        f"utterances, row {client}: question is given to a client's utterance",
        f"utterances, row {counselor[2]}: the text of",
        "globals, row 2: empathy is 6",
        "globals, row 2: partnership is empty",
        "globals, row 3: item 'item-99' is not in the packet",
        "globals: no row for item-02",
    ):
        assert part in message


def test_rules_of_the_volley_are_enforced_with_the_rows_named(tmp_path):
    work, utterances, scores = finished(tmp_path)
    rows = [i for i, row in enumerate(utterances, 1) if row[1] == "2" and row[3] == "counselor"]
    double = [i for i in rows if utterances[i - 1][2] in ("1", "2")][-2:]
    change(utterances, double[0], "code", "SR")
    change(utterances, double[1], "code", "CR")
    message = faults(tmp_path, work, utterances, scores)
    assert f"utterances, rows {double[0]}, {double[1]}: volley 2" in message
    assert "keep the complex one" in message


def test_missing_double_and_unknown_rows_are_named(tmp_path):
    work, utterances, scores = finished(tmp_path)
    again = list(utterances[1])
    again[-1] = "Q"
    unknown = [*utterances[2][:1], "99", "1", *utterances[2][3:]]
    message = faults(tmp_path, work, [*utterances[:-1], again, unknown], scores)
    assert "is there already, in row 2" in message
    assert "volley 99, utterance 1 is not in the packet" in message
    assert "a row of item-02 is missing" in message


def test_a_half_finished_sheet_is_refused_unless_the_coder_says_no_codes(tmp_path):
    work, utterances, scores = finished(tmp_path)
    for row in utterances[1:]:
        if row[0] == "item-02":
            row[-1] = ""
    assert "globals, row 3: no utterance of item-02 is coded" in faults(
        tmp_path, work, utterances, scores
    )
    change(scores, 3, "comment", "No codes: small talk only")
    assert read_back(tmp_path, work, utterances, scores)[1].codes == {}


def test_files_that_are_no_sheets_are_refused(tmp_path):
    work, utterances, scores = finished(tmp_path)
    assert "no column code" in faults(tmp_path, work, [r[:-1] for r in utterances], scores)
    assert "no column item" in faults(tmp_path, work, [], scores)
    broken = tmp_path / "anna.xlsx"
    broken.write_bytes(b"not a zip")
    with pytest.raises(sheet.SheetError, match="not a readable"):
        sheet.read_xlsx(broken, work, "anna")
    with pytest.raises(sheet.SheetError, match="cannot be read"):
        sheet.read_csv(tmp_path / "none.csv", broken, work, "anna")
    whole = tmp_path / "whole.xlsx"
    sheet.write_xlsx(work.items, whole)
    with zipfile.ZipFile(whole) as book, zipfile.ZipFile(broken, "w") as cut:
        for name in book.namelist():
            data = book.read(name)
            cut.writestr(name, data[: len(data) // 2] if "sheet1" in name else data)
    with pytest.raises(sheet.SheetError, match=r"anna\.xlsx is not a readable"):
        sheet.read_xlsx(broken, work, "anna")
    stray = tmp_path / "stray.csv"
    stray.write_text('item,code\n"item-01,Q\n' + "item-02,Q\n" * 20_000, encoding="utf-8")
    with pytest.raises(sheet.SheetError, match=r"stray\.csv cannot be read: .* nothing closes"):
        sheet.read_csv(stray, stray, work, "anna")
    error = sheet.SheetError("anna", [f"fault {i}" for i in range(60)])
    assert "and 10 more" in str(error)
    assert pickle.loads(pickle.dumps(error)).faults == error.faults


def test_packet_is_blind_and_reproducible():
    turns = [
        Turn("client", "你是谁？"),
        Turn("counselor", "作为AI，我是ChatGLM。\x07我们谈谈睡眠吧。"),
    ]
    candidates = [Candidate(f"d{i}", f"group{i % 3}", turns) for i in range(12)]
    first, again = make_packet(candidates, 7), make_packet(candidates[::-1], 7)
    assert first == again
    assert first != make_packet(candidates, 8)
    order = [first.key[item.item_id][0] for item in first.items]
    assert sorted(order) != order
    shown = str(first.items)
    assert not any(term in shown for term in ("ChatGLM", "作为AI", "group", "d1", "\x07"))
    assert MASK in shown
    assert set(first.masked.values()) == {2}
    with pytest.raises(UserError, match=r"d0 is there twice.*mute has no counselor turn"):
        make_packet([*candidates, candidates[0], Candidate("mute", "g", turns[:1])], 7)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("我是GLM4。您好！", "我是〔…〕。您好！"),
        ("我是ChatGLM-4-9B-Chat，很高兴。", "我是〔…〕，很高兴。"),
        ("我叫Llama3，Llama 3.1-8B-Instruct也行。", "我叫〔…〕，〔…〕也行。"),
        ("Baichuan2-7B-Chat、百川2和百川大模型。", "〔…〕、〔…〕和〔…〕。"),
        ("我是Qwen2.5-7B-Instruct。", "我是〔…〕。"),
        ("好的。我是智谱AI的。", "好的。我是〔…〕的。"),
        ("作为一个AI。人工智能助手。好。", "〔…〕。〔…〕。好。"),
    ],
)
def test_a_model_s_name_is_hidden_with_its_version_and_no_sentence_is_cut(said, shown):
    turns = [Turn("client", "您好"), Turn("counselor", said)]
    (item,) = make_packet([Candidate("d", "g", turns)], 0).items
    assert "".join(item.volleys[1].utterances) == shown
    assert len(item.volleys[1].utterances) == len(split_utterances(said))


def test_volleys_join_a_speakers_neighbouring_turns():
    turns = [
        Turn("client", "一。"),
        Turn("client", "二。"),
        Turn("counselor", " "),
        Turn("counselor", "三？"),
    ]
    found = volleys(turns)
    assert [(v.number, v.role, v.utterances) for v in found] == [
        (1, "client", ("一。", "二。")),
        (2, "counselor", ("三？",)),
    ]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("你说“再也不了。”那是什么感觉？", ["你说“再也不了。”", "那是什么感觉？"]),
        ("嗯……我明白\n那么呢", ["嗯……", "我明白", "那么呢"]),
        ("真的吗？！", ["真的吗？！"]),
        ("……好。", ["……", "好。"]),
        ("Hi, Mrs. Smith. I am Dr. Lee.", ["Hi, Mrs. Smith.", "I am Dr. Lee."]),
    ],
)
def test_utterances_are_sentences(text, parts):
    assert split_utterances(text) == parts


@given(st.text(st.sampled_from("我你好。！？…”\n 、，a1")))
def test_no_character_is_lost_by_splitting(text):
    assert "".join("".join(split_utterances(text)).split()) == "".join(text.split())


def test_a_sheet_that_lost_its_chinese_is_one_fault_not_one_a_row(tmp_path):
    turns = [Turn(("client", "counselor")[n % 2], f"第{n}句话。") for n in range(24)]
    work = make_packet([Candidate("d", "llama3", turns)], seed=1)
    path, scores = sheet.write_csv(work.items, tmp_path, "anna")
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))
    for row in rows[1:]:
        row[4] = "".join(c if c.isascii() else "?" for c in row[4])
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(sheet.SheetError) as caught:
        sheet.read_csv(path, scores, work, "anna")
    (of_texts,) = [f for f in caught.value.faults if "text" in f]
    assert of_texts.startswith("utterances, rows 2 to 25: 24 of 24 texts are not the packet's")


def test_codes_of_a_chinese_keyboard_are_known(tmp_path):
    work, utterances, scores = finished(tmp_path)
    for row in utterances[1:]:
        row[5] = {"Q": "Ｑ", "sr": "ｓｒ"}.get(row[5], row[5])
    wide = read_back(tmp_path, work, utterances, scores)
    assert wide == read_back(tmp_path, *finished(tmp_path))
