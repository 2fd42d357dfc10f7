"""A base model with LoRA under DeepSpeed, and one optimizer step on it.

Runs in every worker, and in one process without Ray (`single_process`), so that the same step can
be tested and measured anywhere.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from milm_ray.config import FinetuneSection
from milm_ray.finetune import lora
from milm_ray.finetune.attention import use_packed_attention
from milm_ray.finetune.fused import fuse_layers
from milm_ray.finetune.packing import Pack
from milm_ray.finetune.step import PackedLoss, pack_loss

if TYPE_CHECKING:
    from peft import PeftModel

_TAG = "state"


class Diverged(Exception):
    """A loss or gradient that is not a number; `names`: the samples it came from."""

    def __init__(self, what: str, names: Sequence[str]) -> None:
        self.what = what
        self.names = list(names)
        super().__init__(f"{what} in {', '.join(self.names)}")


@dataclass(frozen=True)
class StepResult:
    """loss: mean per label token of the optimizer step; grad_norm: before clipping."""

    loss: float
    grad_norm: float


def single_process() -> None:
    """A process group of one, for running without Ray."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not distributed.is_initialized():
        store = distributed.HashStore()
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)


def lora_model(
    base: str | Path,
    settings: FinetuneSection,
    targets: Sequence[str],
    seed: int,
    identity: str = "",
) -> PeftModel:
    """A base checkpoint with a fresh LoRA adapter, see with_lora.

    identity: what the adapter says it belongs to (a hub id or a name), never a path of this
    machine. Under ZeRO 3 the process group must be up: each worker keeps its part of every weight
    and never holds all of them.
    """
    tuned = with_lora(_base_model(base, settings), settings, targets, seed)
    if identity:
        tuned.peft_config["default"].base_model_name_or_path = identity
    return tuned


def with_lora(
    model: Any, settings: FinetuneSection, targets: Sequence[str], seed: int
) -> PeftModel:
    """A transformers model with a fresh LoRA adapter on `targets`, its attention packed.

    seed fixes the adapter's initial values, the same on every worker.
    """
    from peft import LoraConfig, get_peft_model

    use_packed_attention(model)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(seed)
    config = LoraConfig(
        r=settings.lora.rank,
        lora_alpha=settings.lora.alpha,
        lora_dropout=settings.lora.dropout,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
    )
    # Beside weights that are divided already, ZeRO 3 takes adapter weights of no other dtype; the
    # optimizer keeps them in fp32 all the same.
    tuned = get_peft_model(model, config, autocast_adapter_dtype=settings.zero_stage != 3)
    if settings.zero_stage != 3 and not settings.lora.dropout:
        lora.fuse(tuned)
    fuse_layers(model)
    tuned.train()
    return tuned


