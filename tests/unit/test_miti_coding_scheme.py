import pytest

from milm_ray.miti import coding_scheme as scheme


def test_names_and_short_forms_are_read_in_any_case_and_are_unambiguous():
    assert scheme.code_name(" cr ") == "complex_reflection"
    assert scheme.code_name("Persuade with permission") == "persuade_with_permission"
    assert scheme.code_name("Q") == "question"
    assert scheme.code_name("open question") is None
    tokens = [t for c in scheme.CODES for t in {c.name, c.short.lower()}]
    assert len(tokens) == len(set(tokens))


def test_a_lawful_volley_has_no_fault():
    assert scheme.volley_faults(["complex_reflection", "affirm", "question"]) == []
    assert scheme.volley_faults([]) == []


def test_each_parsing_rule_is_named_when_broken():
    faults = scheme.volley_faults(
        ["question", "question", "simple_reflection", "complex_reflection", "praise"]
    )
    assert any("'praise'" in f for f in faults)
    assert any("question is coded 2 times" in f for f in faults)
    assert any("keep the complex one" in f for f in faults)
    nine = [c for c in scheme.CODE_NAMES if c != "simple_reflection"]
    assert any("at most 8" in f for f in scheme.volley_faults(nine))


def test_rules_are_applied_to_labels_that_ignore_them():
    labels = ["question", "simple_reflection", "question", "complex_reflection"]
    assert scheme.apply_volley_rules(labels) == ["question", "complex_reflection"]
    assert scheme.apply_volley_rules(["simple_reflection"] * 3) == ["simple_reflection"]
    assert len(scheme.apply_volley_rules(scheme.CODE_NAMES)) == 8
    assert scheme.volley_faults(scheme.apply_volley_rules(scheme.CODE_NAMES)) == []
    with pytest.raises(ValueError, match="'praise'"):
        scheme.apply_volley_rules(["praise"])


def test_the_scheme_is_whole():
    assert len(scheme.CODES) == 10
    assert all(len(g.anchors) == 5 and all(g.anchors) for g in scheme.GLOBALS)
    assert set(scheme.MI_ADHERENT + scheme.MI_NON_ADHERENT) < set(scheme.CODE_NAMES)
