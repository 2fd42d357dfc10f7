"""Checkpoint import: the original's logits and ids, from any layout of files, in one step."""

from __future__ import annotations

import json
import shutil
import threading
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from milm_ray import samples
from milm_ray.errors import UserError
from milm_ray.models import chat_format, checkpoint
from milm_ray.models.checkpoint import architecture, prepare_base
from milm_ray.models.sentencepiece_fast import fast_tokenizer

TINY = Path(samples.__path__[0]) / "models"
VOCAB, HIDDEN, INNER, LAYERS, HEADS = 320, 48, 80, 3, 4


def original_logits(state: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Baichuan2-7B's forward pass in plain torch, from its W_pack and NormHead weights (fp32)."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    length, width = ids.shape[0], HIDDEN // HEADS
    frequency = 1.0 / 10000 ** (torch.arange(0, width, 2).float() / width)
    angle = torch.outer(torch.arange(length).float(), frequency)
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotate(x: torch.Tensor) -> torch.Tensor:  # [heads, length, width], halves are the pairs
        pairs = torch.complex(x[..., : width // 2], x[..., width // 2 :]) * turn
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    hidden = state["model.embed_tokens.weight"][ids]
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        x = norm(hidden, state[name + "input_layernorm.weight"])
        packed = x @ state[name + "self_attn.W_pack.weight"].T
        q, k, v = packed.view(length, 3, HEADS, width).permute(1, 2, 0, 3)
        scores = rotate(q) @ rotate(k).transpose(1, 2) / width**0.5
        future = torch.ones(length, length).triu(1).bool()
        mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        joined = mixed.transpose(0, 1).reshape(length, HIDDEN)
        hidden = hidden + joined @ state[name + "self_attn.o_proj.weight"].T
        x = norm(hidden, state[name + "post_attention_layernorm.weight"])
        gate = functional.silu(x @ state[name + "mlp.gate_proj.weight"].T)
        up = x @ state[name + "mlp.up_proj.weight"].T
        hidden = hidden + (gate * up) @ state[name + "mlp.down_proj.weight"].T
    hidden = norm(hidden, state["model.norm.weight"])
    head = state["lm_head.weight"]
    return hidden @ (head / head.pow(2).sum(dim=1, keepdim=True).sqrt()).T


def random_state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    state = {
        "model.embed_tokens.weight": random(VOCAB, HIDDEN),
        "lm_head.weight": random(VOCAB, HIDDEN) * 3,
        "model.norm.weight": 1 + random(HIDDEN),
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        state |= {
            name + "self_attn.W_pack.weight": random(3 * HIDDEN, HIDDEN),
            name + "self_attn.o_proj.weight": random(HIDDEN, HIDDEN),
            name + "self_attn.rotary_emb.inv_freq": random(HIDDEN // HEADS // 2),
            name + "mlp.gate_proj.weight": random(INNER, HIDDEN),
            name + "mlp.up_proj.weight": random(INNER, HIDDEN),
            name + "mlp.down_proj.weight": random(HIDDEN, INNER),
            name + "input_layernorm.weight": 1 + random(HIDDEN),
            name + "post_attention_layernorm.weight": 1 + random(HIDDEN),
        }
    return state


def write_original(
    directory: Path, state: dict[str, torch.Tensor], shards: int = 1, safetensors: bool = False
) -> Path:
    """A Baichuan2 checkpoint of random weights with the tiny model's tokenizer."""
    from safetensors.torch import save_file

    directory.mkdir()
    config = json.loads((TINY / "tiny-baichuan2" / "config.json").read_text())
    config |= {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "rms_norm_eps": 1e-6,
        "torch_dtype": str(state["lm_head.weight"].dtype).removeprefix("torch."),
    }
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = TINY / "tiny-baichuan2" / "tokenizer.model"
    (directory / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    names = sorted(state)
    weight_map = {}
    for shard in range(shards):
        part = {name: state[name] for name in names[shard::shards]}
        number = f"{shard + 1:05d}-of-{shards:05d}"
        if safetensors:
            file = f"model-{number}.safetensors"
            save_file(part, directory / file)
        else:
            file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{number}.bin"
            torch.save(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = "model.safetensors" if safetensors else "pytorch_model.bin"
        content = {"metadata": {}, "weight_map": weight_map}
        (directory / f"{index}.index.json").write_text(json.dumps(content))
    return directory


def logits_of(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0]


@pytest.mark.parametrize(("shards", "safetensors"), [(1, False), (3, False), (2, True)])
def test_import_keeps_the_originals_logits(tmp_path: Path, shards: int, safetensors: bool) -> None:
    state = random_state()
    source = write_original(tmp_path / "source", state, shards, safetensors)
    base = prepare_base(source, out_dir=tmp_path / "bases")
    ids = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(1))
    expected = original_logits(state, ids)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits_of(base, ids), expected, rtol=1e-5, atol=2e-5)


def test_import_keeps_bf16_within_its_rounding(tmp_path: Path) -> None:
    state = {name: tensor.to(torch.bfloat16) for name, tensor in random_state().items()}
    base = prepare_base(write_original(tmp_path / "source", state), out_dir=tmp_path / "bases")
    ids = torch.arange(40)
    expected = original_logits({name: t.float() for name, t in state.items()}, ids)
    got = logits_of(base, ids)
    # Only the normalised head is rounded again: half a unit of bf16's eight bits per weight.
    assert (got - expected).abs().max() < 2**-8 * expected.abs().max()
    assert json.loads((base / "config.json").read_text())["dtype"] == "bfloat16"


def test_tiny_baichuan_has_the_originals_layout_and_imports(tmp_path: Path) -> None:
    state = torch.load(TINY / "tiny-baichuan2" / "pytorch_model.bin", weights_only=True)
    packed = state["model.layers.0.self_attn.W_pack.weight"]
    assert packed.shape == (3 * packed.shape[1], packed.shape[1])
    base = prepare_base(TINY / "tiny-baichuan2", out_dir=tmp_path)
    config = json.loads((base / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in config


@pytest.mark.parametrize("name", ["baichuan2", "glm4", "llama3"])
def test_prepared_base_speaks_its_format(tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    base = prepare_base(TINY / f"tiny-{name}", out_dir=tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.chat_template == chat_format.template(name)
    stops = GenerationConfig.from_pretrained(base).eos_token_id
    assert tokenizer.convert_ids_to_tokens(stops) == chat_format.stop_tokens(name)
    size = sum(path.stat().st_size for path in (TINY / f"tiny-{name}").iterdir())
    assert size <= 12e6


CHINESE = st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF)
SPELLED = st.sampled_from(
    ["我", "的", "。", " ", "  ", "\n", "<reserved_106>", "12", "a", "▁", "😊"]
)
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")),
    st.text(CHINESE),
    st.lists(SPELLED).map("".join),
).filter(lambda text: not any(control in text for control in ("<unk>", "<s>", "</s>")))


@given(text=TEXTS)
@settings(max_examples=500, deadline=None)
def test_ids_equal_sentencepieces(text: str) -> None:
    assert _fast().encode(text).ids == _slow().encode(text)


def test_ids_equal_sentencepieces_on_dialogues() -> None:
    texts = _sample_texts()
    assert len(texts) > 100
    for text in texts:
        ids = _fast().encode(text).ids
        assert ids == _slow().encode(text)
        assert _fast().decode(ids) == text


@cache
def _fast() -> Any:
    return fast_tokenizer(TINY / "tiny-baichuan2" / "tokenizer.model")


@cache
def _slow() -> Any:
    import sentencepiece

    path = TINY / "tiny-baichuan2" / "tokenizer.model"
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize(("prefix", "strip"), [(False, True), (True, False), (True, True)])
def test_ids_equal_under_other_normalisers(
    tmp_path: Path, rule: str, prefix: bool, strip: bool
) -> None:
    import sentencepiece

    path = tmp_path / "tokenizer.model"
    with path.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_sample_texts()),
            model_writer=stream,
            model_type="bpe",
            vocab_size=1500,
            byte_fallback=True,
            normalization_rule_name=rule,
            add_dummy_prefix=prefix,
            remove_extra_whitespaces=strip,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
        )
    slow = sentencepiece.SentencePieceProcessor(model_file=str(path))
    fast = fast_tokenizer(path)

    @given(text=TEXTS)
    @settings(max_examples=100, deadline=None, derandomize=True)
    def equal(text: str) -> None:
        if strip:  # SentencePiece strips its own space sign at some places only
            text = text.replace("▁", "")
        # A text of nothing but dropped control characters gets a lone prefix there.
        text = "".join(letter for letter in text if unicodedata.category(letter) not in _DROPPED)
        assert fast.encode(text).ids == slow.encode(text)

    equal()


_DROPPED = ("Cc", "Cf", "Cn", "Co")


def _sample_texts() -> list[str]:
    return [
        turn["content"]
        for path in sorted((TINY.parent / "SmileChat").rglob("*.json"))
        for turn in json.loads(path.read_text(encoding="utf-8"))
    ]


def test_nothing_is_redone_until_the_source_changes(tmp_path: Path) -> None:
    source = write_original(tmp_path / "source", random_state())
    base = prepare_base(source, out_dir=tmp_path / "bases")
    weights = next(base.glob("*.safetensors"))
    made = weights.stat().st_ino
    assert prepare_base(source, out_dir=tmp_path / "bases") == base
    assert weights.stat().st_ino == made
    torch.save(random_state(seed=7), source / "pytorch_model.bin")
    prepare_base(source, out_dir=tmp_path / "bases")
    ids = torch.arange(8)
    expected = original_logits(random_state(seed=7), ids)
    torch.testing.assert_close(logits_of(base, ids), expected, rtol=1e-5, atol=2e-5)
    assert list((tmp_path / "bases").iterdir()) == [base]


def test_sizes_are_read_without_the_weights(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"hidden_size": 5}))
    for place in (source, source.as_uri()):
        assert architecture(place) == {"hidden_size": 5}
    with pytest.raises(UserError, match=r"holds no config\.json"):
        architecture(tmp_path)
    with pytest.raises(UserError, match="cannot copy"):
        architecture((tmp_path / "absent").as_uri())


def test_a_cloud_address_is_copied_and_followed(tmp_path: Path) -> None:
    source = write_original(tmp_path / "source", random_state())
    base = prepare_base(source.as_uri(), out_dir=tmp_path / "bases")
    assert base.parent == tmp_path / "bases"
    assert base.name.startswith("source-")
    torch.save(random_state(seed=7), source / "pytorch_model.bin")
    prepare_base(source.as_uri(), out_dir=tmp_path / "bases")
    ids = torch.arange(8)
    expected = original_logits(random_state(seed=7), ids)
    torch.testing.assert_close(logits_of(base, ids), expected, rtol=1e-5, atol=2e-5)
    with pytest.raises(UserError, match="cannot copy"):
        prepare_base((tmp_path / "absent").as_uri(), out_dir=tmp_path / "bases")


def test_every_base_has_a_directory_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases = tmp_path / "bases"

    def place(source: Any, revision: str | None = None, name: str | None = None) -> Path:
        return prepare_base(source, revision, bases, name)

    # One file name, two models.
    sources = []
    for seed, model in enumerate(("one", "two")):
        (tmp_path / model).mkdir()
        sources.append(write_original(tmp_path / model / "snapshot", random_state(seed)))
    local = [place(source) for source in sources]
    cloud = [place(source.as_uri()) for source in sources]
    ids = torch.arange(8)
    for base, seed in zip([*local, *cloud], [0, 1, 0, 1], strict=True):
        expected = original_logits(random_state(seed), ids)
        torch.testing.assert_close(logits_of(base, ids), expected, rtol=1e-5, atol=2e-5)
    # One repository, two revisions; the registry's own has the plain name.
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(sources[0]))
    pinned, other = place("baichuan2"), place("baichuan2", "main")
    assert pinned == bases / "baichuan2"
    assert other.name.startswith("baichuan2-")
    assert place("baichuan-inc/Baichuan2-7B-Chat") == pinned
    # However a directory is named, with the format that is its own anyway or without.
    monkeypatch.chdir(tmp_path)
    assert place("one/snapshot/", None, "baichuan2") == local[0]
    assert len({*local, *cloud, pinned, other}) == len(list(bases.glob("[!.]*"))) == 6


def test_a_failed_import_leaves_nothing(tmp_path: Path) -> None:
    state = random_state()
    state["model.layers.1.self_attn.W_pack.weight"] = torch.zeros(2 * HIDDEN, HIDDEN)
    source = write_original(tmp_path / "source", state)
    with pytest.raises(UserError, match="W_pack"):
        prepare_base(source, out_dir=tmp_path / "bases")
    assert list((tmp_path / "bases").iterdir()) == []


class Hub:
    """The hub's part of a download: copies what the patterns name into its cache, file by file."""

    def __init__(self, files: Path, cache: Path) -> None:
        self.files, self.cache = files, cache
        self.line_is_cut_after: str | None = None
        self.offline = False
        cache.mkdir()

    def snapshot_download(self, repository: str, revision: str, allow_patterns: list[str]) -> str:
        for path in sorted(self.files.iterdir(), key=lambda path: path.stat().st_size):
            if self.offline or not any(path.match(pattern) for pattern in allow_patterns):
                continue
            shutil.copyfile(path, self.cache / path.name)
            if path.name == self.line_is_cut_after:
                raise OSError("the line is cut")
        return str(self.cache)


@pytest.mark.parametrize("safetensors", [False, True])
def test_a_download_that_was_cut_off_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, safetensors: bool
) -> None:
    state = random_state()
    hub = Hub(write_original(tmp_path / "hub", state, 3, safetensors), tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    shards = sorted(hub.files.glob("*-of-*"), key=lambda path: path.stat().st_size)
    first, *others = (path.name for path in shards)

    def prepare() -> Path:
        return prepare_base("baichuan2", out_dir=tmp_path / "bases")

    hub.line_is_cut_after = first
    with pytest.raises(UserError, match="the line is cut"):
        prepare()
    # Without a network the hub's client gives what the cache holds.
    hub.offline = True
    with pytest.raises(UserError, match=f"lacks {', '.join(sorted(others))}, named in its"):
        prepare()
    assert not (tmp_path / "bases").exists()
    hub.line_is_cut_after, hub.offline = None, False
    ids = torch.arange(8)
    expected = original_logits(state, ids)
    torch.testing.assert_close(logits_of(prepare(), ids), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("cloud", [False, True])
def test_a_base_whose_index_names_an_absent_file_is_refused(tmp_path: Path, cloud: bool) -> None:
    from transformers import AutoModelForCausalLM

    source = tmp_path / "source"
    shutil.copytree(TINY / "tiny-llama3", source)
    model = AutoModelForCausalLM.from_pretrained(source)
    (source / "model.safetensors").unlink()
    model.save_pretrained(source, max_shard_size="4MB")
    shards = sorted(source.glob("model-*.safetensors"))
    assert len(shards) > 1
    whole = prepare_base(source, out_dir=tmp_path / "bases")
    # An index of the other layout, whose files nobody needs, says nothing.
    (source / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "absent.bin"}}')
    prepare_base(source, out_dir=tmp_path / "bases")
    shards[-1].unlink()
    with pytest.raises(UserError, match=f"lacks {shards[-1].name}, named in its model.safetensors"):
        prepare_base(source.as_uri() if cloud else source, out_dir=tmp_path / "bases")
    assert (whole / shards[-1].name).is_file()


def test_an_import_without_an_index_misses_no_tensor(tmp_path: Path) -> None:
    source = write_original(tmp_path / "source", random_state(), shards=3)
    (source / "pytorch_model.bin.index.json").unlink()
    prepare_base(source, out_dir=tmp_path / "whole")
    (source / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(UserError, match=r"hold no model\.embed_tokens\.weight, .* more"):
        prepare_base(source, out_dir=tmp_path / "bases")
    assert list((tmp_path / "bases").iterdir()) == []


def test_two_at_once_end_with_one_whole_base(tmp_path: Path) -> None:
    source = write_original(tmp_path / "source", random_state())
    errors: list[BaseException] = []

    def prepare() -> None:
        try:
            prepare_base(source, out_dir=tmp_path / "bases")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=prepare) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    (base,) = (tmp_path / "bases").iterdir()
    assert (base / checkpoint.MARKER).is_file()


def test_what_cannot_be_imported_is_said(tmp_path: Path) -> None:
    source = write_original(tmp_path / "source", random_state())
    config = json.loads((source / "config.json").read_text())
    alibi = {key: value for key, value in config.items() if key != "max_position_embeddings"}
    (source / "config.json").write_text(json.dumps(alibi))
    with pytest.raises(UserError, match="ALiBi"):
        prepare_base(source, out_dir=tmp_path / "bases")
    (source / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(UserError, match="chat format is not known"):
        prepare_base(source, out_dir=tmp_path / "bases")
    with pytest.raises(UserError, match=r"no config\.json"):
        prepare_base(tmp_path, out_dir=tmp_path / "bases")
    with pytest.raises(UserError, match=r"lacks <\|eot_id\|>"):
        prepare_base(TINY / "tiny-glm4", out_dir=tmp_path / "bases", chat_format="llama3")
