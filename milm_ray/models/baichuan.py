"""Baichuan2-7B in the Llama layout.

The 7B is a Llama with two twists: q, k and v are stacked in one matrix (W_pack), and the head's
rows are brought to length one before use (NormHead). Splitting the one and normalising the other
once, in fp32, gives the same logits without the repository's own code. The 13B has ALiBi instead
of rotary positions and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milm_ray.errors import UserError
from milm_ray.models.sentencepiece_fast import fast_tokenizer

if TYPE_CHECKING:
    import torch

_ROPE_THETA = 10000.0  # fixed in the original's modeling code, absent from its config
_MAX_TOKENS_KEY = "max_position_embeddings"


def convert(source: Path, target: Path, config: dict[str, Any]) -> None:
    """Write config, weights and fast tokenizer of a Baichuan2-7B checkpoint in the Llama layout.

    One weight file is in memory at a time; each becomes one safetensors file of the same dtype.
    """
    if _MAX_TOKENS_KEY not in config:
        raise UserError(
            f"{source} is a Baichuan2 with ALiBi positions (13B), which has no Llama layout",
            "use Baichuan2-7B-Chat",
        )
    _write_config(target, config)
    _convert_weights(source, target, norm_head="z_loss_weight" in config)
    _convert_tokenizer(source, target)


def llama_tensors(name: str, tensor: torch.Tensor, norm_head: bool) -> dict[str, torch.Tensor]:
    """One original tensor as the Llama layout's. norm_head: the head is Baichuan2's NormHead."""
    from torch.nn import functional

    if name.endswith("rotary_emb.inv_freq"):
        return {}
    if name.endswith("self_attn.W_pack.weight"):
        if tensor.shape[0] != 3 * tensor.shape[1]:
            raise UserError(
                f"{name} has shape {tuple(tensor.shape)}, not [3 x hidden, hidden]",
                "use Baichuan2-7B-Chat's own weights",
            )
        stem = name.removesuffix("W_pack.weight")
        parts = zip("qkv", tensor.chunk(3, dim=0), strict=True)
        return {f"{stem}{letter}_proj.weight": part.clone() for letter, part in parts}
    if name == "lm_head.weight" and norm_head:
        return {name: functional.normalize(tensor.float(), dim=1).to(tensor.dtype)}
    return {name: tensor.contiguous()}


def _convert_weights(source: Path, target: Path, norm_head: bool) -> None:
    from safetensors.torch import save_file

    files = list(_weight_files(source))
    weight_map: dict[str, str] = {}
    total = 0
    for number, path in enumerate(files, start=1):
        converted: dict[str, torch.Tensor] = {}
        for name, tensor in _read_shard(path):
            converted |= llama_tensors(name, tensor, norm_head)
        shard = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(converted, target / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(converted, shard)
        total += sum(tensor.nbytes for tensor in converted.values())
    missing = sorted(_tensor_names(target) - weight_map.keys())
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"the weight files of {source} hold no {', '.join(missing[:3])}{more}",
            "give a complete checkpoint",
        )
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _tensor_names(directory: Path) -> set[str]:
    """Every tensor that a Llama of the directory's config.json loads; those that it does not find
    in the weights it fills with random values."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return set(LlamaForCausalLM(LlamaConfig.from_pretrained(directory)).state_dict())


def _weight_files(source: Path) -> Iterator[Path]:
    """The weight files of a checkpoint, safetensors before .bin, in the order of their names."""
    for pattern in ("*.safetensors", "*.bin"):
        found = sorted(source.glob(pattern))
        if found:
            yield from found
            return
    raise UserError(f"{source} holds no weights", "give a complete checkpoint")


def _read_shard(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of one weight file, without running code from it."""
    import torch

    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, tensors.get_tensor(name)
    else:
        yield from torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()


def _write_config(target: Path, config: dict[str, Any]) -> None:
    from transformers import LlamaConfig

    taken = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "initializer_range",
        "rms_norm_eps",
        "max_position_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    llama = LlamaConfig(
        **{key: config[key] for key in taken if key in config},
        num_key_value_heads=config["num_attention_heads"],
        rope_parameters={"rope_type": "default", "rope_theta": _ROPE_THETA},
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype=config.get("torch_dtype", "bfloat16"),
    )
    llama.save_pretrained(target)


def _convert_tokenizer(source: Path, target: Path) -> None:
    tokenizer = fast_tokenizer(source / "tokenizer.model")
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    generation = source / "generation_config.json"
    if generation.is_file():
        content = json.loads(generation.read_text(encoding="utf-8"))
        for key in ("user_token_id", "assistant_token_id"):
            content.pop(key, None)
        (target / generation.name).write_text(json.dumps(content, indent=2) + "\n")