def _base_model(base: str | Path, settings: FinetuneSection) -> Any:
    """The base's weights in the precision to train in; under ZeRO 3 divided as they are read."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    if settings.zero_stage != 3:
        return AutoModelForCausalLM.from_pretrained(str(base), dtype=dtype)
    deepspeed_module()
    from transformers.integrations import HfDeepSpeedConfig

    # While this object lives, transformers divides each layer among the workers before it fills it,
    # layer by layer from files that are mapped, not read into memory.
    dividing = HfDeepSpeedConfig(deepspeed_config(settings))
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=dtype)
    del dividing
    return model


def deepspeed_module() -> Any:
    """The deepspeed module, set up for the device at hand."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.utils.logging.logger.setLevel("ERROR")
    # On CPU it would compile a shared-memory all-reduce first, half a minute that a small adapter's
    # gradients never earn back; gloo does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed_config(settings: FinetuneSection) -> dict[str, Any]:
    """The DeepSpeed configuration of a fine-tune. Packs are accumulated by optimizer_step."""
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.zero_stage:
        # The trainable part is a LoRA adapter: small buckets, nothing worth overlapping.
        zero |= {"overlap_comm": False, "reduce_bucket_size": 5_000_000}
    if settings.offload and settings.zero_stage:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "bf16": {"enabled": settings.precision == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def start_engine(model: Any, settings: FinetuneSection) -> Any:
    """A DeepSpeed engine around PackedLoss(model) with torch's AdamW on the adapter.

    The process group must be up. AdamW's betas and epsilon are torch's defaults, as in
    LLaMA-Factory.
    """
    deepspeed = deepspeed_module()
    if not torch.cuda.is_available():
        _keep_freed_memory()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    engine, *_ = deepspeed.initialize(
        model=PackedLoss(model),
        optimizer=optimizer,
        model_parameters=trainable,
        config=deepspeed_config(settings),
        dist_init_required=False,
    )
    return engine


def _keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one, up to a GiB.

    By default every larger activation is mapped anew and filled with zeros by the kernel, a tenth
    of a small model's step. Another C library is left as it is.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option in (trim_threshold, mmap_threshold):
            mallopt(option, 1 << 30)


def optimizer_step(
    engine: Any, packs: Sequence[Pack], label_tokens: int, learning_rate: float
) -> StepResult:
    """One optimizer step on this worker's packs.

    packs: equally many on every worker. label_tokens: of the whole step, over all workers.
    Raises Diverged on every worker, with the samples named, when a loss or the gradient is not
    finite; the parameters are then left as they were for a bad loss.
    """
    workers = distributed.get_world_size()
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    losses = []
    for number, pack in enumerate(packs, 1):
        engine.set_gradient_accumulation_boundary(number == len(packs))
        # DeepSpeed averages gradients over the workers; the loss is a sum over them.
        loss = pack_loss(engine, pack, engine.device) * (workers / label_tokens)
        losses.append(loss.detach().float() / workers)
        engine.backward(loss)
    own = torch.stack(losses)
    total = own.sum()
    if workers > 1:
        distributed.all_reduce(total)
    if not torch.isfinite(total):
        bad = [p for p, value in zip(packs, own.tolist(), strict=True) if not _finite(value)]
        raise Diverged("the loss is not finite", _everywhere(bad))
    # Without ZeRO and in fp32 DeepSpeed clips, but does not keep the norm.
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    engine.step()
    kept = engine.get_global_grad_norm()
    norm = norm if kept is None else float(kept)
    if not _finite(norm):
        raise Diverged("the gradient is not finite", _everywhere(packs))
    return StepResult(float(total), norm)


def mean_loss(engine: Any, packs: Sequence[Pack], label_tokens: int) -> float:
    """Mean loss per label token of this and all other workers' packs, nothing trained.

    packs, label_tokens: as in optimizer_step. Draws no random number, so training goes on as if it
    had not been.
    """
    engine.eval()
    with torch.no_grad():
        total = torch.stack([pack_loss(engine, pack, engine.device).float() for pack in packs])
        summed = total.sum()
        if distributed.get_world_size() > 1:
            distributed.all_reduce(summed)
    engine.train()
    return float(summed) / label_tokens


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _everywhere(packs: Sequence[Pack]) -> list[str]:
    """The names of all workers' samples in these packs."""
    own = [name for pack in packs for name in pack.names]
    return sorted({name for names in _gathered(own) for name in names})


def _gathered(own: Any) -> list[Any]:
    """What every worker has, by rank."""
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, own)
    return gathered


def save_state(engine: Any, directory: Path, client_state: dict[str, Any]) -> None:
    """Write this worker's part of the resumable state: adapter, optimizer, and client_state."""
    own = [torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None]
    # DeepSpeed keeps rank 0's client_state alone; each worker draws its own dropout.
    state = {**client_state, "random_states": _gathered(own)}
    engine.save_checkpoint(
        str(directory), tag=_TAG, client_state=state, exclude_frozen_parameters=True
    )


def load_state(engine: Any, directory: Path) -> dict[str, Any]:
    """Take up a state written by as many workers; returns its client_state."""
    path, state = engine.load_checkpoint(
        str(directory), tag=_TAG, load_module_strict=False, load_lr_scheduler_states=False
    )
    if path is None:
        raise FileNotFoundError(f"no DeepSpeed state in {directory}")
    cpu, cuda = state["random_states"][distributed.get_rank()]
    torch.set_rng_state(cpu.cpu())
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda.cpu())
    return state


def save_adapter(engine: Any, directory: Path) -> None:
    """Write the adapter in PEFT's format (rank 0 writes, all workers take part)."""
    import deepspeed

    model = engine.module.model
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with deepspeed.zero.GatheredParameters(
        trainable, modifier_rank=0, enabled=engine.zero_optimization_stage() == 3
    ):
        if distributed.get_rank() == 0:
            # "auto" would ask the hub whether the base's embedding was resized.
            model.save_pretrained(str(directory), save_embedding_layers=False)
