"""The training step, without Ray: a packed forward pass with logits at label places only.

The loss of an optimizer step is the sum of the token losses of all its samples divided by the
number of their label tokens. That is what transformers' Trainer computes for batch 1 x accumulation
8 (its num_items_in_batch), so packing changes the speed and not the gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from milm_ray.finetune.packing import Pack


class PackedLoss(nn.Module):
    """A causal language model whose output is the summed loss of a pack."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        places: Tensor,
        targets: Tensor,
        sample_lengths: tuple[int, ...],
    ) -> Tensor:
        """Sum of the cross entropies at `places` (shapes as in Pack), in fp32; scalar.

        A pack without labels gives a zero that still reaches every parameter.
        """
        kept = places if len(places) else input_ids.new_zeros(1)
        logits = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            logits_to_keep=kept,
            sample_lengths=sample_lengths,
            use_cache=False,
        ).logits[0]
        if not len(places):
            return logits.sum() * 0.0
        return F.cross_entropy(logits.float(), targets, reduction="sum")


def pack_loss(module: Any, pack: Pack, device: Any = None) -> Tensor:
    """Summed loss of a pack; module: a PackedLoss or an engine around one."""
    tensors = (pack.input_ids, pack.position_ids, pack.places, pack.targets)
    moved = tensors if device is None else tuple(t.to(device) for t in tensors)
    return module(*moved, pack.lengths)
