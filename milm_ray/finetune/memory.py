"""How much memory a fine-tune needs, estimated before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milm_ray.config import FinetuneSection
from milm_ray.errors import UserError

GIB = 2**30

# Bytes per LoRA weight beside the weight itself: fp32 copy, two Adam moments, gradient.
_ADAPTER_STATE = 4 + 8 + 4
# Activations that one transformer layer keeps for its backward pass, in multiples of the hidden
# size (norms, residuals, attention in and out) and of the MLP's inner size (gate, up, product).
_KEPT_HIDDEN, _KEPT_INNER = 10, 4
# The same with the fused layers of a GPU; 7.3 and 3 measured at 8B (benchmarks/gpu_step.py).
_FUSED_HIDDEN, _FUSED_INNER = 8, 3
# Share of the free memory that an estimate may take for a run to do without checkpointing.
_SAFE = 0.9
# The head works through label places in chunks of this many (step.py), fp32 logits and their copy.
_HEAD_BYTES = 8


@dataclass(frozen=True)
class Estimate:
    """Bytes per worker."""

    weights: float
    adapter: float
    activations: float
    head: float

    @property
    def total(self) -> float:
        return self.weights + self.adapter + self.activations + self.head

    def text(self) -> str:
        parts = {
            "weights": self.weights,
            "adapter and optimizer": self.adapter,
            "activations": self.activations,
            "logits": self.head,
        }
        listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
        return f"about {self.total / GIB:.1f} GiB per worker ({listed})"


def estimate(
    architecture: Mapping[str, Any],
    settings: FinetuneSection,
    workers: int,
    tokens: int,
    head_rows: int,
    fused: bool = False,
) -> Estimate:
    """Memory of one worker; with gradient checkpointing unless the settings say false.

    architecture: the base's config.json (Llama or Glm layout). tokens: of the longest forward pass.
    head_rows: label places that the head works on at a time. fused: see finetune.fused.
    """
    hidden, layers = architecture["hidden_size"], architecture["num_hidden_layers"]
    inner, vocabulary = architecture["intermediate_size"], architecture["vocab_size"]
    heads = architecture["num_attention_heads"]
    kv_heads = architecture.get("num_key_value_heads") or heads
    width = architecture.get("head_dim") or hidden // heads
    queries, keys = heads * width, kv_heads * width

    per_layer = hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * inner
    embeddings = vocabulary * hidden * (1 if architecture.get("tie_word_embeddings") else 2)
    size = 2 if settings.precision == "bf16" else 4
    split = workers if settings.zero_stage == 3 else 1
    weights = (layers * per_layer + embeddings) * size / split
    if split > 1:
        # What is gathered for use: the head or the embedding, a layer, and the layer fetched ahead.
        weights += (vocabulary * hidden + 2 * per_layer) * size

    ends = 2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + inner)
    adapter = layers * settings.lora.rank * ends * (size + _ADAPTER_STATE)

    by_hidden, by_inner = (_FUSED_HIDDEN, _FUSED_INNER) if fused else (_KEPT_HIDDEN, _KEPT_INNER)
    kept = tokens * (by_hidden * hidden + by_inner * inner) * size
    if settings.lora.dropout:
        kept += tokens * _by_dropout(hidden, queries, inner, size, fused)
    if settings.gradient_checkpointing is not False:
        activations = layers * tokens * hidden * size + kept
    else:
        activations = layers * kept
    return Estimate(weights, adapter, activations, head_rows * vocabulary * _HEAD_BYTES)


def _by_dropout(hidden: int, queries: int, inner: int, size: int, fused: bool) -> int:
    """Bytes per token that a layer keeps more where its adapters drop some of their input.

    Every adapter then keeps a dropped copy of its own and what was dropped, which is a byte per
    value on a GPU and a factor on a CPU. The inputs themselves stay only where something else needs
    them: those of q, k and v, of gate and up, and of down go; the attention may keep that of o.
    """
    inputs = 3 * hidden + queries + 2 * hidden + inner
    return inputs * (size + (1 if fused else size)) - (2 * hidden + inner) * size


def settle(
    model: str,
    architecture: Mapping[str, Any],
    settings: FinetuneSection,
    workers: int,
    tokens: int,
    head_rows: int,
    device: Any,
) -> tuple[FinetuneSection, Estimate]:
    """The settings with gradient checkpointing decided, and what they need (see estimate).

    Where the settings leave it open, layers are computed twice only if some worker's memory would
    not do otherwise: all workers take part, and decide alike. UserError when memory will not do.
    """
    import torch

    fused = torch.device(device).type == "cuda"

    def need(choice: FinetuneSection) -> Estimate:
        return estimate(architecture, choice, workers, tokens, head_rows, fused)

    if settings.gradient_checkpointing is None:
        plain = settings.model_copy(update={"gradient_checkpointing": False})
        fits = need(plain).total < _SAFE * _free_everywhere(device)
        settings = settings.model_copy(update={"gradient_checkpointing": not fits})
    settled = need(settings)
    check(model, settled, device)
    return settings, settled


def check_weights(
    model: str,
    architecture: Mapping[str, Any],
    settings: FinetuneSection,
    workers: int,
    device: Any,
) -> None:
    """UserError, on all workers, where the weights alone will not do: known before they are there.

    architecture: the source's config.json.
    """
    check(model, estimate(architecture, settings, workers, tokens=0, head_rows=0), device)


def check(model: str, need: Estimate, device: Any) -> None:
    """UserError, on all workers, when the device of one has less free memory than the estimate."""
    free = _free_everywhere(device)
    if need.total > free:
        raise UserError(
            f"{model} needs {need.text()}, and {free / GIB:.1f} GiB are free on {device}",
            "lower finetune.pack_tokens or finetune.cutoff, set finetune.gradient_checkpointing, "
            "or share the weights: finetune.zero_stage=3 with more finetune.workers_per_model",
        )


def _free_everywhere(device: Any) -> float:
    """The free bytes of the worker that has the fewest; all workers take part."""
    import torch
    from torch import distributed

    free = torch.tensor(_free(device), dtype=torch.float64, device=device)
    if distributed.is_initialized():
        distributed.all_reduce(free, distributed.ReduceOp.MIN)
    return float(free)


def _free(device: Any) -> float:
    """Free bytes of a GPU, or of this machine within its control group's limit."""
    import psutil
    import torch

    if getattr(device, "type", "cpu") == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = float(psutil.virtual_memory().available)
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file():
        text = limit.read_text().strip()
        if text.isdigit():
            free = min(free, int(text) - int(used.read_text()))
    return free
