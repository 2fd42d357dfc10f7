"""The tiny base models in their originals' checkpoint layouts, and the way from one to another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milm_ray.samples import tiny_tokenizers
from milm_ray.samples.tiny_tokenizers import VOCAB_SIZE

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]

MAX_POSITIONS = 2048
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 192, 512, 4, 6, 2
HEAD_DIM = HIDDEN // HEADS
ROPE_THETA = 10000.0
NORM_EPS = 1e-5

# Which of the trunk's tokens a special token of another format takes its first embedding from.
_SPECIAL_FROM = {
    "<|endoftext|>": "<|eot_id|>",
    "</s>": "<|eot_id|>",
    "[gMASK]": "<|begin_of_text|>",
    "<sop>": "<|begin_of_text|>",
    "<|user|>": "<|start_header_id|>",
    "<|assistant|>": "<|start_header_id|>",
    "<reserved_106>": "<|start_header_id|>",
    "<reserved_107>": "<|end_header_id|>",
}


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
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        rms_norm_eps=NORM_EPS,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).float()


def glm_from_llama(trunk: State, rows: list[list[int]]) -> Any:
    """A tiny Glm that starts from a Llama's weights.

    rows: for each of the new vocabulary's tokens the trunk tokens whose embeddings it averages.
    Glm turns only half of each head's dimensions, at every second of Llama's frequencies: those
    pairs keep their meaning, the others lose their rotation.
    """
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    config = GlmConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        attention_bias=True,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": ROPE_THETA,
            "partial_rotary_factor": 0.5,
        },
        rms_norm_eps=NORM_EPS,
        tie_word_embeddings=False,
        pad_token_id=None,
    )
    model = GlmForCausalLM(config).float()
    state = _with_vocabulary(trunk, rows)
    half = HEAD_DIM // 2
    turned = [dim for pair in range(0, half, 2) for dim in (pair, pair + half)]
    still = [dim for pair in range(1, half, 2) for dim in (pair, pair + half)]
    for layer in range(LAYERS):
        attention = f"model.layers.{layer}.self_attn"
        mlp = f"model.layers.{layer}.mlp"
        for part in ("q", "k"):
            heads = state[f"{attention}.{part}_proj.weight"].view(-1, HEAD_DIM, HIDDEN)
            state[f"{attention}.{part}_proj.weight"] = heads[:, turned + still].flatten(0, 1)
        for part in ("q", "k", "v"):
            width = state[f"{attention}.{part}_proj.weight"].shape[0]
            state[f"{attention}.{part}_proj.bias"] = torch.zeros(width)
        gate, up = (state.pop(f"{mlp}.{part}_proj.weight") for part in ("gate", "up"))
        state[f"{mlp}.gate_up_proj.weight"] = torch.cat([gate, up])
    model.load_state_dict(state)
    return model


def norm_head_llama_from_llama(trunk: State, rows: list[list[int]]) -> Any:
    """A tiny Llama without grouped heads and with Baichuan2's NormHead, from a Llama's weights.

    It trains as a Llama; baichuan_state() brings it into Baichuan2's layout. The mean length of the
    head's rows moves into the last norm; their differences are lost.
    """
    from torch import nn
    from torch.nn import functional

    class NormHead(nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return functional.linear(hidden, functional.normalize(self.weight))

    model = llama_model(kv_heads=HEADS)
    model.lm_head = NormHead(HIDDEN, VOCAB_SIZE, bias=False)
    state = _with_vocabulary(trunk, rows)
    lengths = state["lm_head.weight"].norm(dim=1)
    state["model.norm.weight"] = state["model.norm.weight"] * lengths.mean()
    for layer in range(LAYERS):
        for part in ("k", "v"):
            name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
            heads = state[name].view(KV_HEADS, HEAD_DIM, HIDDEN)
            state[name] = heads.repeat_interleave(HEADS // KV_HEADS, dim=0).flatten(0, 1)
    model.load_state_dict(state)
    return model


def baichuan_state(state: State) -> State:
    """Weights of norm_head_llama in Baichuan2's layout: q, k and v stacked as W_pack."""
    import torch

    packed = dict(state)
    for layer in range(LAYERS):
        attention = f"model.layers.{layer}.self_attn"
        parts = [packed.pop(f"{attention}.{part}_proj.weight") for part in ("q", "k", "v")]
        packed[f"{attention}.W_pack.weight"] = torch.cat(parts)
    return packed


