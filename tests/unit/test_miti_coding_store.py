"""The coding page's store: the rules at every change, several coders, nothing of another packet."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from milm_ray.errors import UserError
from milm_ray.miti.coding_scheme import CODES, GLOBAL_NAMES
from milm_ray.miti.coding_store import CodingStore, Refused
from milm_ray.miti.packet import Candidate, make_packet
from milm_ray.schema import Turn

SPEECH = "您累了。您想改。您试过。您行的。由您定。可以吗？这是事实。您必须改。您错了。"


def packet(text=SPEECH):
    turns = [Turn("client", "我睡不好。"), Turn("counselor", text)]
    return make_packet([Candidate("a", "g", turns), Candidate("b", "g", turns)], 0)


@pytest.fixture
def store(tmp_path):
    return CodingStore(tmp_path / "coding.sqlite", packet().items)


def coded(store, *codes, coder="anna"):
    for number, code in enumerate(codes, 1):
        state = store.set_code(coder, "item-01", 2, number, code)
    return state["codes"]


def test_the_rules_of_the_volley_hold_at_every_change(store):
    assert coded(store, "SR", "Q") == {"2.1": "simple_reflection", "2.2": "question"}
    with pytest.raises(Refused, match="once per volley"):
        store.set_code("anna", "item-01", 2, 3, "Q")
    # A complex reflection takes the simple one's place; a simple one beside it is refused.
    after = store.set_code("anna", "item-01", 2, 3, "CR")["codes"]
    assert after == {"2.2": "question", "2.3": "complex_reflection"}
    with pytest.raises(Refused, match="keep the complex one"):
        store.set_code("anna", "item-01", 2, 1, "SR")
    assert store.set_code("anna", "item-01", 2, 2, None)["codes"] == {"2.3": "complex_reflection"}


def test_a_volley_takes_eight_codes(store):
    eight = [code.short for code in CODES if code.short != "SR"][:8]
    assert len(coded(store, *eight)) == 8
    with pytest.raises(Refused, match="at most 8"):
        store.set_code("anna", "item-01", 2, 9, "CON")


@pytest.mark.parametrize(
    ("place", "code", "named"),
    [
        (("item-01", 1, 1), "Q", "only the counselor's"),
        (("item-01", 2, 10), "Q", "no utterance 2.10"),
        (("item-01", 9, 1), "Q", "no utterance 9.1"),
        (("item-09", 2, 1), "Q", "not in the packet"),
        (("item-01", 2, 1), "praise", "unknown code"),
    ],
)
def test_what_is_not_to_be_coded_is_refused(store, place, code, named):
    with pytest.raises(Refused, match=named):
        store.set_code("anna", *place, code)


def test_an_item_is_finished_when_nothing_is_missing_and_then_closed(store):
    with pytest.raises(Refused, match="missing: target_behavior, cultivating_change_talk"):
        store.finish("anna", "item-01")
    store.set_text("anna", "item-01", "target_behavior", "早睡")
    for name in GLOBAL_NAMES:
        store.set_score("anna", "item-01", name, 3)
    with pytest.raises(Refused, match="missing: codes"):
        store.finish("anna", "item-01")
    store.set_text("anna", "item-01", "comment", "no codes")
    assert store.finish("anna", "item-01")["finished"]
    for change in (
        lambda: store.set_code("anna", "item-01", 2, 1, "Q"),
        lambda: store.set_score("anna", "item-01", "empathy", 4),
        lambda: store.set_text("anna", "item-01", "comment", ""),
    ):
        with pytest.raises(Refused, match="finished"):
            change()
    (done,) = store.finished("anna")
    assert (done.target_behavior, done.global_scores["empathy"], done.codes) == ("早睡", 3, {})
    assert not store.finish("anna", "item-01", done=False)["finished"]


@pytest.mark.parametrize("score", [0, 6, "3", 3.0, True])
def test_a_score_is_a_whole_number_from_one_to_five(store, score):
    with pytest.raises(Refused, match="from 1 to 5"):
        store.set_score("anna", "item-01", "empathy", score)


def test_coders_at_the_same_time_lose_nothing(store, tmp_path):
    coders = [f"c{n}" for n in range(6)]

    def work(coder):
        mine = CodingStore(tmp_path / "coding.sqlite", packet().items)
        return coded(mine, "Q", "AF", "SEEK", coder=coder)

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(work, coders))
    assert found == [{"2.1": "question", "2.2": "affirm", "2.3": "seek"}] * 6
    assert store.coders() == coders


def test_codes_of_another_packet_are_not_taken_for_this_ones(store, tmp_path):
    coded(store, "Q")
    with pytest.raises(UserError, match="codes of another packet"):
        CodingStore(tmp_path / "coding.sqlite", packet("别的话。").items)
