"""The merged model says what base and adapter say together."""

from __future__ import annotations

from pathlib import Path

import pytest

from milm_ray.errors import UserError
from milm_ray.finetune.merge import merge

MODELS = Path(__file__).resolve().parents[2] / "milm_ray/samples/models"


@pytest.mark.slow
def test_merged_logits_equal_base_and_adapter(tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = MODELS / "tiny-llama3"
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    (tmp_path / "adapter" / "README.md").write_text("# Llama-3-mi\n", encoding="utf-8")

    out = merge(base, tmp_path / "adapter", tmp_path / "merged")

    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("我想戒烟，可是总忍不住。", return_tensors="pt").input_ids
    alone = AutoModelForCausalLM.from_pretrained(out)
    assert alone.dtype == AutoModelForCausalLM.from_pretrained(base).dtype
    with torch.no_grad():
        expected = tuned.eval()(input_ids=ids).logits
        found = alone.float()(input_ids=ids).logits
        untuned = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids).logits
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert (found - expected).norm() < 0.2 * (untuned - expected).norm()
    assert (out / "README.md").read_text(encoding="utf-8").startswith("# Llama-3-mi")
    assert (out / "chat_template.jinja").exists()


def test_a_missing_adapter_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no adapter_config\.json"):
        merge(MODELS / "tiny-llama3", tmp_path, tmp_path / "merged")
