"""The model card of an adapter: what it is, how it was made, what its licence asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from milm_ray.config import FinetuneSection
from milm_ray.models.registry import BaseModel, adapter_name


def model_card(
    base: BaseModel,
    identity: str,
    settings: FinetuneSection,
    counts: Mapping[str, Any],
    final_loss: float,
    seed: int,
) -> str:
    """README.md of adapters/<model>/. identity: hub id or name of the base that was tuned."""
    title = adapter_name(base)
    lora = settings.lora
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {identity}",
        "language: zh",
        "pipeline_tag: text-generation",
        "---",
        f"# {title}",
        "",
        f"A LoRA adapter that turns {identity} into a counselor in the style of motivational "
        "interviewing (MI), tuned on counselling dialogues transcribed into that style.",
        "",
        "It is a research model. It is no medical device, makes no diagnosis and does not replace "
        "a professional; people in crisis need a human.",
        "",
        "## Training",
        "",
        "| | |",
        "|---|---|",
        f"| samples | {counts['samples']:,} ({settings.unit}s), {counts['tokens']:,} tokens, "
        f"loss on {counts['label_tokens']:,} counselor tokens |",
        f"| steps | {counts['steps']:,} of {settings.batch_size} × "
        f"{settings.gradient_accumulation} samples × {settings.workers_per_model} workers, "
        f"{settings.epochs:g} epochs |",
        f"| learning rate | {settings.learning_rate:g}, {settings.schedule}, warm-up "
        f"{settings.warmup_ratio:g} |",
        f"| LoRA | rank {lora.rank}, alpha {lora.alpha}, dropout {lora.dropout:g} on "
        f"{', '.join(base.lora_targets)} |",
        f"| precision | {settings.precision}, cutoff {settings.cutoff} tokens, seed {seed} |",
        f"| final loss | {final_loss:.4f} per counselor token |",
        "",
        "The chat template beside the weights is the one it was trained with: use it.",
        "",
        "## Licence",
        "",
        f"The base model's terms hold for this adapter: {base.licence} ({base.licence_url}).",
    ]
    if base.notice:
        lines += ["", f"> {base.notice}"]
    if base.adapter_prefix:
        lines += ["", f"Its licence asks that a name given to it begins with "
                  f"“{base.adapter_prefix}”."]  # fmt: skip
    if base.note:
        lines += ["", base.note]
    return "\n".join(lines) + "\n"
