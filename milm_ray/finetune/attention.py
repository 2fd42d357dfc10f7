"""Causal attention inside each sample of a packed row, nothing across.

The work is the sum of the squares of the lengths, where a mask over the whole row would make it the
square of their sum.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

PACKED_ATTENTION = "milm_packed"

# Rows of a block: few enough to skip most of what lies above the diagonal.
_BLOCK = 128
# Up to here a sample's weights are kept for the backward pass: heads * length² / 2 floats.
_KEPT_LENGTH = 1024


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
    group = query.shape[1] // key.shape[1]
    kept = query.requires_grad and max(sample_lengths) <= _KEPT_LENGTH
    if kept and not dropout and query.device.type == "cpu":
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        keys, values = (
            x[0].repeat_interleave(group, 0) if group > 1 else x[0] for x in (key, value)
        )
        return BlockAttention.apply(query[0], keys, values, sample_lengths, scale)[None], None
    parts = [
        F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=group > 1
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


class BlockAttention(Function):
    """The same on a CPU, by blocks of rows whose weights are kept for the backward pass.

    torch's fused kernel works the weights out again there and multiplies in tiles that are small
    for the cores; this takes three quarters of its time at 460 tokens of 64 x 4 heads.
    query, key, value: [heads, T, d]; returns [T, heads, d].
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float
    ) -> Tensor:
        heads, total, size = query.shape
        query, key, value = (query * scale).contiguous(), key.contiguous(), value.contiguous()
        out = query.new_empty(total, heads, size)
        above = query.new_full((_BLOCK, _BLOCK), float("-inf")).triu(1)
        kept = []
        for start, rows in _blocks(lengths):
            seen, own = slice(start, rows.stop), rows.stop - rows.start
            scores = query[:, rows] @ key[:, seen].mT
            scores[..., -own:] += above[:own, :own]
            weights = scores.softmax(-1)
            out[rows] = (weights @ value[:, seen]).transpose(0, 1)
            kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, *kept = ctx.saved_tensors
        by_out = upstream.transpose(0, 1).contiguous()
        by_query, by_key, by_value = (torch.zeros_like(x) for x in (query, key, value))
        for (start, rows), weights in zip(_blocks(ctx.lengths), kept, strict=True):
            seen = slice(start, rows.stop)
            by_value[:, seen].baddbmm_(weights.mT, by_out[:, rows])
            by_weights = by_out[:, rows] @ value[:, seen].mT
            by_scores = torch._softmax_backward_data(by_weights, weights, -1, weights.dtype)
            by_query[:, rows] = by_scores @ key[:, seen]
            by_key[:, seen].baddbmm_(by_scores.mT, query[:, rows])
        return by_query.mul_(ctx.scale), by_key, by_value, None, None


def _blocks(lengths: tuple[int, ...]) -> list[tuple[int, slice]]:
    """Of each sample's blocks: where the sample starts in the row, and the block's places."""
    blocks = []
    for start, end in pairwise(accumulate(lengths, initial=0)):
        edges = [*range(start, end, _BLOCK), end]
        blocks += [(start, slice(a, b)) for a, b in pairwise(edges)]
    return blocks


def use_packed_attention(model: Any) -> None:
    """Switch a transformers model to packed_attention."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    model.set_attn_implementation(PACKED_ATTENTION)
