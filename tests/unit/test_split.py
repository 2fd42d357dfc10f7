"""The split: exact size, seeded, no leakage; rounds; exports; Table 3's counting rule."""

import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milm_ray.dataset import export
from milm_ray.dataset.rounds import inline_input, rounds
from milm_ray.dataset.split import json_list, split
from milm_ray.dataset.statistics import table_row
from milm_ray.dataset.table_rows import TableRows, in_columns
from milm_ray.errors import UserError
from milm_ray.models.messages import INSTRUCTION, dialogue_messages, round_messages
from milm_ray.schema import TURN, Turn, turns_of


def dialogue(source: int, text: str = "", exchanges: int = 3) -> dict[str, object]:
    turns = []
    for number in range(exchanges):
        turns.append({"role": "client", "content": f"{text or source}问{number}"})
        turns.append({"role": "counselor", "content": f"{text or source}答{number}"})
    return {
        "dialogue_id": f"d{source}{text}",
        "source_dialogue_id": f"s{source}",
        "topic": "",
        "turns": turns,
    }


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from(["", "同", "样"])), min_size=2),
    st.integers(1, 8),
    st.integers(0, 3),
)
def test_no_source_and_no_text_is_on_both_sides(
    marks: list[tuple[int, str]], size: int, seed: int
) -> None:
    rows = [dialogue(source, text) for source, text in marks]
    try:
        places = split(rows, size, seed)
    except UserError:
        return
    train, test = ([rows[place] for place in part] for part in places)
    assert len(test) == size
    assert len(train) + len(test) == len(rows)
    for side_of in (lambda row: row["source_dialogue_id"], lambda row: str(row["turns"])):
        assert not {side_of(row) for row in train} & {side_of(row) for row in test}
    assert split(rows, size, seed) == places


def test_the_seed_decides_and_the_order_of_the_rows_does_not() -> None:
    rows = [dialogue(source) for source in range(40)]

    def tested(rows: list[dict[str, object]], seed: int) -> set[object]:
        return {rows[place]["dialogue_id"] for place in split(rows, 8, seed)[1]}

    assert tested(rows, 1) != tested(rows, 2)
    assert tested(rows, 1) == tested(rows[::-1], 1)


def test_too_few_dialogues_is_an_error_with_a_fix() -> None:
    with pytest.raises(UserError, match="cannot give 12") as caught:
        split([dialogue(1)] * 12, 12, seed=0)
    assert "split.test_dialogues" in caught.value.fix


def test_round_k_carries_the_rounds_before_it_and_its_messages_open_the_dialogue() -> None:
    row = dialogue(1, exchanges=4)
    whole = dialogue_messages(turns_of(row))
    found = rounds(row)
    assert [item["round_index"] for item in found] == [1, 2, 3, 4]
    for number, item in enumerate(found, 1):
        assert len(item["history"]) == number - 1
        assert round_messages(item) == whole[: 2 * number - 1]
        assert item["output"] == whole[2 * number - 1]["content"]


def test_the_inline_form_ends_with_what_the_client_just_said() -> None:
    last = rounds(dialogue(7, exchanges=2))[-1]
    assert inline_input(last) == "来访者：7问0\n心理咨询师：7答0\n来访者：7问1"


def as_llama_factory_reads_it(record: dict[str, object]) -> list[dict[str, str]]:
    """LLaMA-Factory's alpaca converter: history pairs, then instruction and input by newline."""
    messages = []
    for asked, answered in record["history"]:  # type: ignore[attr-defined]
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answered})
    parts = [part for part in (record["instruction"], record["input"]) if part]
    messages.append({"role": "user", "content": "\n".join(parts)})  # type: ignore[arg-type]
    return messages


def test_llama_factory_is_asked_what_our_models_are_asked() -> None:
    for row in rounds(dialogue(3, exchanges=4)):
        record = export.alpaca(row)
        assert as_llama_factory_reads_it(record) == round_messages(row)
        assert record["output"] == row["output"]


def test_exports_name_every_file_and_hold_every_round() -> None:
    train, test = [dialogue(1), dialogue(2)], [dialogue(3, exchanges=5)]
    files = export.files(train, test)
    assert {entry["file_name"] for entry in export.index().values()} == set(files)
    assert len(list(files["test_alpaca.json"])) == 5
    assert len(list(files["train_rounds_inline.json"])) == 6
    (shared,) = files["test_sharegpt.json"]
    assert [m["from"] for m in shared["conversations"]] == ["human", "gpt"] * 5
    assert shared["conversations"][0]["value"].startswith(INSTRUCTION + "\n")


@pytest.mark.parametrize("records", [[], [{}], [{"a": ["我\n们", {"b": []}]}, {"c": 1.5}]])
def test_a_list_written_piece_by_piece_is_what_json_writes(records: list[object]) -> None:
    whole = json.dumps(records, ensure_ascii=False, indent=1)
    assert b"".join(json_list(records)).decode() == whole


def test_rows_of_tables_are_those_of_their_lists() -> None:
    column = pa.array([[{"role": "client", "content": str(n)}] for n in range(700)], pa.list_(TURN))
    table = pa.table({"n": range(700), "turns": column})
    rows, plain = TableRows(table.slice(0, 300), table.slice(300)), table.to_pylist()
    assert list(rows) == plain
    assert rows[-1] == plain[-1]
    assert list(rows[5:600:90]) == plain[5:600:90]
    chosen = rows.take([650, 3, 3, 299, 300]).then(TableRows()).then(rows.take([0]))
    assert [row["n"] for row in chosen] == [650, 3, 3, 299, 300, 0]
    assert in_columns(chosen, table.schema).to_pylist() == list(chosen)
    assert len(in_columns([], table.schema)) == len(TableRows()) == 0
    with pytest.raises(IndexError):
        rows[700]


def test_table_3_counts_characters_without_punctuation_symbols_and_space() -> None:
    turns = [
        Turn("client", "我，很 累……（真的）！"),  # 我很累真的
        Turn("counselor", "Ok，3点😀"),  # Ok3点
        Turn("client", "嗯。"),
        Turn("counselor", "好的好的"),
    ]
    column = pa.array([[vars(turn) for turn in turns]], pa.list_(TURN))
    assert table_row("x", [column, column]) == {
        "set": "x",
        "dialogues": 2,
        "rounds": 4,
        "rounds_per_dialogue": 2.0,
        "client_characters": 3.0,
        "counselor_characters": 4.0,
    }


def test_table_3_of_nothing_is_empty_not_zero() -> None:
    assert table_row("x", [])["client_characters"] is None
