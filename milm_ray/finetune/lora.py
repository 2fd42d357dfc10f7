"""A frozen linear layer and its LoRA adapter in one pass over the output.

PEFT adds the adapter's part by a product, a scaling and a sum, each a pass over the whole output,
and as many in the backward pass. Here the second product adds itself to the first in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

_ADAPTER = "default"


class LinearWithLora(Function):
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ with W and b frozen.

    x: [..., in]; weight: [out, in]; bias: [out] or None; down (A): [r, in]; up (B): [out, r].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = down @ rows.T
        out = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        out.addmm_(inner.T, up.T, alpha=scale)
        ctx.save_for_backward(rows, inner, weight, down, up)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        rows, inner, weight, down, up = ctx.saved_tensors
        gradient = upstream.reshape(-1, upstream.shape[-1])
        by_inner = (up.T @ gradient.T).mul_(ctx.scale)
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = (gradient @ weight).addmm_(by_inner.T, down).view(ctx.shape)
        by_up = (inner @ gradient).mul_(ctx.scale).T
        return by_x, None, None, by_inner @ rows, by_up, None


def fuse(model: Any) -> int:
    """Let every LoRA layer of a PEFT model compute by LinearWithLora; returns how many there are.

    For adapters without dropout whose weights are whole on this worker (not ZeRO 3, which gathers a
    layer's weights as the layer itself is called).
    """
    from peft.tuners.lora import Linear

    layers: list[Any] = [module for module in model.modules() if isinstance(module, Linear)]
    for layer in layers:
        layer.forward = _forward_of(layer)
    return len(layers)


def _forward_of(layer: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        base = layer.base_layer
        down, up = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        return LinearWithLora.apply(x, base.weight, base.bias, down, up, layer.scaling[_ADAPTER])

    return forward
