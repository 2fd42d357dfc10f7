"""Fine-tuning speed beside LLaMA-Factory's and TRL's: the same model, data, settings and steps.

    python benchmarks/finetune.py --corpus DIR [--llamafactory PYTHON] [--rounds 3]

DIR holds CPsyCounD's case_N.txt. PYTHON is the interpreter of a virtual environment with
llamafactory 0.9.5 (docs/finetuning.md says how to make one on a machine without a GPU); without it
only TRL is the peer. A randomly initialised Llama of 6 M weights is tuned for one epoch on the
first 240 dialogues that fit into 1,024 tokens: LoRA of rank 8 on every linear layer, 8 dialogues an
optimizer step, fp32, gradient checkpointing off. Ours are two workers of one thread, as
finetune.workers_per_model makes them; TRL and LLaMA-Factory are one process of two threads, as they
come, and LLaMA-Factory once more under torchrun as two of one (llamafactory-ddp). All sides start
from one adapter and take the same dialogues in every step; they take turns (A B C A B C), and each
one's median counts. Times are of
the training loop alone, without imports and tokenising; on a machine that does other work too, read
the ratio by CPU seconds. The floor is the floating point operations that the step cannot do
without, over the matmul rate measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from finetune_peers import (
    ACCUMULATION,
    ALPHA,
    CORES,
    CUTOFF,
    DIALOGUES,
    RANK,
    RATE,
    SEED,
    WARMUP,
    Clock,
    trl,
    write_peers_data,
)
from flop import TARGETS, matmul_rate, needed_flop

TOKENIZER = Path(__file__).parent.parent / "milm_ray" / "samples" / "models" / "tiny-llama3"
# Sums taken in another order differ in their last digits, which training lets grow a little.
LOSS_NOISE = 2e-3


def prepare(work: Path, corpus: Path, pack_tokens: int) -> dict[str, Any]:
    """Write base, first adapter and data into `work`; returns what is known of them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from milm_ray.corpora.cpsycound import READER
    from milm_ray.finetune.engine import lora_model
    from milm_ray.models.checkpoint import prepare_base

    shutil.rmtree(work, ignore_errors=True)
    source = work / "source"
    shutil.copytree(TOKENIZER, source)
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(source)
    base = prepare_base(source, None, work / "bases", "llama3")
    first = lora_model(base, settings(pack_tokens), TARGETS, SEED, "bench")
    first.save_pretrained(str(work / "adapter"), save_embedding_layers=False)

    files = sorted(corpus.rglob("case_*.txt"), key=lambda path: int(path.stem.split("_")[1]))
    rows: list[dict[str, Any]] = []
    for path in files:
        for dialogue in READER.read(path.name, path.read_bytes()).dialogues:
            rows.append(dialogue.row())
    rows, samples = fitting(rows, base)
    facts = {
        "base": str(base),
        "pack_tokens": pack_tokens,
        "steps": DIALOGUES // ACCUMULATION,
        "weights": sum(p.numel() for p in model.parameters()),
        "tokens": sum(len(s.input_ids) for s in samples),
        "labels": sum(s.label_tokens for s in samples),
        "flop": needed_flop(model, RANK, samples),
    }
    write_peers_data(work, rows, samples, facts)
    (work / "rows.json").write_text(json.dumps(rows, ensure_ascii=False))
    (work / "facts.json").write_text(json.dumps(facts))
    return facts


def settings(pack_tokens: int, workers: int = 1) -> Any:
    from milm_ray.config import FinetuneSection

    return FinetuneSection.model_validate(
        {
            "learning_rate": RATE,
            "epochs": 1,
            "warmup_ratio": WARMUP,
            "gradient_accumulation": ACCUMULATION // workers,
            "precision": "fp32",
            "cutoff": CUTOFF,
            "pack_tokens": pack_tokens,
            "logging_steps": 1,
            "gradient_checkpointing": False,
            "lora": {"rank": RANK, "alpha": ALPHA},
            "zero_stage": 0,
        }
    )


def fitting(rows: list[dict[str, Any]], base: Path) -> tuple[list[dict[str, Any]], list[Any]]:
    """The first dialogues that need no cutting, and their samples."""
    from transformers import AutoTokenizer

    from milm_ray.finetune.samples import tokenise

    tokenizer = AutoTokenizer.from_pretrained(base)
    whole = tokenise(rows, tokenizer, "llama3", 10**6).samples
    kept = [i for i, sample in enumerate(whole) if len(sample.input_ids) <= CUTOFF][:DIALOGUES]
    if len(kept) < DIALOGUES:
        raise SystemExit(f"{len(kept)} dialogues fit into {CUTOFF} tokens; {DIALOGUES} are needed")
    return [rows[i] for i in kept], [whole[i] for i in kept]


def ours(work: Path) -> dict[str, Any]:
    """The training loop that every worker runs, without Ray."""
    import torch
    from torch import distributed

    from milm_ray.finetune import engine
    from milm_ray.finetune.train import Task, train

    rank, workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    facts = json.loads((work / "facts.json").read_text())
    torch.set_num_threads(1)
    rows = json.loads((work / "rows.json").read_text())
    tuned = settings(facts["pack_tokens"], workers)
    task = Task("bench", facts["base"], "bench", "llama3", TARGETS, tuned, SEED)
    distributed.init_process_group("gloo")
    clock = engine.optimizer_step = Clock(engine.optimizer_step)  # type: ignore[assignment]
    log = train(task, rows, rank=rank, workers=workers, save=lambda *_: None, say=lambda _: None)
    return {**clock.figures(), "losses": [row["loss"] for row in log["log"]]}


