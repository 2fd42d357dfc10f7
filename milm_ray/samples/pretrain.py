"""Pre-train the tiny base models of the quickstart on SmileChat (CC0).

    python -m milm_ray.samples.pretrain --corpus smile-data.tar.xz --out DIR [--model NAME]

The three share most of their training: a trunk in the Llama layout is trained at a constant
learning rate; each model starts from its weights (embeddings matched by token text, matrices
brought into the model's layout) and is trained further, in its own chat format, while the learning
rate falls to zero. Every token carries loss. One core, fp32, seeded; an interrupted run goes on
from its last checkpoint under --work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milm_ray.models import chat_format
from milm_ray.samples import tiny_layouts, tiny_tokenizers

if TYPE_CHECKING:
    import torch

Dialogue = list[dict[str, str]]

SEED = 20240524
TOKENIZER_DIALOGUES = 6000
HELD_OUT_SHARE = 100  # one dialogue in so many
EVALUATED = 200
FIGURES = "pretraining.json"


@dataclass(frozen=True)
class Phase:
    """A stretch of training: steps of batch x length tokens, over dialogues from `start` on.

    decay: the learning rate falls linearly to zero over the phase; otherwise it stays constant.
    """

    steps: int
    batch: int
    length: int
    start: int
    decay: bool
    warmup: int = 30
    muon_lr: float = 0.02
    adam_lr: float = 0.004


TRUNK = Phase(steps=900, batch=16, length=256, start=0, decay=False)
BRANCHES = {
    "tiny-llama3": Phase(steps=180, batch=4, length=1024, start=9000, decay=True),
    "tiny-glm4": Phase(steps=200, batch=4, length=1024, start=9000, decay=True),
    "tiny-baichuan2": Phase(steps=130, batch=4, length=1024, start=9000, decay=True),
}
FORMAT = {"tiny-llama3": "llama3", "tiny-glm4": "glm4", "tiny-baichuan2": "baichuan2"}


def read_smilechat(corpus: Path) -> tuple[list[Dialogue], list[Dialogue]]:
    """(training, held-out) dialogues of a SmileChat archive or folder, training ones shuffled.

    The client opens and rounds alternate: neighbours of one role are joined by a newline. A
    dialogue is held out by its file name's hash.
    """
    roles = {"client": "user", "counselor": "assistant"}
    train: list[Dialogue] = []
    held_out: list[Dialogue] = []
    for name, raw in sorted(_json_files(corpus)):
        messages: Dialogue = []
        for turn in json.loads(raw):
            role, content = roles[turn["role"]], turn["content"]
            if messages and messages[-1]["role"] == role:
                messages[-1]["content"] += "\n" + content
            elif messages or role == "user":
                messages.append({"role": role, "content": content})
        digest = int(hashlib.sha256(name.encode()).hexdigest(), 16)
        (held_out if digest % HELD_OUT_SHARE == 0 else train).append(messages)
    random.Random(SEED).shuffle(train)
    return train, held_out


def _json_files(corpus: Path) -> Iterator[tuple[str, bytes]]:
    if corpus.is_dir():
        for path in corpus.rglob("*.json"):
            yield path.name, path.read_bytes()
        return
    with tarfile.open(corpus) as archive:
        for member in archive:
            if member.name.endswith(".json") and (stream := archive.extractfile(member)):
                yield Path(member.name).name, stream.read()


def encode(tokenizer: Any, model: str, dialogue: Dialogue) -> tuple[list[int], list[int]]:
    """Ids and targets of a dialogue with loss on every token, the client's included."""
    input_ids, labels = chat_format.encode_dialogue(tokenizer, FORMAT[model], dialogue)
    ignore = chat_format.IGNORE_INDEX
    return input_ids, [b if b != ignore else a for a, b in zip(input_ids, labels, strict=True)]


