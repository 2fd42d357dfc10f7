"""A packed step is the plain step: same loss, same gradients, against transformers' own forward."""

from __future__ import annotations

import random

import pytest
import torch

from milm_ray.finetune import lora
from milm_ray.finetune.attention import BlockAttention, use_packed_attention
from milm_ray.finetune.elementwise import RmsNorm, Rotary
from milm_ray.finetune.fused import fuse_layers
from milm_ray.finetune.packing import bins, collate, idle
from milm_ray.finetune.samples import Sample
from milm_ray.finetune.step import PackedLoss, pack_loss
from milm_ray.models.chat_format import IGNORE_INDEX

VOCAB = 97


SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZE))


def glm():
    from transformers import GlmConfig, GlmForCausalLM

    return GlmForCausalLM(GlmConfig(**SIZE, head_dim=8, attention_bias=True, pad_token_id=0))


def phi3():
    """A decoder whose last layer is of no form that last_layer.py knows."""
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(**SIZE, pad_token_id=0))


def samples(count=8, seed=3, lengths=(5, 60)):
    draw = random.Random(seed)
    made = []
    for number in range(count):
        length = draw.randrange(*lengths)
        ids = [draw.randrange(VOCAB) for _ in range(length)]
        labels = [i if draw.random() < 0.5 else IGNORE_INDEX for i in ids]
        labels[-1] = ids[-1]
        made.append(Sample(f"s{number}", ids, labels))
    return made


def with_lora(model, targets):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide errors in A's gradient
            torch.nn.init.normal_(parameter, std=0.05)
    return tuned


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (llama, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        (glm, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]),
        (phi3, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    ],
)
@pytest.mark.parametrize("capacity", [10**6, 100])
@pytest.mark.parametrize("fused", [True, False])
def test_packed_gradients_equal_batch_1_accumulation_8(
    build, targets, capacity, fused, plain_llama
):
    torch.manual_seed(0)
    model = with_lora(build(), targets)
    # One is longer than a block of the attention.
    data = [*samples(7), *samples(1, lengths=(300, 301))]
    total = sum(sample.label_tokens for sample in data)

    # transformers' Trainer: one sample per forward pass, full logits, its num_items_in_batch loss.
    plain = 0.0
    for sample in data:
        loss = model(
            input_ids=torch.tensor([sample.input_ids]),
            labels=torch.tensor([sample.labels]),
            num_items_in_batch=total,
        ).loss
        loss.backward()
        plain += loss.item()
    expected = gradients(model)

    use_packed_attention(model)
    if fused:
        assert lora.fuse(model) == 2 * len(targets)
        assert fuse_layers(model.get_base_model()) == 2 * 2 + 1  # the norms
    module = PackedLoss(model)
    packed = 0.0
    for group in bins([len(sample.input_ids) for sample in data], capacity):
        loss = pack_loss(module, collate([data[i] for i in group])) / total
        loss.backward()
        packed += loss.item()
    found = gradients(model)

    assert packed == pytest.approx(plain, rel=1e-5)
    assert expected.keys() == found.keys()
    assert len(expected) == 2 * 2 * len(targets)
    for name, gradient in expected.items():
        difference = (found[name] - gradient).norm() / gradient.norm()
        assert difference < 1e-5, name


def test_gradients_that_are_written_out_are_the_derivatives():
    torch.manual_seed(0)
    x, cos, sin = (torch.randn(1, heads, 5, 8, dtype=torch.double) for heads in (3, 1, 1))
    weight = torch.randn(8, dtype=torch.double)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: RmsNorm.apply(x, weight, 1e-5), x)
    assert torch.autograd.gradcheck(lambda x: Rotary.apply(x, cos, sin), x)


def test_norms_that_are_trained_keep_transformers_gradient(plain_llama):
    assert fuse_layers(llama()) == 0


@pytest.mark.parametrize("lengths", [(128,), (1, 127, 129, 300), (257, 2)])
def test_attention_by_blocks_is_torchs_attention(lengths):
    torch.manual_seed(0)
    parts = [torch.randn(2, sum(lengths), 8).requires_grad_() for _ in range(3)]
    upstream = torch.randn(sum(lengths), 2, 8)
    found = BlockAttention.apply(*parts, lengths, 0.3)
    ours = torch.autograd.grad(found, parts, upstream)

    split = zip(*(part.split(lengths, 1) for part in parts), strict=True)
    attention = torch.nn.functional.scaled_dot_product_attention
    rows = [attention(*qkv, is_causal=True, scale=0.3) for qkv in split]
    expected = torch.cat(rows, 1).transpose(0, 1)
    torch.testing.assert_close(found, expected)
    for one, other in zip(ours, torch.autograd.grad(expected, parts, upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [["q_proj"], ["k_proj", "v_proj"], ["gate_proj", "up_proj"]])
def test_layers_that_share_an_input_may_be_asked_in_any_order_and_for_any_input(targets):
    torch.manual_seed(0)
    model = with_lora(llama(), targets)
    first = model.get_base_model().model.layers[0]
    layers = [part for name, part in first.named_modules() if name.split(".")[-1] in targets]
    inputs = [torch.randn(1, 3, 32) for _ in range(2)]
    expected = [[layer(x) for x in inputs] for layer in layers]
    lora.fuse(model)
    for order in (layers, layers[::-1]):
        for layer in order:
            for x, right in zip(inputs, expected[layers.index(layer)], strict=True):
                torch.testing.assert_close(layer(x), right)


def test_a_sample_does_not_see_its_neighbours():
    torch.manual_seed(0)
    model = with_lora(llama(), ["q_proj"]).eval()
    use_packed_attention(model)
    module = PackedLoss(model)
    data = samples(3)
    alone = pack_loss(module, collate([data[1]])).item()
    changed = [Sample("x", [1] * 40, [IGNORE_INDEX] * 40), data[1], data[2]]
    others = pack_loss(module, collate([data[2]])).item()
    assert pack_loss(module, collate(changed)).item() == pytest.approx(alone + others, rel=1e-5)


def test_a_row_without_loss_gives_zero_gradients_for_every_parameter():
    torch.manual_seed(0)
    model = with_lora(llama(), ["q_proj", "down_proj"])
    use_packed_attention(model)
    loss = pack_loss(PackedLoss(model), idle(samples(1)[0]))
    loss.backward()
    assert loss.item() == 0.0
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trainable)
