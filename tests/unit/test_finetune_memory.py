"""The memory estimate, against known sizes, and the error before the start."""

from __future__ import annotations

import pytest

from milm_ray.config import FinetuneSection
from milm_ray.errors import UserError
from milm_ray.finetune import memory
from milm_ray.finetune.memory import GIB, check, check_weights, estimate, settle

LLAMA3_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def test_weights_of_llama_3_8b():
    # 8,030,261,248 parameters, of which the norms (266,240) are not counted.
    need = estimate(LLAMA3_8B, FinetuneSection(), 1, 8192, 1024)
    assert need.weights / 2 == pytest.approx(8_030_261_248, rel=1e-3)
    # 20,971,520 LoRA parameters at rank 8 on all linear layers.
    assert need.adapter == pytest.approx(20_971_520 * 18, rel=1e-3)


def test_what_lowers_the_need():
    def total(workers=1, tokens=8192, **settings):
        return estimate(LLAMA3_8B, FinetuneSection(**settings), workers, tokens, 1024).total

    assert total() < 30 * GIB
    assert total(gradient_checkpointing=False) > 60 * GIB
    assert total(tokens=2048) < total()
    assert total(workers=8, zero_stage=3) < total() - 11 * GIB
    assert total(precision="fp32") > 1.9 * total()


def test_layers_are_computed_twice_only_where_memory_would_not_do_otherwise(monkeypatch):
    def chosen(free, **settings):
        monkeypatch.setattr(memory, "_free", lambda device: free * GIB)
        section = FinetuneSection(**settings)
        settled, need = settle("llama3", LLAMA3_8B, section, 1, 8192, 1024, "cpu")
        assert need.total < free * GIB
        return settled.gradient_checkpointing

    assert chosen(80) is False
    assert chosen(40) is True
    # What the configuration says stands.
    assert chosen(80, gradient_checkpointing=True) is True
    with pytest.raises(UserError, match=r"40\.0 GiB are free"):
        chosen(40, gradient_checkpointing=False)


def test_the_fused_layers_of_a_gpu_keep_less():
    plain = FinetuneSection(gradient_checkpointing=False)
    # Measured on an H200: 52.4 GiB at 8,057 tokens a step, whose head works on two thirds of them.
    fused = estimate(LLAMA3_8B, plain, 1, 8057, 1024, fused=True).total / GIB
    assert 52.4 < fused < 1.1 * 52.4
    assert fused < estimate(LLAMA3_8B, plain, 1, 8057, 1024).total / GIB - 8


def test_too_little_memory_is_said_before_the_start():
    need = estimate({**LLAMA3_8B, "num_hidden_layers": 10**5}, FinetuneSection(), 1, 8192, 1024)
    with pytest.raises(
        UserError, match=r"llama3 needs about .* GiB per worker .* are free"
    ) as told:
        check("llama3", need, "cpu")
    assert "finetune.pack_tokens" in told.value.fix


def test_weights_that_will_not_fit_are_refused_by_their_shapes_alone():
    settings = FinetuneSection()
    check_weights("llama3", {**LLAMA3_8B, "num_hidden_layers": 1}, settings, 1, "cpu")
    huge = {**LLAMA3_8B, "num_hidden_layers": 10**5}
    with pytest.raises(UserError, match=r"llama3 needs .*weights [\d.]+, .*activations 0\.0"):
        check_weights("llama3", huge, settings, 1, "cpu")