def blocks(
    tokenizer: Any, model: str, dialogues: list[Dialogue], phase: Phase
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Packed (inputs, targets) of a phase, each int64 [batch, length], targets already shifted."""
    import torch

    need = phase.batch * phase.length
    ids: list[int] = []
    targets: list[int] = []
    index = phase.start
    while True:
        while len(ids) <= need:
            more_ids, more_targets = encode(tokenizer, model, dialogues[index % len(dialogues)])
            ids += more_ids
            targets += more_targets
            index += 1
        shape = (phase.batch, phase.length)
        yield torch.tensor(ids[:need]).view(shape), torch.tensor(targets[1 : need + 1]).view(shape)
        ids, targets = ids[need:], targets[need:]


class Muon:
    """Muon (Jordan et al. 2024) in fp32: momentum, orthogonalised by five Newton-Schulz steps.

    torch.optim.Muon computes in bf16, which CPUs without bf16 units do a hundred times slower.
    """

    def __init__(self, params: list[torch.Tensor], momentum: float = 0.95) -> None:
        import torch

        self.params = params
        self.momentum = momentum
        self.buffers = [torch.zeros_like(param) for param in params]

    def step(self, lr: float) -> None:
        import torch

        with torch.no_grad():
            for param, buffer in zip(self.params, self.buffers, strict=True):
                assert param.grad is not None
                buffer.lerp_(param.grad, 1 - self.momentum)
                update = self._orthogonal(param.grad.lerp(buffer, self.momentum))
                param.add_(update, alpha=-lr * math.sqrt(max(1.0, param.shape[0] / param.shape[1])))

    @staticmethod
    def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
        tall = matrix.shape[0] > matrix.shape[1]
        x = matrix.T if tall else matrix
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (2.0315 * (gram @ gram) - 4.7750 * gram) @ x
        return x.T if tall else x


def train(
    model: Any,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    phase: Phase,
    checkpoint: Path,
    compiled: bool = True,
) -> None:
    """Train in place over a phase; resumes from and keeps `checkpoint`."""
    import torch
    from torch.nn import functional

    body = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    in_body = {id(p) for p in body}
    others = [p for p in model.parameters() if id(p) not in in_body]
    muon = Muon(body)
    adam = torch.optim.AdamW(others, lr=phase.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])
        for buffer, saved in zip(muon.buffers, state["muon"], strict=True):
            buffer.copy_(saved)
        first = min(state["step"], phase.steps)

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=inputs, use_cache=False).logits
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    loss_fn = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    began, seen = time.monotonic(), 0
    for step in range(phase.steps):
        inputs, targets = next(batches)
        if step < first:
            continue
        rate = min(1.0, (step + 1) / phase.warmup)
        if phase.decay:
            rate = min(rate, (phase.steps - step) / phase.steps)
        loss = loss_fn(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        muon.step(phase.muon_lr * rate)
        for group in adam.param_groups:
            group["lr"] = phase.adam_lr * rate
        adam.step()
        model.zero_grad()
        seen += inputs.numel()
        last = step + 1 == phase.steps
        if (step + 1) % 20 == 0 or last:
            speed = seen / (time.monotonic() - began)
            print(f"step {step + 1} loss {loss.item():.3f} {speed:.0f} tokens/s", flush=True)
        if (step + 1) % 50 == 0 or last:
            partial = checkpoint.with_suffix(".partial")
            state = {"model": model.state_dict(), "adam": adam.state_dict(), "step": step + 1}
            torch.save({**state, "muon": muon.buffers}, partial)
            partial.replace(checkpoint)


def held_out_perplexity(
    model: Any, tokenizer: Any, name: str, dialogues: list[Dialogue]
) -> tuple[float, float]:
    """(per token, per character of the turns) perplexity over whole dialogues, format included."""
    import torch
    from torch.nn import functional

    nll, tokens, characters = 0.0, 0, 0
    with torch.no_grad():
        for dialogue in dialogues:
            ids, targets = encode(tokenizer, name, dialogue)
            if len(ids) > tiny_layouts.MAX_POSITIONS:
                continue
            logits = model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0]
            nll += functional.cross_entropy(
                logits.float(), torch.tensor(targets[1:]), reduction="sum"
            ).item()
            tokens += len(ids) - 1
            characters += sum(len(turn["content"]) for turn in dialogue)
    return math.exp(nll / tokens), math.exp(nll / characters)


def tokenizers(work: Path, dialogues: list[Dialogue]) -> tuple[dict[str, Any], bytes]:
    """(byte-level BPE section, SentencePiece model), trained once and kept under work."""
    byte_level, sentencepiece = work / "byte_level.json", work / "tokenizer.model"
    if not sentencepiece.exists():
        texts = [turn["content"] for d in dialogues[:TOKENIZER_DIALOGUES] for turn in d]
        # Llama-3 spells its roles in plain text: without these they would cost a token a letter.
        texts += ["system", "user", "assistant", "\n\n"] * TOKENIZER_DIALOGUES
        trained = tiny_tokenizers.train_byte_level(texts)
        byte_level.write_text(json.dumps(trained, ensure_ascii=False), encoding="utf-8")
        sentencepiece.write_bytes(tiny_tokenizers.train_sentencepiece(texts))
    return json.loads(byte_level.read_text(encoding="utf-8")), sentencepiece.read_bytes()


def start_branch(name: str, trunk: Any, trained: dict[str, Any], pieces: bytes) -> Any:
    """A model in the layout of `name` that starts from the trunk's weights."""
    import sentencepiece

    llama = tiny_tokenizers.with_specials(trained, tiny_tokenizers.LLAMA3_SPECIALS)
    if name == "tiny-llama3":
        model = tiny_layouts.llama_model()
        model.load_state_dict(trunk)
        return model
    if name == "tiny-glm4":
        glm = tiny_tokenizers.with_specials(trained, tiny_tokenizers.GLM4_SPECIALS)
        return tiny_layouts.glm_from_llama(trunk, tiny_layouts.glm_rows(llama, glm))
    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    rows = tiny_layouts.sentencepiece_rows(llama, processor)
    return tiny_layouts.norm_head_llama_from_llama(trunk, rows)


def save(name: str, model: Any, trained: dict[str, Any], pieces: bytes, directory: Path) -> None:
    """Write a finished model in its original's layout, with its chat template."""
    bos = "<|begin_of_text|>"
    if name == "tiny-llama3":
        llama = tiny_tokenizers.with_specials(trained, tiny_tokenizers.LLAMA3_SPECIALS, bos)
        tiny_layouts.save_llama(model, llama, directory)
    elif name == "tiny-glm4":
        glm = tiny_tokenizers.with_specials(trained, tiny_tokenizers.GLM4_SPECIALS)
        tiny_layouts.save_glm(model, glm, directory)
    else:
        tiny_layouts.save_baichuan(model, pieces, directory)
    chat_format.save_chat_format(directory, FORMAT[name])


def train_trunk(
    dialogues: list[Dialogue], trained: dict[str, Any], work: Path, compiled: bool = True
) -> Any:
    """The trunk's weights (state dict), trained or taken from its finished checkpoint."""
    import torch

    torch.manual_seed(SEED)
    model = tiny_layouts.llama_model()
    tokenizer = tiny_tokenizers.with_specials(trained, tiny_tokenizers.LLAMA3_SPECIALS)
    batches = blocks(_wrapped(tokenizer), "tiny-llama3", dialogues, TRUNK)
    train(model, batches, TRUNK, work / "trunk.pt", compiled)
    return model.state_dict()


def train_branch(
    name: str,
    trunk: Any,
    dialogues: list[Dialogue],
    trained: dict[str, Any],
    pieces: bytes,
    work: Path,
    compiled: bool = True,
) -> Any:
    """One model after its own phase, in fp32."""
    from milm_ray.models.sentencepiece_fast import fast_tokenizer

    model = start_branch(name, trunk, trained, pieces)
    if name == "tiny-baichuan2":
        tokenizer = fast_tokenizer(work / "tokenizer.model")
    else:
        llama3 = name == "tiny-llama3"
        specials = tiny_tokenizers.LLAMA3_SPECIALS if llama3 else tiny_tokenizers.GLM4_SPECIALS
        tokenizer = tiny_tokenizers.with_specials(trained, specials)
    phase = BRANCHES[name]
    batches = blocks(_wrapped(tokenizer), name, dialogues, phase)
    train(model, batches, phase, work / f"{name}.pt", compiled)
    return model


def _wrapped(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def measure(name: str, directory: Path, work: Path, held_out: list[Dialogue]) -> dict[str, Any]:
    """Figures of a finished model, read back from its files as the pipeline reads them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from milm_ray.models.checkpoint import prepare_base

    base = prepare_base(directory, out_dir=work / "bases")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    evaluated = held_out[:EVALUATED]
    per_token, per_character = held_out_perplexity(model, tokenizer, name, evaluated)
    phase = BRANCHES[name]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trunk_tokens": TRUNK.steps * TRUNK.batch * TRUNK.length,
        "own_tokens": phase.steps * phase.batch * phase.length,
        "held_out_dialogues": len(evaluated),
        "perplexity_per_token": round(per_token, 2),
        "perplexity_per_character": round(per_character, 2),
    }


def main(arguments: list[str] | None = None) -> None:
    """Make the tiny models: trunk, then each model's own phase, its files and its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="SmileChat: archive or folder")
    parser.add_argument("--out", type=Path, required=True, help="one folder per model goes here")
    parser.add_argument("--model", choices=sorted(BRANCHES), help="only this one (default: all)")
    parser.add_argument("--work", type=Path, default=Path("pretrain-work"), help="checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="without torch.compile: half as fast")
    options = parser.parse_args(arguments)

    import torch

    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    training, held_out = read_smilechat(options.corpus)
    trained, pieces = tokenizers(options.work, training)
    trunk = train_trunk(training, trained, options.work, not options.eager)
    for name in [options.model] if options.model else sorted(BRANCHES):
        directory = options.out / name
        model = train_branch(
            name, trunk, training, trained, pieces, options.work, not options.eager
        )
        save(name, model, trained, pieces, directory)
        figures = measure(name, directory, options.work, held_out)
        (directory / FIGURES).write_text(json.dumps(figures, ensure_ascii=False, indent=2) + "\n")
        print(name, json.dumps(figures, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