def _with_vocabulary(trunk: State, rows: list[list[int]]) -> State:
    """The trunk's weights with embedding and head rows averaged as `rows` says."""
    import torch

    state = {name: tensor.clone() for name, tensor in trunk.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.stack([trunk[name][sources].mean(dim=0) for sources in rows])
    return state


def glm_rows(trunk_tokenizer: Any, tokenizer: Any) -> list[list[int]]:
    """Trunk tokens behind each tiny-glm4 token: the merges are shared, specials are matched."""
    rows = []
    for index in range(VOCAB_SIZE):
        token = tokenizer.id_to_token(index)
        if index >= tiny_tokenizers.BYTE_LEVEL_SIZE:
            token = _SPECIAL_FROM.get(token, "<|reserved_special_token_0|>")
        rows.append([trunk_tokenizer.token_to_id(token)])
    return rows


def sentencepiece_rows(trunk_tokenizer: Any, processor: Any) -> list[list[int]]:
    """Trunk tokens behind each SentencePiece piece: those that spell its text."""
    spare = trunk_tokenizer.token_to_id("<|reserved_special_token_0|>")
    byte_alphabet = _byte_alphabet()
    rows = []
    for index in range(VOCAB_SIZE):
        piece = processor.id_to_piece(index)
        if piece in _SPECIAL_FROM:
            rows.append([trunk_tokenizer.token_to_id(_SPECIAL_FROM[piece])])
        elif processor.is_byte(index):
            rows.append([trunk_tokenizer.token_to_id(byte_alphabet[int(piece[1:-1], 16)])])
        elif processor.is_control(index) or processor.is_unknown(index) or "<reserved" in piece:
            rows.append([spare])
        else:
            text = piece.replace("▁", " ")
            rows.append(trunk_tokenizer.encode(text, add_special_tokens=False).ids)
    return rows


def _byte_alphabet() -> list[str]:
    """The printable character by which byte-level BPE writes each byte (GPT-2's table)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(moved)) for byte in range(256)]


def save_llama(model: Any, tokenizer: Any, directory: Path) -> None:
    """tiny-llama3: weights, byte-level tokenizer.json, configs, as the hub's Llama-3."""
    ids = {name: tokenizer.token_to_id(name) for name in ("<|begin_of_text|>", "<|eot_id|>")}
    bos, eos = ids["<|begin_of_text|>"], ids["<|eot_id|>"]
    stops = [eos, tokenizer.token_to_id("<|end_of_text|>")]
    model.config.bos_token_id, model.config.eos_token_id = bos, stops
    generation = {"bos_token_id": bos, "eos_token_id": stops}
    _save_native(model, tokenizer, directory, generation)
    _write_json(
        directory / "tokenizer_config.json",
        {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": MAX_POSITIONS,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def save_glm(model: Any, tokenizer: Any, directory: Path) -> None:
    """tiny-glm4: weights, byte-level tokenizer.json, configs, as the hub's glm-4-9b-chat-hf."""
    stops = [
        tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|user|>", "<|observation|>")
    ]
    model.config.eos_token_id, model.config.pad_token_id = stops, stops[0]
    _save_native(model, tokenizer, directory, {"eos_token_id": stops, "pad_token_id": stops[0]})
    _write_json(
        directory / "tokenizer_config.json",
        {
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": MAX_POSITIONS,
            "padding_side": "left",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def save_baichuan(model: Any, sentencepiece_model: bytes, directory: Path) -> None:
    """tiny-baichuan2: pytorch_model.bin, tokenizer.model and configs, as the hub's 7B.

    The config names the original's remote classes, which are not shipped: only the import reads it.
    """
    import torch

    directory.mkdir(parents=True, exist_ok=True)
    state = baichuan_state(model.state_dict())
    torch.save(
        {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items()},
        directory / "pytorch_model.bin",
    )
    (directory / "tokenizer.model").write_bytes(sentencepiece_model)
    _write_json(
        directory / "config.json",
        {
            "architectures": ["BaichuanForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_baichuan.BaichuanConfig",
                "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
            },
            "tokenizer_class": "BaichuanTokenizer",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "hidden_act": "silu",
            "hidden_size": HIDDEN,
            "initializer_range": 0.02,
            "intermediate_size": INTERMEDIATE,
            "max_position_embeddings": MAX_POSITIONS,
            "model_max_length": MAX_POSITIONS,
            "model_type": "baichuan",
            "num_attention_heads": HEADS,
            "num_hidden_layers": LAYERS,
            "rms_norm_eps": NORM_EPS,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": VOCAB_SIZE,
            "z_loss_weight": 0,
        },
    )
    _write_json(
        directory / "generation_config.json",
        {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "user_token_id": 195,
            "assistant_token_id": 196,
        },
    )
    _write_json(
        directory / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_eos_token": False,
            "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<unk>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": MAX_POSITIONS,
            "tokenizer_class": "BaichuanTokenizer",
            "use_fast": False,
        },
    )


def _save_native(
    model: Any, tokenizer: Any, directory: Path, generation: dict[str, int | list[int]]
) -> None:
    """Weights in bf16 safetensors, config.json, generation_config.json, tokenizer.json."""
    import copy

    import torch

    directory.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)
    _write_json(directory / "generation_config.json", {"_from_model_config": False, **generation})
    tokenizer.save(str(directory / "tokenizer.json"))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
