"""The registry: the paper's three models, and a fourth by one entry and one chat format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from milm_ray.config import FinetuneSection, ModelSection
from milm_ray.errors import UserError
from milm_ray.job import main
from milm_ray.models import chat_format, registry
from milm_ray.models.checkpoint import prepare_base

CHATML = chat_format.ChatFormat(
    name="chatml",
    prefix="",
    system="<|im_start|>system\n{}<|im_end|>\n",
    user="<|im_start|>user\n{}<|im_end|>\n",
    header="<|im_start|>assistant\n",
    reply="{}<|im_end|>",
    reply_after="\n",
    eos="<|im_end|>",
    eos_in_text=True,
    stops=("<|im_end|>", "<|endoftext|>"),
    guards=("<|",),
)
QWEN = registry.BaseModel(
    name="qwen",
    hub_id="Qwen/Qwen2.5-7B-Instruct",
    revision="0123456",
    chat_format="chatml",
    model_type="qwen2",
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    licence="Apache-2.0",
    licence_url="https://www.apache.org/licenses/LICENSE-2.0",
)


@pytest.fixture
def fourth_model() -> Iterator[None]:
    chat_format.register(CHATML)
    registry.BASE_MODELS["qwen"] = QWEN
    yield
    del registry.BASE_MODELS["qwen"]
    del chat_format.FORMATS["chatml"]


def write_qwen(directory: Path) -> Path:
    """A random Qwen2 checkpoint with a byte tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen2Config, Qwen2ForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": "another",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.usefixtures("fourth_model")
def test_a_fourth_model_is_one_entry_and_one_format(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = prepare_base(write_qwen(tmp_path / "qwen-local"), out_dir=tmp_path / "bases")
    tokenizer = AutoTokenizer.from_pretrained(base)
    messages = [
        {"role": "system", "content": "你是咨询师。"},
        {"role": "user", "content": "我睡不好。"},
        {"role": "assistant", "content": "很辛苦。"},
        {"role": "user", "content": "是的。"},
        {"role": "assistant", "content": "说说看？"},
    ]
    text = chat_format.render("chatml", messages)
    assert text == (
        "<|im_start|>system\n你是咨询师。<|im_end|>\n<|im_start|>user\n我睡不好。<|im_end|>\n"
        "<|im_start|>assistant\n很辛苦。<|im_end|>\n<|im_start|>user\n是的。<|im_end|>\n"
        "<|im_start|>assistant\n说说看？<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    ids, labels = chat_format.encode_dialogue(tokenizer, "chatml", messages)
    assert tokenizer.decode(ids) == text
    spoken = tokenizer.decode([label for label in labels if label != -100])
    assert spoken == "很辛苦。<|im_end|>说说看？<|im_end|>"
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.generation_config.eos_token_id == [258, 256]


@pytest.mark.slow
@pytest.mark.usefixtures("fourth_model", "one_process")
def test_a_fourth_model_trains(tmp_path: Path) -> None:
    from milm_ray.finetune.bases import base_entry
    from milm_ray.finetune.train import Task, train

    source = write_qwen(tmp_path / "qwen-local")
    section = ModelSection(path=str(source), chat_format="chatml")
    assert base_entry("my-qwen", section) is QWEN
    base = prepare_base(source, out_dir=tmp_path / "bases")
    settings = FinetuneSection(learning_rate=0.02, epochs=6, precision="fp32", logging_steps=1)
    task = Task("qwen", str(base), "qwen", "chatml", QWEN.lora_targets, settings, seed=1)
    turns = [
        {"role": "client", "content": "我睡不好。"},
        {"role": "counselor", "content": "很辛苦。"},
    ]
    rows = [{"dialogue_id": str(number), "turns": turns} for number in range(4)]

    def save(step, write):
        write(tmp_path / "out")

    log = train(task, rows, rank=0, workers=1, save=save, say=lambda text: None)["log"]
    assert log[-1]["loss"] < log[0]["loss"] - 0.05
    saved = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert sorted(saved["target_modules"]) == sorted(QWEN.lora_targets)


@pytest.mark.usefixtures("fourth_model")
def test_a_job_takes_the_fourth_models_format_and_refuses_an_unknown_one(tmp_path: Path) -> None:
    from milm_ray.finetune.launch import STAGE

    config = tmp_path / "qwen.yaml"
    model = "models: {qwen: {hub_id: Qwen/Qwen2.5-7B-Instruct, revision: abc, chat_format: chatml}}"
    config.write_text(f"workspace: {tmp_path}/runs\n{model}\n")
    arguments = ["--config", str(config), "--dry-run"]
    assert main("", [STAGE], arguments) == 0
    assert main("", [STAGE], [*arguments, "models.qwen.chat_format=alpaca"]) == 2
    assert not (tmp_path / "runs").exists()


def test_the_papers_models_carry_their_duties() -> None:
    assert set(registry.BASE_MODELS) == {"baichuan2", "glm4", "llama3"}
    for entry in registry.BASE_MODELS.values():
        assert chat_format.get(entry.chat_format).stops
        assert entry.licence
        assert entry.notice
        assert "lm_head" not in entry.lora_targets
        assert entry.revision
    assert registry.get("llama3").revision == "v2"
    assert registry.adapter_name(registry.get("glm4")).startswith("glm-4")
    assert registry.get("glm4").notice == "Built with glm-4"
    with pytest.raises(UserError, match="use one of: baichuan2, glm4, llama3"):
        registry.get("gpt")
