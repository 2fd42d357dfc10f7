"""The study from sessions to tables: blind packet, sheets, automatic coders, agreement."""

import csv
import json

import pyarrow as pa
import pytest
from llm_server import right_answer
from miti_sample import config_of, filled, with_sessions

from milm_ray.errors import UserError
from milm_ray.llm.ask import Asking
from milm_ray.llm.exchange import Unusable
from milm_ray.llm.replies import Reply, request_key
from milm_ray.llm.reply_store import ReplyStore
from milm_ray.miti import codings, study, study_packet
from milm_ray.miti.coding_store import CodingStore
from milm_ray.miti.llm_coder import Coder
from milm_ray.miti.paper_study import Cell, read_cells, reproduce
from milm_ray.miti.sheet import SheetError, read_csv
from milm_ray.miti.study_tables import paper_group
from milm_ray.schema import SESSIONS
from milm_ray.workspace import Workspace


@pytest.fixture
def sample(tmp_path):
    config = config_of(tmp_path)
    ws, _ = with_sessions(config)
    study_packet.run(config, ws)
    return config, ws


def tables_of(ws):
    return {t["name"]: t for t in json.loads(ws.read_text("study", "study.json"))["tables"]}


def test_the_packet_is_blind_and_its_key_lies_apart(sample):
    config, ws = sample
    shown = ws.read_text("packet", "packet.json")
    manifest = ws.read_text("packet", "manifest.json")
    for telling in ("glm4", "llama3", "MI-LLM"):
        assert telling not in shown
        assert telling not in manifest
    key = study_packet.load_key(ws)
    assert {entry["group"] for entry in key.values()} == {
        "MI-LLM glm4, simulated clients",
        "MI-LLM llama3, simulated clients",
    }
    assert sorted(p.name for p in ws.local("packet", "sheets").iterdir()) == [
        *("anna-globals.csv", "anna-utterances.csv", "anna.xlsx"),
        *("ben-globals.csv", "ben-utterances.csv", "ben.xlsx"),
    ]
    assert study_packet.run(config, ws) == ws.manifest("packet")


def test_texts_of_the_safety_check_are_not_coded(tmp_path):
    config = config_of(tmp_path)
    ws, _ = with_sessions(config)
    table = ws.read_table("sessions/simulated").to_pylist()
    table[0]["preset_turns"] = [1]
    preset = table[0]["turns"][1]["content"]
    candidates, _ = study_packet.candidates(config, ws)
    before = next(c for c in candidates if c.dialogue_id == table[0]["session_id"])
    ws.write_table(pa.Table.from_pylist(table, SESSIONS), "sessions/simulated")
    candidates, _ = study_packet.candidates(config, ws)
    after = next(c for c in candidates if c.dialogue_id == table[0]["session_id"])
    assert len(after.turns) == len(before.turns) - 1
    assert before.turns[1].content == preset
    assert after.turns[1].content != preset


def test_sessions_of_people_are_a_group_of_their_own_and_open_ones_are_left_out(tmp_path):
    config = config_of(tmp_path)
    ws, manifest = with_sessions(config)
    rows = ws.read_table("sessions/simulated").to_pylist()
    held = [row | {"source": "human", "session_id": f"s{n}"} for n, row in enumerate(rows)]
    held[0]["ended_at"] = None
    ws.write_table(pa.Table.from_pylist(held, SESSIONS), "sessions/human")
    ws.commit(
        "sessions/human",
        stage="sessions",
        settings={},
        fingerprint={},
        counts={"sessions": len(held)},
        started=0.0,
    )
    study_packet.run(config, ws)
    groups = ws.manifest("packet_key")["counts"]["by_group"]
    assert groups == {
        "MI-LLM glm4": 2,
        "MI-LLM glm4, simulated clients": 3,
        "MI-LLM llama3": 3,
        "MI-LLM llama3, simulated clients": 3,
    }
    assert manifest["counts"]["sessions"] == 6


def test_a_models_adapters_are_groups_of_their_own(tmp_path):
    config = config_of(tmp_path)
    ws, _ = with_sessions(config)
    row = ws.read_table("sessions/simulated").to_pylist()[0] | {"model": "glm4"}
    chat = row | {"source": "human", "details": '{"adapter": "mi"}'}
    assert [
        study_packet.group_of(r)
        for r in (
            row | {"variant": "base"},
            row | {"variant": "dpo"},
            chat,
            chat | {"details": '{"adapter": "dpo"}'},
        )
    ] == [
        "glm4, simulated clients",
        "MI-LLM glm4 (dpo), simulated clients",
        "MI-LLM glm4",
        "MI-LLM glm4 (dpo)",
    ]
    assert paper_group("MI-LLM glm4, simulated clients") == "glm4"
    assert paper_group("MI-LLM glm4 (dpo)") not in ("glm4", "real")  # the paper has no such arm