SIDES = {"ours": ours, "trl": trl}
NAMES = ("ours", "trl", "llamafactory", "llamafactory-ddp")


def run_side(side: str, work: Path, interpreter: Path | None) -> dict[str, Any]:
    """One epoch in processes of its own: its figures, and its peak memory in MiB.

    Of several processes, CPU seconds and memory are taken to be those of the first times their
    number.
    """
    several = side in ("ours", "llamafactory-ddp")
    environment = {
        **os.environ,
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(1 if several else CORES)),
        # A thread that waits for another does not keep a core busy that others may be using.
        "OMP_WAIT_POLICY": "PASSIVE",
        **dict.fromkeys(("HF_HUB_OFFLINE", "DISABLE_VERSION_CHECK"), "1"),
        **{"DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"},
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [__file__, "--side", side, "--work", str(work)]
    if side.startswith("llamafactory"):
        shutil.rmtree(work / "llamafactory-out", ignore_errors=True)
        command = [str(work / f"run_{side}.py"), str(work / f"{side}.yaml")]
    if several:
        torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={CORES}")
        command = [*torchrun, *command]
    python = str(interpreter) if side.startswith("llamafactory") else sys.executable
    log = work / f"{side}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [python, *command], env=environment, stdout=output, stderr=output
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{side} failed; see {log}")
    found = json.loads((work / f"{side}.json").read_text())
    many = CORES if several else 1
    return {**found, "cpu": found["cpu"] * many, "peak": usage.ru_maxrss / 1024 * many}


def report(found: dict[str, list[dict[str, Any]]], facts: dict[str, Any], rate: float) -> None:
    ours_s = statistics.median(run["seconds"] for run in found["ours"])
    losses = found["ours"][0]["losses"]
    names = ("dialogues/s", "tokens/s", "ours is", "CPU s", "by CPU", "MiB", "loss differs")
    widths = (12, 10, 9, 8, 9, 8, 14)
    print(" " * 17 + "".join(f"{name:>{w}}" for name, w in zip(names, widths, strict=True)))
    for side, runs in found.items():
        seconds = [run["seconds"] for run in runs]
        middle = statistics.median(seconds)
        peak = max(run["peak"] for run in runs)
        ratio, by_cpu = (
            statistics.median(
                run[name] / own[name] for run, own in zip(runs, found["ours"], strict=False)
            )
            for name in ("seconds", "cpu")
        )
        worst = max(abs(a - b) for run in runs for a, b in zip(run["losses"], losses, strict=True))
        cpu = statistics.median(run["cpu"] for run in runs)
        print(
            f"{side:17}{DIALOGUES / middle:12.2f}{facts['tokens'] / middle:10,.0f}{ratio:8.2f}x"
            f"{cpu:8.1f}{by_cpu:8.2f}x{peak:8,.0f}{worst:14.1e}"
            f"   ({', '.join(f'{s:.1f}' for s in seconds)} s)"
        )
        if worst > LOSS_NOISE:
            print(f"  the losses of {side} are not ours: the comparison is void")
    print(f"loss, first and last step: {losses[0]:.4f}, {losses[-1]:.4f}")
    floor = facts["flop"] / rate
    print(
        f"floor: {facts['flop'] / 1e9:,.0f} GFLOP at {rate / 1e9:,.0f} GFLOP/s are {floor:.1f} s; "
        f"ours takes {ours_s / floor:.1f} times that"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, help="CPsyCounD's folder of case_N.txt")
    parser.add_argument("--llamafactory", type=Path, help="python of LLaMA-Factory's environment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pack-tokens", type=int, default=2048, help="tokens per pass of ours")
    parser.add_argument("--sides", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--work", type=Path, default=Path("/tmp/milm_ray_bench_finetune"))
    parser.add_argument("--more", action="store_true", help="add to the rounds of the last call")
    parser.add_argument("--side", choices=sorted(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        found = SIDES[options.side](options.work)
        if int(os.environ.get("RANK", "0")) == 0:
            (options.work / f"{options.side}.json").write_text(json.dumps(found))
        return 0
    if options.corpus is None:
        parser.error("--corpus is needed")
    os.environ["DS_ACCELERATOR"] = "cpu"
    kept = options.work / "runs.json"
    if options.more:
        facts = json.loads((options.work / "facts.json").read_text())
        found, rates = json.loads(kept.read_text())
    else:
        facts = prepare(options.work, options.corpus, options.pack_tokens)
        found, rates = {}, []
    print(
        f"{DIALOGUES} dialogues, {facts['tokens']:,} tokens, {facts['labels']:,} labels, "
        f"{facts['steps']} optimizer steps, {facts['weights'] / 1e6:.1f} M weights"
    )
    sides = [s for s in options.sides if s[:5] != "llama" or options.llamafactory]
    for _ in range(options.rounds):
        for side in sides:
            rates.append(matmul_rate(CORES))
            run = run_side(side, options.work, options.llamafactory)
            found.setdefault(side, []).append(run)
    kept.write_text(json.dumps([found, rates]))
    report(found, facts, statistics.median(rates))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
