"""Causal attention inside each sample of a packed row, nothing across.

One call of torch's fused kernel per sample: the work is the sum of the squares of the lengths,
where a mask over the whole row would make it the square of their sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PACKED_ATTENTION = "milm_packed"


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sample_lengths: tuple[int, ...],
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers' AttentionInterface.

    query: [1, heads, T, d]; key, value: [1, kv_heads, T, d]; sample_lengths sum to T. Returns
    [1, T, heads, d].
    """
    grouped = query.shape[1] != key.shape[1]
    parts = [
        F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
        for q, k, v in zip(
            query.split(sample_lengths, 2),
            key.split(sample_lengths, 2),
            value.split(sample_lengths, 2),
            strict=True,
        )
    ]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    return joined.transpose(1, 2).contiguous(), None


def use_packed_attention(model: Any) -> None:
    """Switch a transformers model to packed_attention."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    model.set_attn_implementation(PACKED_ATTENTION)
