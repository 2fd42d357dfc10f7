"""A decoder layer's norms, gated MLP and rotary embedding in fewer passes through the memory.

transformers writes them as chains of elementwise operations: each is a pass, and the fp32 copies in
between stay until the backward pass. On CUDA Liger-Kernel's Triton kernels do the same sums in one
pass and keep the input only; that is what lets an 8B model train on 80 GB without computing its
layers twice (benchmarks/gpu_step.py). On a CPU elementwise.py writes the gradients out.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

# Model types of transformers whose rotary embedding turns the two halves of a head.
_TURNS_HALVES = ("llama", "qwen2", "qwen3", "mistral")


def fuse_layers(model: Any) -> int:
    """Give a transformers decoder the fused kernels of its device; returns how many modules took
    one.

    Modules of another form than Llama's and GLM's stay as they are; on a CPU also what is not in
    fp32, and norms that are trained.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu and model.dtype != torch.float32:
        return 0
    taken = 0
    for module in model.modules():
        forward = _rms_norm(module, on_gpu) or (_gated_mlp(module) if on_gpu else None)
        if forward is not None:
            module.forward = forward
            taken += 1
    if model.config.model_type in _TURNS_HALVES:
        if on_gpu:
            from liger_kernel.transformers.rope import liger_rotary_pos_emb as rotary
        else:
            from milm_ray.finetune.elementwise import apply_rotary as rotary
        # The attention finds the function in its own module; there is no other handle.
        modeling = importlib.import_module(type(model).__module__)
        modeling.apply_rotary_pos_emb = rotary  # type: ignore[attr-defined]
    return taken


def _rms_norm(module: Any, on_gpu: bool) -> Any:
    """Llama's RMSNorm: the root mean square in fp32, the product with the weight in its dtype."""
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
        return None
    if on_gpu:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction as Norm
    elif module.weight.requires_grad:
        return None
    else:
        from milm_ray.finetune.elementwise import RmsNorm as Norm

    def forward(x: torch.Tensor) -> Any:
        return Norm.apply(x, module.weight, module.variance_epsilon)

    return forward


def _gated_mlp(module: Any) -> Any:
    """down(silu(gate(x)) * up(x)), with gate and up apart (Llama) or as one map (GLM)."""
    act = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
    if not isinstance(act, torch.nn.SiLU) and type(act).__name__ != "SiLUActivation":
        return None
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    if hasattr(module, "gate_up_proj"):

        def forward(x: torch.Tensor) -> Any:
            gate, up = module.gate_up_proj(x).chunk(2, -1)
            return module.down_proj(LigerSiLUMulFunction.apply(gate, up))

    elif hasattr(module, "gate_proj"):

        def forward(x: torch.Tensor) -> Any:
            gate, up = module.gate_proj(x), module.up_proj(x)
            return module.down_proj(LigerSiLUMulFunction.apply(gate, up))

    else:
        return None
    return forward
