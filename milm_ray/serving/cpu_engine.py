"""vLLM on a machine without a GPU: one process an engine, and adapters at the base model's speed.

vLLM's own CPU path for LoRA copies the adapter's matrices once *per token* (those of the head even
for requests of the base) and, where base and adapter requests meet in one batch, adds the adapter
to the base's rows too (row index -1 is the last slot). `GroupedLora` multiplies once per adapter
over the rows that asked for it, so both are gone. `Worker` puts it in place; `worker_cls` is vLLM's
own option for that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms import current_platform
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.worker.cpu_worker import CPUWorker

WORKER_CLS = f"{__name__}.Worker"


class GroupedLora(PunicaWrapperCPU):
    """Multi-LoRA by one matrix product per adapter in the batch.

    A batch is groups: (adapter slot, rows), rows None where the whole batch is one adapter's.
    Rows of base requests are in no group. `groups` are those of the tokens, `sampled` those of the
    positions whose next token is asked for.
    """

    groups: list[tuple[int, torch.Tensor | None]]
    sampled: list[tuple[int, torch.Tensor | None]]

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(*args, **kwargs)
        self.groups = _groups(self.token_lora_indices)
        self.sampled = _groups(self.sampler_indices)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """y[rows] += scale · x[rows] Aᵀ Bᵀ, slice by slice of a fused layer (q, k, v; gate, up).

        y: (tokens, out); x: (tokens, in); A: (slots, 1, rank, in); B: (slots, 1, slice, rank).
        """
        out, rows_in = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        for slot, rows in self.groups:
            chosen = rows_in if rows is None else rows_in[rows]
            start = 0
            for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                part = out[:, start : start + size]
                _add_product(part, rows, chosen @ a[slot, 0].T, b[slot, 0], scale)
                start += size

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y[rows] += x[rows] Bᵀ; x: (tokens, rank), each token's own row of its adapter's A."""
        for slot, rows in self.groups:
            _add_product(y, rows, x if rows is None else x[rows], lora_b_stacked[slot, 0], 1.0)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """y[rows, :vocabulary] += scale · x[rows] Aᵀ Bᵀ; y: (sampled, padded vocabulary)."""
        for slot, rows in self.sampled:
            chosen = x if rows is None else x[rows]
            b = lora_b_stacked[slot, 0]
            _add_product(y[:, : len(b)], rows, chosen @ lora_a_stacked[slot, 0].T, b, scale)


def _groups(slots: torch.Tensor) -> list[tuple[int, torch.Tensor | None]]:
    """The rows of each adapter slot; -1 is a base request's row."""
    present = torch.unique(slots).tolist()
    if len(present) == 1:
        return [] if present[0] < 0 else [(present[0], None)]
    return [(s, (slots == s).nonzero().squeeze(1)) for s in present if s >= 0]


def _add_product(
    y: torch.Tensor, rows: torch.Tensor | None, down: torch.Tensor, b: torch.Tensor, scale: float
) -> None:
    """y[rows] += scale · down Bᵀ, in place."""
    if rows is None:
        y.addmm_(down, b.T, alpha=scale)
    else:
        y.index_add_(0, rows, down @ b.T, alpha=scale)


class Worker(CPUWorker):
    """vLLM's CPU worker with `GroupedLora`."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        qualified = f"{GroupedLora.__module__}.{GroupedLora.__qualname__}"
        # vLLM looks the class up by this name when it loads a model; there is no option for it.
        setattr(type(current_platform), "get_punica_wrapper", classmethod(lambda cls: qualified))  # noqa: B010
        super().load_model(*args, **kwargs)


class CpuEngine(VLLMEngine):
    """The engine of ray.serve.llm with the model in the engine's own process.

    vLLM starts one more process for the worker, to bind its threads; with the threads set by the
    replica's environment it would only import everything once more (about 10 s and 0.8 GiB).
    """

    async def start(self) -> None:
        config: Any = self.llm_config.get_engine_config()
        _import_architectures(config.actual_hf_model_id)
        await super().start()

    def _start_async_llm_engine(self, args: Any, config: Any, placement_group: Any) -> Any:
        if config.parallel_config.world_size == 1:
            config.parallel_config.distributed_executor_backend = UniProcExecutor
        return super()._start_async_llm_engine(args, config, placement_group)


def _import_architectures(checkpoint: str) -> None:
    """Import a checkpoint's model class here, so that vLLM need not ask another process about it.

    For the sake of CUDA vLLM inspects a class it has not seen in a process of its own, which costs
    one more import of everything for each engine on a new machine.
    """
    config = Path(checkpoint, "config.json")
    if not config.is_file():
        return
    for name in json.loads(config.read_text(encoding="utf-8")).get("architectures") or []:
        if name in ModelRegistry.models:
            model_cls = ModelRegistry.models[name].load_model_cls()
            for known_as in {name, model_cls.__name__}:
                ModelRegistry.register_model(known_as, model_cls)
