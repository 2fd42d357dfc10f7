"""RMS norm and rotary embedding with their gradients written out, for a CPU.

As chains of elementwise operations, which is how transformers has them, each is a dozen passes
through memory and half a dozen copies that wait for the backward pass. Written out it is half.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class RmsNorm(Function):
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, the weight frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        by_x = upstream * weight
        along = (by_x * x).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(x.shape[-1])
        return by_x.mul_(scale).addcmul_(x, along, value=-1), None, None


class Rotary(Function):
    """The two halves (a, b) of each head turned: (a cos - b sin, b cos + a sin).

    x: [batch, heads, T, d]; cos, sin: [batch, 1, T, d].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(upstream, cos, sin.roll(sin.shape[-1] // 2, -1).neg_()), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = (..., slice(half)), (..., slice(half, None))
    out = x * cos
    out[first].addcmul_(x[second], sin[first], value=-1)
    out[second].addcmul_(x[first], sin[second])
    return out


def apply_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """transformers' apply_rotary_pos_emb of the Llama family."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return Rotary.apply(q, cos, sin), Rotary.apply(k, cos, sin)
