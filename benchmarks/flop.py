"""Floating point operations: how many a training step needs, and how many a CPU does a second."""

from __future__ import annotations

import time
from typing import Any

# Every linear layer of a Llama but the head.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def needed_flop(model: Any, rank: int, samples: list[Any]) -> float:
    """Floating point operations of one epoch that no implementation can leave out.

    A frozen matrix of n weights: 2n a token forward, 2n for the gradient by its input. A LoRA
    matrix: 6n. The head only where a label is, and the gradient by its input: 4n. Attention: scores
    and values over the causal half, forward and twice that backward.
    """
    shapes = [
        parameter.shape
        for name, parameter in model.named_parameters()
        if name.split(".")[-2] in TARGETS
    ]
    frozen = sum(rows * columns for rows, columns in shapes)
    lora = rank * sum(rows + columns for rows, columns in shapes)
    head = model.lm_head.weight.numel()
    config = model.config
    width = config.num_hidden_layers * config.hidden_size
    tokens = sum(len(s.input_ids) for s in samples)
    labels = sum(s.label_tokens for s in samples)
    attention = sum(3 * 4 * width * len(s.input_ids) ** 2 / 2 for s in samples)
    return tokens * (4 * frozen + 6 * lora) + labels * 4 * head + attention


def matmul_rate(threads: int) -> float:
    """Floating point operations a second of a large fp32 product on `threads` threads."""
    import torch

    torch.set_num_threads(threads)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = 0.0
    for _ in range(12):
        start = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * 1024**3 / (time.perf_counter() - start))
    return best
