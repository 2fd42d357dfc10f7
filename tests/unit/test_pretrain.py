"""The tiny models' pre-training: what is read, what is predicted, and the ways between layouts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from milm_ray import samples
from milm_ray.samples import pretrain, tiny_layouts

SAMPLES = Path(samples.__path__[0])


def write_dialogue(folder: Path, name: str, turns: list[tuple[str, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = [{"role": role, "content": content, "annotation": []} for role, content in turns]
    (folder / name).write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")


def test_reading_joins_neighbours_and_splits_by_name(tmp_path: Path) -> None:
    for number in range(300):
        write_dialogue(
            tmp_path / "data",
            f"{number}.json",
            [
                ("counselor", "先说的"),
                ("client", f"问{number}"),
                ("client", "再问"),
                ("counselor", "答"),
            ],
        )
    training, held_out = pretrain.read_smilechat(tmp_path)
    assert len(training) + len(held_out) == 300
    assert 0 < len(held_out) < 15
    assert training == pretrain.read_smilechat(tmp_path)[0]
    first = training[0]
    assert [turn["role"] for turn in first] == ["user", "assistant"]
    assert first[0]["content"].endswith("\n再问")


class Letters:
    """A tokenizer of one id per character."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [ord(letter) for letter in text]

    def convert_tokens_to_ids(self, token: str) -> int:
        return 7


def test_every_token_is_predicted_and_the_end_before_the_next_turn() -> None:
    dialogue = [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e"},
    ]
    ids, targets = pretrain.encode(Letters(), "tiny-glm4", dialogue)
    changed = [i for i, (a, b) in enumerate(zip(ids, targets, strict=True)) if a != b]
    text = "[gMASK]<sop><|user|>\nab<|assistant|>\nc"
    assert changed == [len(text)]  # the second <|user|> begins where the first reply ends
    assert targets[len(text)] == 7
    assert ids[-1] == 7
    phase = pretrain.Phase(steps=2, batch=2, length=16, start=0, decay=False)
    batches = pretrain.blocks(Letters(), "tiny-glm4", [dialogue], phase)
    stream = (ids * 3, targets * 3)
    for number in range(2):
        inputs, wanted = next(batches)
        begin = number * 32
        assert inputs.flatten().tolist() == stream[0][begin : begin + 32]
        assert wanted.flatten().tolist() == stream[1][begin + 1 : begin + 33]


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_muon_steps_along_an_orthogonal_matrix(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    param = torch.zeros(shape, requires_grad=True)
    param.grad = torch.randn(shape) @ torch.diag(torch.linspace(0.5, 3, shape[1]))
    pretrain.Muon([param]).step(lr=1.0)
    scale = math.sqrt(max(1.0, shape[0] / shape[1]))
    singular = torch.linalg.svdvals(param.detach()) / scale
    assert singular.min() > 0.5
    assert singular.max() < 1.3
    assert (param.detach() * param.grad).sum() < 0


@pytest.fixture(scope="module")
def trunk() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return tiny_layouts.llama_model().state_dict()


IDENTITY = [[index] for index in range(tiny_layouts.VOCAB_SIZE)]


@torch.no_grad()
def test_baichuan_starts_as_the_trunk(trunk: dict[str, torch.Tensor]) -> None:
    llama = tiny_layouts.llama_model()
    llama.load_state_dict(trunk)
    model = tiny_layouts.norm_head_llama_from_llama(trunk, IDENTITY)
    ids = torch.randint(0, 4000, (1, 50))
    scale = model.model.norm.weight / llama.model.norm.weight
    hidden = model.model(ids).last_hidden_state / scale
    torch.testing.assert_close(hidden, llama.model(ids).last_hidden_state, rtol=1e-4, atol=1e-5)
    packed = tiny_layouts.baichuan_state(model.state_dict())
    attention = "model.layers.0.self_attn"
    hidden_size = tiny_layouts.HIDDEN
    assert packed[f"{attention}.W_pack.weight"].shape == (3 * hidden_size, hidden_size)
    assert f"{attention}.q_proj.weight" not in packed


@torch.no_grad()
def test_glm_starts_as_the_trunk_where_nothing_turns(trunk: dict[str, torch.Tensor]) -> None:
    llama = tiny_layouts.llama_model()
    llama.load_state_dict(trunk)
    glm = tiny_layouts.glm_from_llama(trunk, IDENTITY)
    ids = torch.randint(0, 4000, (1, 50))
    everywhere_zero = torch.zeros(1, 50, dtype=torch.long)
    same = {"input_ids": ids, "position_ids": everywhere_zero}
    torch.testing.assert_close(glm(**same).logits, llama(**same).logits, rtol=1e-4, atol=1e-5)


def test_the_script_makes_three_models_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    phase = pretrain.Phase(steps=1, batch=1, length=64, start=0, decay=True)
    monkeypatch.setattr(pretrain, "TRUNK", phase)
    monkeypatch.setattr(pretrain, "BRANCHES", dict.fromkeys(pretrain.BRANCHES, phase))
    monkeypatch.setattr(pretrain, "HELD_OUT_SHARE", 10)
    monkeypatch.setattr(pretrain, "EVALUATED", 2)
    work = tmp_path / "work"
    work.mkdir()
    models = SAMPLES / "models"
    # The shipped tokenizers: the sample dialogues are too few to train a vocabulary of 4,800.
    trained = json.loads((models / "tiny-llama3" / "tokenizer.json").read_text(encoding="utf-8"))
    trained |= {"added_tokens": [], "post_processor": None}
    (work / "byte_level.json").write_text(json.dumps(trained), encoding="utf-8")
    pieces = (models / "tiny-baichuan2" / "tokenizer.model").read_bytes()
    (work / "tokenizer.model").write_bytes(pieces)
    arguments = ["--corpus", str(SAMPLES / "SmileChat"), "--out", str(tmp_path / "out")]
    arguments += ["--work", str(work), "--eager"]
    pretrain.main(arguments)
    for name in pretrain.BRANCHES:
        made, shipped = tmp_path / "out" / name, models / name
        assert {path.name for path in made.iterdir()} == {path.name for path in shipped.iterdir()}
        for file in ("chat_template.jinja", "generation_config.json", "tokenizer_config.json"):
            assert (made / file).read_text() == (shipped / file).read_text()
        figures = json.loads((made / pretrain.FIGURES).read_text())
        assert figures["perplexity_per_token"] > 1000  # hardly trained, near the vocabulary's size
    capsys.readouterr()
    pretrain.main([*arguments, "--model", "tiny-glm4"])
    assert "step" not in capsys.readouterr().out
