"""The tiny base models in their originals' checkpoint layouts, and the way from one to another."""

from __future__ import annotations

from typing import Any

from milm_ray.samples.tiny_tokenizers import VOCAB_SIZE

MAX_POSITIONS = 2048
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 256, 512, 4, 4, 2


def llama_model(kv_heads: int = KV_HEADS) -> Any:
    """A randomly initialised tiny Llama in fp32; seed torch before."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        max_position_embeddings=MAX_POSITIONS,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).float()
