"""The training step, without Ray: a packed forward pass, and the loss where a label is.

The loss of an optimizer step is the sum of the token losses of all its samples divided by the
number of their label tokens. That is what transformers' Trainer computes for batch 1 x accumulation
8 (its num_items_in_batch), so packing changes the speed and not the gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from milm_ray.finetune.last_layer import keep_label_places

if TYPE_CHECKING:
    from milm_ray.finetune.packing import Pack

# Label places per pass through the head: bounds its memory to so many rows of the vocabulary.
HEAD_ROWS = 1024


class PackedLoss(nn.Module):
    """A causal language model whose output is the summed loss of a pack.

    model: a PEFT model of a transformers decoder whose head is a frozen linear layer without bias.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        head = model.get_output_embeddings()
        if head.bias is not None or head.weight.requires_grad:
            raise TypeError("the head must be a frozen linear layer without bias")
        self._ends_at_places = keep_label_places(model.get_base_model().model)

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
        tuned: Any = self.model
        causal = tuned.get_base_model()
        labelled = len(places) > 0
        if not labelled:
            places = places.new_zeros(1)
        ends = {"places": places} if self._ends_at_places else {}
        hidden = causal.model(
            input_ids=input_ids,
            position_ids=position_ids,
            sample_lengths=sample_lengths,
            use_cache=False,
            **ends,
        ).last_hidden_state[0]
        # Where ZeRO 3 has divided the weight, reading it here gathers it until the pass is over: by
        # all workers, those without labels too, or the others would wait for them.
        weight = causal.lm_head.weight
        if not labelled:
            return hidden.float().sum() * 0.0
        if not ends:
            hidden = hidden[places]
        return FrozenHeadLoss.apply(hidden, weight, targets)


class FrozenHeadLoss(Function):
    """Summed cross entropy of a frozen head, its gradient worked out in the forward pass.

    hidden: [N, h]; weight: [V, h]; targets: [N]. As the head is not trained, the gradient by the
    hidden states is all that the backward pass needs, so no logits outlive their chunk.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            logits = (hidden[rows] @ weight.T).float()
            chosen = targets[rows, None]
            logits.sub_(logits.amax(1, keepdim=True))
            total -= logits.gather(1, chosen).sum()
            sums = logits.exp_().sum(1, keepdim=True)
            total += sums.log().sum()
            if not ctx.needs_input_grad[0]:
                continue
            residual = logits.div_(sums)
            residual.scatter_add_(1, chosen, torch.full_like(sums, -1.0))
            gradient[rows] = residual.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None


def pack_loss(module: Any, pack: Pack, device: Any = None) -> Tensor:
    """Summed loss of a pack; module: a PackedLoss or an engine around one."""
    tensors = (pack.input_ids, pack.position_ids, pack.places, pack.targets)
    moved = tensors if device is None else tuple(t.to(device) for t in tensors)
    return module(*moved, pack.lengths)
