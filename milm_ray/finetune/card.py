"""The model card of an adapter: what it is, how it was made, what its licence asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from milm_ray.config import FinetuneSection
from milm_ray.models.registry import BaseModel, adapter_name


def model_card(
    base: BaseModel,
    identity: str,
    settings: FinetuneSection,
    counts: Mapping[str, Any],
    seed: int,
) -> str:
    """README.md of adapters/<model>/.

    identity: hub id or name of the base that was tuned; counts: of the adapter's manifest.
    """
    lora = settings.lora
    table = [
        f"| samples | {counts['samples']:,} ({settings.unit}s), {counts['tokens']:,} tokens, "
        f"loss on {counts['label_tokens']:,} counselor tokens |",
        f"| steps | {counts['steps']:,} of {_per_step(settings)} samples, "
        f"{settings.epochs:g} epochs |",
        f"| learning rate | {settings.learning_rate:g}, {settings.schedule}, warm-up "
        f"{settings.warmup_ratio:g} |",
        f"| LoRA | rank {lora.rank}, alpha {lora.alpha}, dropout {lora.dropout:g} on "
        f"{', '.join(base.lora_targets)} |",
        f"| precision | {settings.precision}, cutoff {settings.cutoff} tokens, seed {seed} |",
        f"| final loss | {counts['final_loss']:.4f} per counselor token |",
    ]
    if counts["shortened"] or counts["too_long"]:
        table += [
            f"| over the cutoff | {counts['shortened']:,} lost their oldest rounds "
            f"({counts['rounds_dropped']:,} in all), {counts['too_long']:,} left out |"
        ]
    if "final_eval_loss" in counts:
        table += [
            f"| held out | loss {counts['final_eval_loss']:.4f} at the end, on "
            f"{counts['eval_samples']:,} {settings.unit}s |"
        ]
    purpose = (
        f"A LoRA adapter that turns {identity} into a counselor in the style of motivational "
        "interviewing (MI), tuned on counselling dialogues transcribed into that style."
    )
    return _card(base, adapter_name(base), identity, purpose, table)


def preference_card(
    base: BaseModel,
    identity: str,
    settings: FinetuneSection,
    counts: Mapping[str, Any],
    judges: Sequence[str],
) -> str:
    """README.md of adapters/<model>/dpo/; judges: the models that ranked the replies."""
    dpo = settings.dpo
    table = [
        f"| pairs | {counts['pairs']:,}, {counts['tokens']:,} tokens |",
        f"| judged by | {', '.join(judges)}, automatically |",
        f"| steps | {counts['steps']:,} of {_per_step(settings)} pairs, {dpo.epochs:g} epochs |",
        f"| DPO | beta {dpo.beta:g}, against the adapter it started from |",
        f"| learning rate | {dpo.learning_rate:g}, {settings.schedule}, warm-up "
        f"{settings.warmup_ratio:g} |",
        f"| at the end | loss {counts['final_loss']:.4f}, the chosen reply ahead in "
        f"{counts['final_accuracy']:.0%} of pairs |",
    ]
    purpose = (
        f"{adapter_name(base)} tuned further by direct preference optimisation (DPO), on pairs of "
        "its own replies that a language model ranked. No person judged them."
    )
    return _card(base, adapter_name(base, "mi-dpo"), identity, purpose, table)


def _per_step(settings: FinetuneSection) -> str:
    return (
        f"{settings.batch_size} × {settings.gradient_accumulation} × {settings.workers_per_model}"
    )


def _card(base: BaseModel, title: str, identity: str, purpose: str, table: Sequence[str]) -> str:
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {identity}",
        "language: zh",
        "pipeline_tag: text-generation",
        "---",
        f"# {title}",
        "",
        purpose,
        "",
        "It is a research model. It is no medical device, makes no diagnosis and does not replace "
        "a professional; people in crisis need a human.",
        "",
        "## Training",
        "",
        "| | |",
        "|---|---|",
        *table,
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
        asked = f"Its licence asks that a name given to it begins with “{base.adapter_prefix}”."
        lines += ["", asked]
    if base.note:
        lines += ["", base.note]
    return "\n".join(lines) + "\n"
