"""Frozen linear layers and their LoRA adapters in one pass over each output.

PEFT adds the adapter's part by a product, a scaling and a sum, each a pass over the whole output,
and as many in the backward pass. Here the second product adds itself to the first in place, and
layers that read the same input share its pass through the adapters and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

_ADAPTER = "default"
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_PARTS = 4  # weight, bias, down, up


class LinearsWithLora(Function):
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ for every layer, with W and b frozen.

    x: [..., in]; scales: s of each layer; parts: of each layer in turn weight (W) [out, in], bias
    (b) [out] or None, down (A) [r, in], up (B) [out, r]. Returns the layers' outputs [..., out].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], *parts: Any) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        weights, biases, downs, ups = (parts[kind::_PARTS] for kind in range(_PARTS))
        down = torch.cat(downs)
        inner = down @ rows.T
        outs = []
        for weight, bias, up, scale, own in zip(
            weights, biases, ups, scales, _split(inner, downs), strict=True
        ):
            out = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
            outs.append(out.addmm_(own.T, up.T, alpha=scale).view(*x.shape[:-1], -1))
        ctx.save_for_backward(rows, inner, down, *weights, *downs, *ups)
        ctx.scales, ctx.shape = scales, x.shape
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, down, *rest = ctx.saved_tensors
        count = len(ctx.scales)
        weights, downs, ups = rest[:count], rest[count : 2 * count], rest[2 * count :]
        gradients = [gradient.reshape(-1, gradient.shape[-1]) for gradient in upstream]
        by_inner = torch.empty_like(inner)
        by_ups = []
        for gradient, up, scale, own, by_own in zip(
            gradients, ups, ctx.scales, _split(inner, downs), _split(by_inner, downs), strict=True
        ):
            torch.mm(up.T, gradient.T, out=by_own).mul_(scale)
            by_ups.append((own @ gradient).mul_(scale).T)
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = gradients[0] @ weights[0]
            for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
                by_x.addmm_(gradient, weight)
            by_x = by_x.addmm_(by_inner.T, down).view(ctx.shape)
        by_downs = _split(by_inner @ rows, downs)
        pairs = zip(by_downs, by_ups, strict=True)
        return by_x, None, *(part for pair in pairs for part in (None, None, *pair))


def _split(joined: Tensor, downs: Sequence[Any]) -> tuple[Tensor, ...]:
    """What belongs to each layer of the rows that all ranks make together."""
    return joined.split([len(down) for down in downs])


def fuse(model: Any) -> int:
    """Let every LoRA layer of a PEFT model compute by LinearsWithLora; returns how many there are.

    For adapters without dropout whose weights are whole on this worker (not ZeRO 3, which gathers a
    layer's weights as the layer itself is called).
    """
    from peft.tuners.lora import Linear

    layers = 0
    for parent in model.modules():
        found = {name: part for name, part in parent.named_children() if isinstance(part, Linear)}
        layers += len(found)
        groups = [[found.pop(name) for name in names if name in found] for names in _SIBLINGS]
        for group in [*filter(None, groups), *([layer] for layer in found.values())]:
            for layer, forward in zip(group, _forwards(group), strict=True):
                layer.forward = forward
    return layers


def _forwards(layers: list[Any]) -> list[Callable[[Tensor], Tensor]]:
    """Forward passes of layers that are called one after the other on the same tensor: the first
    call computes them all, and each takes its own output away."""
    waiting: dict[int, Tensor] = {}
    asked: list[Tensor] = []

    def forward_of(index: int) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if index not in waiting or asked[0] is not x:
                waiting.update(enumerate(_together(layers, x)))
                asked[:] = [x]
            out = waiting.pop(index)
            if not waiting:
                asked.clear()
            return out

        return forward

    return [forward_of(index) for index in range(len(layers))]


def _together(layers: list[Any], x: Tensor) -> tuple[Tensor, ...]:
    parts: list[Any] = []
    for layer in layers:
        down, up = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        parts += [layer.base_layer.weight, layer.base_layer.bias, down, up]
    scales = tuple(layer.scaling[_ADAPTER] for layer in layers)
    return LinearsWithLora.apply(x, scales, *parts)
