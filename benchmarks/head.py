"""What the head costs at a real vocabulary: logits at the labels only, against logits everywhere.

    python benchmarks/head.py [--vocabulary 128256] [--hidden 4096] [--layers 1] [--rounds 3]

One packed forward and backward pass of a Llama with the real widths of Llama-3 8B (but few layers),
LoRA on every linear layer, half of the places with a label: by milm_ray.finetune.step, and by
transformers' own loss on full logits. The sides take turns in processes of their own; prints step
time and peak memory of each (fp32 on a CPU, bf16 on a GPU). At least 12 GiB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from flop import TARGETS

NAMES = {"labels": "logits at the labels", "full": "full logits"}


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a pass and peak MiB, of one side."""
    import random
    import resource

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from milm_ray.config import FinetuneSection
    from milm_ray.finetune.engine import with_lora
    from milm_ray.finetune.packing import collate
    from milm_ray.finetune.samples import Sample
    from milm_ray.finetune.step import PackedLoss, pack_loss

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.set_num_threads(options.threads)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=int(3.5 * options.hidden),
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 128,
        num_key_value_heads=max(1, options.hidden // 512),
        dtype="bfloat16" if on_gpu else "float32",
    )
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    model = empty.to(torch.bfloat16 if on_gpu else torch.float32).to_empty(device=device)
    for parameter in model.parameters():
        # A billion random draws take a CPU long, and its speed does not depend on them.
        parameter.data.normal_(std=0.02) if on_gpu else parameter.data.fill_(0.01)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    settings = FinetuneSection(precision="bf16" if on_gpu else "fp32", gradient_checkpointing=False)
    draw = random.Random(1)
    samples = []
    for number in range(4):
        ids = [draw.randrange(options.vocabulary) for _ in range(options.tokens // 4)]
        labels = [i if place >= len(ids) // 2 else -100 for place, i in enumerate(ids)]
        samples.append(Sample(str(number), ids, labels))
    pack = collate(samples)
    tuned = with_lora(model, settings, TARGETS, 1).to(model.dtype)
    module = PackedLoss(tuned)

    def labels_only() -> Any:
        return pack_loss(module, pack, device) / len(pack.targets)

    def full() -> Any:
        labels = [i for sample in samples for i in sample.labels]
        return tuned(
            input_ids=pack.input_ids.to(device),
            position_ids=pack.position_ids.to(device),
            labels=torch.tensor([labels], device=device),
            sample_lengths=pack.lengths,
            use_cache=False,
        ).loss

    step = labels_only if options.side == "labels" else full
    times = []
    for _ in range(options.steps + 1):
        start = time.perf_counter()
        step().backward()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else 0.0
    peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": statistics.median(times[1:]), "peak": peak}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1024, help="of the pack")
    parser.add_argument("--steps", type=int, default=2, help="timed passes per process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=sorted(NAMES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options)))
        return 0
    found: dict[str, list[dict[str, float]]] = {side: [] for side in NAMES}
    for _ in range(options.rounds):
        for side, runs in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=environment
            )
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    middle = {side: statistics.median(r["seconds"] for r in runs) for side, runs in found.items()}
    peaks = {side: max(r["peak"] for r in runs) for side, runs in found.items()}
    print(
        f"vocabulary {options.vocabulary:,}, hidden {options.hidden:,}, {options.layers} layer(s), "
        f"a pack of {options.tokens:,} tokens, half of them with a label"
    )
    for side, name in NAMES.items():
        every = ", ".join(f"{run['seconds']:.2f}" for run in found[side])
        print(f"{name:22}{middle[side]:8.2f} s a pass ({every}), peak {peaks[side]:,.0f} MiB")
    saved = peaks["full"] - peaks["labels"]
    print(f"{middle['full'] / middle['labels']:.2f} times faster, {saved:,.0f} MiB less")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
