"""The memory estimate, against known sizes, and the error before the start."""

from __future__ import annotations

import pytest
import torch

from milm_ray.config import FinetuneSection, LoraSection
from milm_ray.errors import UserError
from milm_ray.finetune import memory
from milm_ray.finetune.engine import with_lora
from milm_ray.finetune.memory import GIB, check, check_weights, estimate, settle
from milm_ray.finetune.packing import collate
from milm_ray.finetune.samples import Sample
from milm_ray.finetune.step import PackedLoss, pack_loss

LLAMA3_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}

TINY = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = 256


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


def kept_bytes(layers, precision, dropout):
    """What a tiny Llama keeps for its backward pass, weights not counted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = FinetuneSection(
        precision=precision,
        gradient_checkpointing=False,
        lora=LoraSection(rank=1, dropout=dropout),
    )
    config = LlamaConfig(**TINY, num_hidden_layers=layers)
    model = with_lora(LlamaForCausalLM(config), settings, TARGETS, seed=0)
    if precision == "bf16":
        model = model.bfloat16()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that its address is not taken again
        return tensor

    pack = collate([Sample("a", [1] * TOKENS, [2] * TOKENS)])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pack_loss(PackedLoss(model), pack, "cpu")
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_adapter_with_dropout_keeps_its_inputs_dropped(precision, plain_llama):
    def estimated(dropout):
        settings = FinetuneSection(
            precision=precision, gradient_checkpointing=False, lora=LoraSection(dropout=dropout)
        )
        return estimate({**TINY, "num_hidden_layers": 1}, settings, 1, TOKENS, 0).activations

    def measured(dropout):  # a layer in the middle: the first needs no gradient by its input
        return kept_bytes(3, precision, dropout) - kept_bytes(2, precision, dropout)

    # The attention on a CPU does not keep its output, which elsewhere stays for its own sake.
    of_attention = TOKENS * TINY["hidden_size"] * (4 if precision == "fp32" else 2)
    more = measured(0.05) - measured(0.0)
    assert estimated(0.05) - estimated(0.0) - of_attention == pytest.approx(more, rel=0.02)


def test_dropout_on_a_gpu_is_thought_of_before_it_runs_out_of_memory():
    glm4 = {
        "hidden_size": 4096,
        "num_hidden_layers": 40,
        "intermediate_size": 13696,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "vocab_size": 151552,
    }

    def need(dropout):
        settings = FinetuneSection(gradient_checkpointing=False, lora=LoraSection(dropout=dropout))
        return estimate(glm4, settings, 1, 8192, 1024, fused=True).total / GIB

    # With one map for gate and up it is 15.4: by layer 8.3 inputs of 4,096 wide in three bytes
    # each, less 6.3 in two.
    assert need(0.0) < 72
    assert need(0.0) + 15.4 < need(0.05) < need(0.0) + 15.4 + 7


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