def test_automatic_codes_are_marked_and_say_what_they_do_not_cover(sample):
    config, ws = sample
    manifest = codings.run(config, ws)
    assert manifest["counts"]["by_coder"] == {"trained-zh (automatic)": 6}
    study.run(config, ws)
    tables = tables_of(ws)
    table6 = tables["table6_trained_zh"]
    assert table6["automatic"]
    assert "AUTOMATIC" in table6["caption"]
    labels = [row[1] for row in table6["rows"]]
    assert "Persuade with permission" not in labels  # outside this coder's scope, not zero
    assert "Empathy" not in labels  # it gives no global scores
    assert "agreement" not in tables
    cells = dict(zip(labels, table6["rows"], strict=True))
    glm4, llama3 = cells["Persuade"][2:4]
    assert glm4[0] < 0.5 < llama3[0]
    assert any("expected ones" in text for text in table6["foot"])
    table = next(csv.DictReader(ws.read_text("study", "table6_trained_zh.csv").splitlines()))
    assert table["MI-LLM glm4, simulated clients n"] == "3"
    rates = tables["rates_trained_zh"]
    assert rates["columns"][1]["parts"] == ["q1", "q3", "n"]
    assert [cell[-1] for row in rates["rows"] for cell in row[1:]] == [3] * 2 * len(rates["rows"])
    assert csv.DictReader(ws.read_text("study", "table6_long.csv").splitlines())


def test_two_coders_sheets_become_tables_and_agreement(sample):
    config, ws = sample
    filled(ws, "anna", 4)
    assert codings.run(config, ws)["still_to_code"] == {"ben": 6}
    filled(ws, "ben", 2)
    assert codings.run(config, ws)["still_to_code"] == {}
    study.run(config, ws)
    tables = tables_of(ws)
    people = {row[1]: row for row in tables["table6_people"]["rows"]}
    assert people["Empathy"][2] == [
        3,
        3,
        3,
        3,
    ]  # mean of 4 and 2, quartiles, n
    assert people["Question"][2][0] == 4
    agreement = {(row[0], row[1]): row for row in tables["agreement"]["rows"]}
    assert agreement["Codes of utterances", "Cohen's kappa"][2] == pytest.approx([1, 1, 1])
    assert agreement["Empathy", "ICC(2,1), one coder"][2][0] == pytest.approx(0)
    assert "trained-zh against anna" in [r[0] for r in tables["agreement_automatic"]["rows"]]
    assert "table6_trained_zh" in tables


def test_an_adjudicated_coding_stands_in_for_the_coders_in_tables_not_in_agreement(sample):
    config, ws = sample
    filled(ws, "anna", 4)
    filled(ws, "ben", 2)
    packet = study_packet.load_packet(ws)
    folder = ws.local("sheets")
    for table in ("utterances", "globals"):
        text = (folder / f"anna-{table}.csv").read_text(encoding="utf-8-sig")
        (folder / f"adjudicated-{table}.csv").write_text(text, encoding="utf-8-sig")
    codings.run(config, ws)
    study.run(config, ws)
    tables = tables_of(ws)
    people = {row[1]: row for row in tables["table6_people"]["rows"]}
    assert people["Empathy"][2] == [4, 4, 4, 3]
    assert "2 coders" in tables["agreement"]["caption"]
    adjudicated = read_csv(
        folder / "adjudicated-utterances.csv", folder / "adjudicated-globals.csv", packet, "x"
    )
    assert len(adjudicated) == 6


def test_faults_of_all_sheets_are_named_and_nothing_is_imported(sample):
    config, ws = sample
    codings.run(config, ws)
    before = ws.manifest("codings")
    folder = filled(ws, "anna", 9)
    filled(ws, "ben", code=lambda role, n: "XX" if role == "counselor" and n == 1 else "")
    (folder / "zoe.xlsx").write_bytes(b"PK")
    with pytest.raises(SheetError) as caught:
        codings.run(config, ws)
    text = "\n".join(caught.value.faults)
    assert "anna: globals, row 2: cultivating_change_talk is 9" in text
    assert "ben: utterances, row" in text
    assert "zoe.xlsx: 'zoe' is not among miti.coders" in text
    assert ws.manifest("codings") == before
    (folder / "zoe.xlsx").unlink()
    (folder / "ben-globals.csv").unlink()
    with pytest.raises(SheetError, match=r"give ben\.xlsx, or ben-utterances\.csv with"):
        codings.run(config, ws)


