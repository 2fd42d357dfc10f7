"""The training loop of one model, as each worker runs it.

Knows nothing of Ray: who the workers are, where checkpoints go and who listens is passed in.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from milm_ray.config import FinetuneSection
from milm_ray.finetune import memory
from milm_ray.finetune.packing import Pack, collate, idle, shares
from milm_ray.finetune.samples import Sample, Tokenised, hold_out, tokenise
from milm_ray.finetune.schedule import Schedule

ADAPTER_DIR = "adapter"
STATE_DIR = "state"
LOG_FILE = "log.json"

# Called by every worker with the step and a function that writes a checkpoint into a directory.
Save = Callable[[int, Callable[[Path], None]], None]


@dataclass(frozen=True)
class Task:
    """What to train: a prepared base checkpoint, its chat format, and the settings.

    base: directory in the native transformers layout; identity: hub id or name of the base;
    adapter: directory of the adapter that preference tuning goes on from, "" in fine-tuning.
    """

    model: str
    base: str
    identity: str
    chat_format: str
    lora_targets: tuple[str, ...]
    settings: FinetuneSection
    seed: int
    adapter: str = ""


@dataclass
class Progress:
    """How far a run is: optimizer steps done, log rows written (schema.TRAINING_LOG), and the
    losses since the last row."""

    step: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def train(
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    *,
    rank: int,
    workers: int,
    save: Save,
    resume: Path | None = None,
    say: Callable[[str], None] = print,
    record: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Fine-tune to the end of the schedule; returns counts and the log (on every worker).

    rows: schema.MI_DIALOGUES. resume: a checkpoint written by an earlier, interrupted run. say,
    record: told of progress and of each log row, on rank 0. Raises engine.Diverged when the loss is
    not finite, UserError when memory will not do. The process group must be up.
    """
    import torch
    from transformers import AutoTokenizer

    from milm_ray.finetune.engine import (
        load_state,
        lora_model,
        mean_loss,
        optimizer_step,
        save_adapter,
        save_state,
        start_engine,
    )
    from milm_ray.finetune.step import HEAD_ROWS

    settings = task.settings
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(task.base)
    kept, held = hold_out(rows, settings.eval_share, task.seed)

    def tokenised(chosen: Sequence[Mapping[str, Any]]) -> Tokenised:
        return tokenise(chosen, tokenizer, task.chat_format, settings.cutoff, settings.unit)

    data = tokenised(kept)
    held_out = tokenised(held) if held else Tokenised()
    held_packs = own_packs(held_out.samples, rank, workers, settings.pack_tokens)
    schedule = Schedule(
        samples=len(data.samples),
        per_step=settings.batch_size * settings.gradient_accumulation * workers,
        epochs=settings.epochs,
        seed=task.seed,
        learning_rate=settings.learning_rate,
        kind=settings.schedule,
        warmup_ratio=settings.warmup_ratio,
    )
    lengths = [len(sample.input_ids) for sample in (*data.samples, *held_out.samples)]
    longest = max(settings.pack_tokens, *lengths)
    settings, need = memory.settle(
        task.model,
        json.loads((Path(task.base) / "config.json").read_text(encoding="utf-8")),
        settings,
        workers,
        min(longest, data.tokens),
        HEAD_ROWS,
        device,
    )
    if rank == 0:
        apart = f", {len(held_out.samples)} held out" if held else ""
        samples = f"{len(data.samples)} samples{data.cut}{apart}"
        say(f"{schedule.steps} steps on {samples}; {need.text()}")
    model = lora_model(task.base, settings, task.lora_targets, task.seed, task.identity)
    engine = start_engine(model, settings)
    progress = Progress()
    if resume is not None:
        state = load_state(engine, resume / STATE_DIR)
        progress = Progress(**state["progress"])
        if rank == 0:
            say(f"resumes after step {progress.step} of {schedule.steps}")

    def write(directory: Path) -> None:
        save_state(engine, directory / STATE_DIR, {"progress": asdict(progress)})
        save_adapter(engine, directory / ADAPTER_DIR)
        if rank == 0:
            text = json.dumps(progress.log, ensure_ascii=False)
            (directory / LOG_FILE).write_text(text, encoding="utf-8")

    tokens, since = 0, time.perf_counter()
    for step in range(progress.step, schedule.steps):
        chosen = [data.samples[index] for index in schedule.samples_of(step)]
        packs = own_packs(chosen, rank, workers, settings.pack_tokens)
        rate = schedule.learning_rate_at(step)
        result = optimizer_step(engine, packs, sum(s.label_tokens for s in chosen), rate)
        progress.step = step + 1
        progress.losses.append(result.loss)
        tokens += sum(len(s.input_ids) for s in chosen)
        last = progress.step == schedule.steps
        took = time.perf_counter() - since
        evaluates = bool(held) and (last or progress.step % settings.eval_steps == 0)
        if step == 0 or last or evaluates or progress.step % settings.logging_steps == 0:
            eval_loss = mean_loss(engine, held_packs, held_out.label_tokens) if evaluates else None
            row = {
                "model": task.model,
                "step": progress.step,
                "epoch": schedule.epoch_after(step),
                "loss": sum(progress.losses) / len(progress.losses),
                "eval_loss": eval_loss,
                "learning_rate": rate,
                "grad_norm": result.grad_norm,
                "tokens_per_s": tokens / took,
            }
            progress.log.append(row)
            progress.losses = []
            tokens, since = 0, time.perf_counter()
            if rank == 0:
                record(row)
                say(progress_line(row, schedule.steps))
        if last or progress.step % settings.save_steps == 0:
            save(progress.step, write)
    counts = {**data.counts(), "steps": schedule.steps}
    if held:
        counts |= {"eval_samples": len(held_out.samples), "eval_labels": held_out.label_tokens}
    return {"counts": counts, "log": progress.log}


def progress_line(row: Mapping[str, Any], steps: int) -> str:
    """A row of schema.TRAINING_LOG for people."""
    held = "" if row["eval_loss"] is None else f"  held-out loss {row['eval_loss']:.4f}"
    return (
        f"step {row['step']}/{steps}  epoch {row['epoch']:.2f}  loss {row['loss']:.4f}{held}  "
        f"lr {row['learning_rate']:.2e}  grad norm {row['grad_norm']:.2f}  "
        f"{row['tokens_per_s']:,.0f} tokens/s"
    )


def own_packs(samples: Sequence[Sample], rank: int, workers: int, pack_tokens: int) -> list[Pack]:
    """This worker's packs of an optimizer step's samples (see packing.shares)."""
    mine = shares([len(sample.input_ids) for sample in samples], workers, pack_tokens)[rank]
    return [collate([samples[i] for i in group]) if group else idle(samples[0]) for group in mine]
