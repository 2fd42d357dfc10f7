"""The base models that can be tuned and served: identity, chat format, licence duties.

A fourth model is one BaseModel here and, if its chat format is new, one ChatFormat.
"""

from __future__ import annotations

from dataclasses import dataclass

from milm_ray.errors import UserError


@dataclass(frozen=True)
class BaseModel:
    """One base model.

    name: short name used in configs, artifacts and endpoints. hub_id, revision: where it comes from
    and the pin, a commit or a tag. chat_format: a format's name.
    model_type: as its config.json says it; a local copy of the base is recognised by it.
    lora_targets: every linear layer but the head, as the transformers layout names them.
    licence: its name. adapter_prefix: what a fine-tune's name must begin with, or "". notice: a
    sentence that whoever hands on an adapter must show. note: what else its user must know.
    """

    name: str
    hub_id: str
    revision: str
    chat_format: str
    model_type: str
    lora_targets: tuple[str, ...]
    licence: str
    licence_url: str
    adapter_prefix: str = ""
    notice: str = ""
    note: str = ""


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

BASE_MODELS: dict[str, BaseModel] = {
    entry.name: entry
    for entry in (
        BaseModel(
            name="baichuan2",
            hub_id="baichuan-inc/Baichuan2-7B-Chat",
            revision="ea66ced17780ca3db39bc9f8aa601d8463db3da5",
            chat_format="baichuan2",
            model_type="baichuan",
            lora_targets=(*_ATTENTION, "gate_proj", "up_proj", "down_proj"),
            licence="Community License for Baichuan2 Model",
            licence_url="https://huggingface.co/baichuan-inc/Baichuan2-7B-Chat",
            notice="Derived from Baichuan2-7B-Chat under its community licence, which asks "
            "commercial users to apply for permission.",
            note="Imported into the Llama layout: LoRA on the separate q, k and v projections is "
            "not the same adapter as LoRA of equal rank on the original's joint W_pack.",
        ),
        BaseModel(
            name="glm4",
            hub_id="zai-org/glm-4-9b-chat-hf",
            revision="8599336fc6c125203efb2360bfaf4c80eef1d1bf",
            chat_format="glm4",
            model_type="glm",
            lora_targets=(*_ATTENTION, "gate_up_proj", "down_proj"),
            licence="glm-4-9b licence",
            licence_url="https://huggingface.co/zai-org/glm-4-9b-chat-hf/blob/main/LICENSE",
            adapter_prefix="glm-4",
            notice="Built with glm-4",
            note="Free for research; commercial use needs registration with the licensor.",
        ),
        BaseModel(
            name="llama3",
            hub_id="shenzhi-wang/Llama3-8B-Chinese-Chat",
            revision="v2",
            chat_format="llama3",
            model_type="llama",
            lora_targets=(*_ATTENTION, "gate_proj", "up_proj", "down_proj"),
            licence="Meta Llama 3 Community License",
            licence_url="https://llama.meta.com/llama3/license/",
            adapter_prefix="Llama-3",
            notice="Built with Meta Llama 3. Meta Llama 3 is licensed under the Meta Llama 3 "
            "Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.",
            note="The hub's main branch is v2.1; the paper used v2.",
        ),
    )
}


def get(name: str) -> BaseModel:
    """The entry of a short name; UserError with the known names otherwise."""
    try:
        return BASE_MODELS[name]
    except KeyError:
        known = ", ".join(sorted(BASE_MODELS))
        raise UserError(f"unknown base model {name!r}", f"use one of: {known}") from None


def adapter_name(base: BaseModel, suffix: str = "mi") -> str:
    """Published name of an adapter of a base, its licence's prefix in front where one is asked."""
    return f"{base.adapter_prefix or base.name}-{suffix}"