def test_a_sheet_of_another_kind_is_not_passed_over_in_silence(sample):
    config, ws = sample
    folder = filled(ws, "anna")
    (folder / "~$anna.xlsx").write_bytes(b"left by a spreadsheet that has the workbook open")
    (folder / "ben.xls").write_bytes(b"\xd0\xcf\x11\xe0")
    with pytest.raises(SheetError, match=r"ben\.xls: neither \.xlsx nor \.csv"):
        codings.run(config, ws)
    (folder / "ben.xls").unlink()
    assert codings.run(config, ws)["still_to_code"] == {"ben": 6}


def test_a_packet_that_people_have_begun_to_code_is_not_replaced(sample):
    config, ws = sample
    before = ws.read_text("packet", "packet.json")
    store = CodingStore.of(ws, study_packet.load_items(ws))
    other = config_of(ws.local().parent, "seed=8")
    study_packet.run(other, ws)  # nobody has coded yet
    assert ws.read_text("packet", "packet.json") != before
    study_packet.run(config, ws)

    store.set_score("anna", "item-01", "empathy", 3)
    with pytest.raises(UserError, match="which people have begun to code"):
        study_packet.run(other, ws)
    assert ws.read_text("packet", "packet.json") == before
    more = config_of(ws.local().parent, "miti.coders=[anna,ben,carl]")
    study_packet.run(more, ws)  # the same dialogues for one more coder
    assert CodingStore.of(ws, study_packet.load_items(ws)).coders() == ["anna"]
    ws.clear("coding")
    filled(ws, "ben")
    with pytest.raises(UserError, match="which people have begun to code"):
        study_packet.run(other, ws)


def test_an_llm_coder_is_parsed_strictly(sample):
    _, ws = sample
    items = {item.item_id: item for item in study_packet.load_items(ws)}
    coder = Coder(items, "llm m")
    row = {"item": "item-01"}
    answer = json.loads(right_answer(coder.request(row).messages))
    coded = coder.parse(row, json.dumps(answer))
    assert set(coded.codes.values()) == {"simple_reflection"}
    assert len(coded.codes) == items["item-01"].rounds

    def refused(change):
        broken = json.loads(json.dumps(answer))
        change(broken)
        with pytest.raises(Unusable) as caught:
            coder.parse(row, json.dumps(broken))
        return caught.value.reason

    code = {"volley": 2, "utterance": 2, "code": "SR"}
    assert refused(lambda a: a["codes"].append(code)) == "rules_broken"
    assert refused(lambda a: a["codes"].append(a["codes"][0])) == "two_codes"
    assert refused(lambda a: a["codes"][0].update(volley=1)) == "client_coded"
    assert refused(lambda a: a["codes"][0].update(code="REFLECT")) == "off_schema"
    assert refused(lambda a: a["codes"][0].update(utterance=99)) == "off_schema"
    assert refused(lambda a: a["global_scores"].update(empathy=6)) == "off_schema"
    assert refused(lambda a: a["global_scores"].pop("empathy")) == "off_schema"
    assert refused(lambda a: a.update(target_behavior=" ")) == "off_schema"


def test_an_llms_codings_come_from_the_store_and_an_unusable_one_is_uncoded(tmp_path):
    config = config_of(tmp_path, "miti.automatic=[llm]", "coder.offline=true", "coder.model=m")
    ws, _ = with_sessions(config)
    study_packet.run(config, ws)
    coder = Coder({item.item_id: item for item in study_packet.load_items(ws)}, "llm m")
    replies = []
    for number in range(1, 7):
        request = coder.request({"item": f"item-{number:02d}"})
        text = "好的，编码如下：" if number == 3 else right_answer(request.messages)
        replies.append(Reply(request_key(config.coder, request), text, subject=request.subject))
    ReplyStore(ws).put(replies)
    manifest = codings.run(config, ws)
    assert manifest["counts"]["by_coder"] == {"llm m (automatic)": 6}
    assert manifest["counts"]["uncoded_by_reason"] == {"not_json": 1}
    study.run(config, ws)
    tables = tables_of(ws)
    assert tables["table6_llm_m"]["automatic"]
    empathy = next(row for row in tables["table6_llm_m"]["rows"] if row[1] == "Empathy")
    assert sorted(cell[-1] for cell in empathy[2:4]) == [2, 3]  # the uncoded one is out
    shown = json.loads(ws.read_text("study", "study.json"))["uncoded"]
    assert [(row["item_id"], row["coder"]) for row in shown] == [("item-03", "llm m")]


