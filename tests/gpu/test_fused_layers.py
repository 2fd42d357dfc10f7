"""On a GPU, the fused layers give transformers' losses and gradients.

pytest -m gpu tests/gpu
"""

from __future__ import annotations

import random

import pytest
import torch

from milm_ray.config import FinetuneSection
from milm_ray.finetune.engine import with_lora
from milm_ray.finetune.packing import collate
from milm_ray.finetune.samples import Sample
from milm_ray.finetune.step import PackedLoss, pack_loss

pytestmark = pytest.mark.gpu

VOCABULARY = 997
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def glm():
    from transformers import GlmConfig, GlmForCausalLM

    config = GlmConfig(**SHAPE, head_dim=64, attention_bias=True, pad_token_id=0)
    return GlmForCausalLM(config)


KINDS = {
    "llama": (llama, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "glm": (glm, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]),
}


def samples():
    draw = random.Random(2)
    made = []
    for number in range(6):
        ids = [draw.randrange(VOCABULARY) for _ in range(draw.randrange(40, 400))]
        labels = [i if place % 3 else -100 for place, i in enumerate(ids)]
        made.append(Sample(str(number), ids, labels))
    return made


def tuned(build, targets, dtype, packed):
    """The same model and adapter in any dtype; packed: ours, else transformers' and PEFT's."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = build().to("cuda", dtype)
    if packed:
        settings = FinetuneSection(gradient_checkpointing=False, precision="fp32")
        model = with_lora(model, settings, targets, 5)
    else:
        torch.manual_seed(5)
        model = get_peft_model(
            model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
        )
    model.to(dtype)
    draw = torch.Generator("cuda").manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                noise = torch.empty(parameter.shape, device="cuda")
                parameter.copy_(noise.normal_(std=0.05, generator=draw))
    return model


def of_ours(model, rows):
    loss = pack_loss(PackedLoss(model), collate(rows), torch.device("cuda"))
    loss.backward()
    return float(loss.detach()), gradient(model)


def of_transformers(model, rows):
    total = 0.0
    for row in rows:
        ids = torch.tensor([row.input_ids], device="cuda")
        labels = torch.tensor([row.labels[1:]], device="cuda")
        logits = model(input_ids=ids).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum")
        loss.backward()
        total += float(loss.detach())
    return total, gradient(model)


def gradient(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return torch.cat([found[name].float().flatten() for name in sorted(found)])


def error(found, reference):
    return float((found - reference).norm() / reference.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_is_equal_and_bf16_is_within_its_rounding(kind):
    build, targets = KINDS[kind]
    rows = samples()
    loss, exact = of_transformers(tuned(build, targets, torch.float32, packed=False), rows)

    ours, found = of_ours(tuned(build, targets, torch.float32, packed=True), rows)
    assert ours == pytest.approx(loss, rel=1e-5)
    assert error(found, exact) < 1e-4

    half, rounded = of_transformers(tuned(build, targets, torch.bfloat16, packed=False), rows)
    ours, found = of_ours(tuned(build, targets, torch.bfloat16, packed=True), rows)
    assert ours == pytest.approx(loss, rel=max(2e-3, 2 * abs(half / loss - 1)))
    assert error(found, exact) < 1.5 * error(rounded, exact)


def test_norms_mlps_and_the_adapters_take_the_fused_path():
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # noqa: F401

    from milm_ray.finetune.fused import fuse_layers

    # Two norms and an MLP in each of three layers, and the last norm.
    for build, _ in KINDS.values():
        assert fuse_layers(build()) == 3 * 3 + 1
