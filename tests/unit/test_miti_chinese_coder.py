"""The trained Chinese coder: its published figures, no leakage, and the rules of the volley."""

import pytest

from milm_ray.miti import chinese_coder
from milm_ray.miti.coding_scheme import volley_faults
from milm_ray.miti.packet import Candidate, make_packet
from milm_ray.schema import Turn


def test_its_figures_are_those_of_its_validation():
    found = chinese_coder.validate()
    stated = chinese_coder.VALIDATED
    assert (found.utterances, found.dialogues) == (stated["utterances"], stated["dialogues"])
    assert found.macro_f1 == pytest.approx(stated["macro_f1"], abs=0.01)
    assert found.kappa.value == pytest.approx(stated["kappa"], abs=0.01)
    assert found.f1 == pytest.approx(stated["f1"], abs=0.01)
    totals = (found.counts, found.guessed, found.expected)
    assert stated["totals"].keys() == found.f1.keys()
    for code, figures in stated["totals"].items():
        assert [each[code] for each in totals] == pytest.approx(figures, abs=1.5)


def test_a_dialogue_and_its_rewrite_are_one_dialogue_in_validation():
    _, _, dialogues = chinese_coder.examples()
    assert not any(name.endswith("-mi") for name in dialogues)
    assert "CPsyCounD-case_0" in dialogues


def test_codes_keep_the_rules_and_only_counselors_are_coded():
    speech = "您愿意说说吗？最难的是哪一段？您累了。您又累又舍不得，两头都是真的。必须马上戒掉。"
    turns = [Turn("client", "您愿意听吗？"), Turn("counselor", speech)] * 2
    (item,) = make_packet([Candidate("a", "g", turns)], 0).items
    codes = chinese_coder.code_item(item)
    assert {volley for volley, _ in codes} == {2, 4}
    for volley in (2, 4):
        given = [code for place, code in codes.items() if place[0] == volley]
        assert volley_faults(given) == []
        assert given.count("question") == 1
    assert set(codes.values()) <= set(chinese_coder.SCOPE)