def test_a_dialogue_that_the_llm_did_not_get_to_code_holds_up_nothing(tmp_path, monkeypatch):
    config = config_of(tmp_path, "miti.automatic=[llm]", "coder.model=m")
    ws, _ = with_sessions(config)
    study_packet.run(config, ws)

    def unreached(asking, rows, missing):
        return {call.number: ("no_reply", "HTTP 500") for call in missing}

    monkeypatch.setattr(Asking, "_send", unreached)
    manifest = codings.run(config, ws)
    assert manifest["counts"]["uncoded_by_reason"] == {"no_reply": 6}
    offline = config.model_copy(update={"coder": config.coder.model_copy(update={"offline": True})})
    assert codings.run(offline, ws) == manifest


CELLS = """table,group,variable,mean,q1,q3,n
6,glm4,affirm,3,2,4,10
6,glm4,seek,1,,,10
6,glm4,emphasize_autonomy,2,,,10
6,glm4,persuade,1,,,10
6,glm4,confront,1,,,10
6,glm4,total_mia,6.02,,,10
6,glm4,total_mina,2.5,,,10
6,glm4,mia_ratio,0.9,,,10
6,glm4,technical_global,3.5,,,10
"""


WRONG = """6,glm4,praise,1,,,
6,glm4,gi,many,,,
7,glm4,gi,1,,,
6,GLM-4,gi,1,,,
"""


def test_the_papers_means_through_our_summary_code(tmp_path):
    """Sums come out again, a mean of ratios cannot (6/8 is .75), and parts may be missing."""
    path = tmp_path / "cells.csv"
    path.write_text(CELLS, encoding="utf-8")
    cells = read_cells(str(path))
    assert cells[0] == Cell("6", "glm4", "affirm", 3.0, 2.0, 4.0, 10)
    found = {check.measure: check for check in reproduce(cells)}
    assert found["total_mia"].verdict == "reproduced"
    assert "differs" in found["total_mina"].verdict
    assert found["mia_ratio"].recomputed == 0.75
    assert "mean of ratios" in found["mia_ratio"].verdict
    assert "not given" in found["technical_global"].verdict
    path.write_text(CELLS + WRONG, encoding="utf-8")
    with pytest.raises(UserError, match=r"row 11: unknown variable 'praise'; row 12") as caught:
        read_cells(str(path))
    assert "row 13: table '7' is none of 4, 6" in str(caught.value)
    assert "row 14: group 'GLM-4' is none of baichuan2, glm4, llama3, real" in str(caught.value)
    # One part short: nothing is summed, and nothing is said to differ.
    path.write_text(CELLS.replace("6,glm4,emphasize_autonomy,2,,,10\n", ""), encoding="utf-8")
    (total,) = (c for c in reproduce(read_cells(str(path))) if c.measure == "total_mia")
    assert (total.recomputed, total.verdict) == (None, "its parts are not given")
    path.write_text("表,组\n", encoding="gb18030")
    with pytest.raises(UserError, match="save it as UTF-8"):
        read_cells(str(path))


def test_the_papers_cells_stand_beside_ours(sample, tmp_path):
    path = tmp_path / "cells.csv"
    path.write_text(CELLS + "4,glm4,rounds,17.4,,,10\n", encoding="utf-8")
    _, ws = sample
    config = config_of(tmp_path, f"miti.paper_cells={path}")
    codings.run(config, ws)
    study.run(config, ws)
    tables = tables_of(ws)
    table6 = tables["table6_trained_zh"]
    column = [c["label"] for c in table6["columns"]].index("Paper, glm4")
    affirm = next(row for row in table6["rows"] if row[1] == "Affirm")
    assert affirm[column] == [3, 2, 4, 10]
    assert [row[-1] for row in tables["table4"]["rows"]] == ["17.4 / – / –", None]
    assert "paper_reproduced" in tables


def test_nothing_to_code_is_said(tmp_path):
    config = config_of(tmp_path)
    with pytest.raises(UserError, match="there is no dialogue to code"):
        study_packet.run(config, Workspace.open(config.workspace))
