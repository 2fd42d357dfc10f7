"""The last decoder layer's MLP where a label is, and nowhere else.

After its attention no place hears of another, and only a place with a label reaches the loss. With
half of the tokens labelled that is half an MLP: a twelfth of the work on a model of four layers, a
hundredth on one of 8B.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

# Model types of transformers whose layer is norm, attention, norm, MLP, each half added as it is.
_PLAIN = ("llama", "glm", "qwen2", "qwen3", "mistral")


def keep_label_places(model: Any) -> bool:
    """Let a transformers decoder (without its head) give the hidden states of label places only.

    Its forward pass then takes `places`, long [N], and its last hidden state is [1, N, h]; without
    them it is as before. False where the layer is of another form than Llama's.
    """
    if model.config.model_type not in _PLAIN:
        return False
    layer = model.layers[-1]

    def forward(hidden_states: Tensor, places: Tensor | None = None, **kwargs: Any) -> Tensor:
        mixed, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + mixed
        if places is not None:
            hidden_states = hidden_states[:, places]
        return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))

    layer.forward = forward
    return True
