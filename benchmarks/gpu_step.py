"""Tokens a second and model FLOPs utilisation of the training step on a GPU.

    python benchmarks/gpu_step.py [--layers 32] [--dialogues 8] [--tokens 1024] [--peer] [--profile]

LoRA of rank 8 on a randomly initialised Llama of the 8B shape, bf16, in one process without Ray.
A step is 8 dialogues packed, half of their tokens with a label. The utilisation is the model's own
floating point operations (what checkpointing computes twice counts once) over the rate that a large
bf16 product reaches on this GPU. --peer: also transformers' Trainer, batch 1 x accumulation 8, on
the same dialogues. Needs CUDA and about 60 GiB of GPU memory.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from flop import TARGETS, needed_flop

from milm_ray.config import FinetuneSection
from milm_ray.finetune.engine import optimizer_step, single_process, start_engine, with_lora
from milm_ray.finetune.packing import bins, collate
from milm_ray.finetune.samples import Sample

VOCABULARY = 128_256


def llama(layers: int, device: str = "cuda") -> Any:
    """A Llama of the 8B's widths with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


def dialogues(count: int, tokens: int) -> list[Sample]:
    """Random dialogues of 0.7 to 1.3 times `tokens`, the second half of each with labels."""
    draw = random.Random(1)
    made = []
    for number in range(count):
        ids = [draw.randrange(VOCABULARY) for _ in range(int(tokens * draw.uniform(0.7, 1.3)))]
        labels = [i if place >= len(ids) // 2 else -100 for place, i in enumerate(ids)]
        made.append(Sample(str(number), ids, labels))
    return made


def matmul_rate() -> float:
    """Floating point operations a second of a large bf16 product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.mm(a, b)
        torch.cuda.synchronize()
        best = max(best, 2 * 8192**3 / (time.perf_counter() - start))
    return best


def ours(
    layers: int, settings: FinetuneSection, samples: list[Sample], steps: int, profile: bool
) -> float:
    """Median seconds of an optimizer step. profile: print where a step's time goes."""
    engine = start_engine(with_lora(llama(layers), settings, TARGETS, 1), settings)
    groups = bins([len(s.input_ids) for s in samples], settings.pack_tokens)
    packs = [collate([samples[i] for i in group]) for group in groups]
    labels = sum(sample.label_tokens for sample in samples)
    times = []
    for _ in range(steps + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer_step(engine, packs, labels, settings.learning_rate)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if profile:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as record

        with record(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
            optimizer_step(engine, packs, labels, settings.learning_rate)
            torch.cuda.synchronize()
        averages = recorded.key_averages()
        print(
            averages.table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=55)
        )
    return statistics.median(times[2:])


def trainer(
    layers: int, settings: FinetuneSection, samples: list[Sample], steps: int, _profile: bool
) -> float:
    """Mean seconds of an optimizer step of transformers' Trainer, after two to warm up."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    lora = LoraConfig(r=settings.lora.rank, target_modules=list(TARGETS))
    tuned = get_peft_model(llama(layers), lora)
    tuned.enable_input_require_grads()
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter())

    rows = [{"input_ids": s.input_ids, "labels": s.labels} for s in samples] * (steps + 2)
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output_dir=output,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=len(samples),
            num_train_epochs=1,
            bf16=True,
            gradient_checkpointing=settings.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        Trainer(
            model=tuned,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            data_collator=lambda batch: {k: torch.tensor([r[k] for r in batch]) for k in batch[0]},
            callbacks=[Clock()],
        ).train()
    return (times[-1] - times[1]) / (len(times) - 2)


# What is compared, and whether it computes the layers twice.
SIDES: dict[str, tuple[Any, bool]] = {
    "ours": (ours, False),
    "ours, checkpointed": (ours, True),
    "Trainer, checkpointed": (trainer, True),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dialogues", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024, help="of a dialogue, on average")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--peer", action="store_true", help="transformers' Trainer too")
    parser.add_argument("--profile", action="store_true", help="the kernels of one of our steps")
    parser.add_argument("--side", choices=sorted(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "error: no CUDA device is to be seen\n  fix: run it on a machine with an NVIDIA GPU, "
            "installed with LOCK=requirements/gpu.lock; on a CPU see benchmarks/finetune.py",
            file=sys.stderr,
        )
        return 2
    samples = dialogues(options.dialogues, options.tokens)
    tokens = sum(len(sample.input_ids) for sample in samples)
    if options.side:
        side, checkpointed = SIDES[options.side]
        settings = FinetuneSection(pack_tokens=tokens, gradient_checkpointing=checkpointed)
        single_process()
        seconds = side(options.layers, settings, samples, options.steps, options.profile)
        print(json.dumps({"seconds": seconds, "peak": torch.cuda.max_memory_allocated()}))
        return 0
    rate = matmul_rate()
    flop = needed_flop(llama(options.layers, "meta"), 8, samples)
    print(
        f"{torch.cuda.get_device_name()}: {rate / 1e12:,.0f} TFLOP/s in a bf16 product; "
        f"{tokens:,} tokens a step, {flop / 1e12:,.0f} TFLOP",
        flush=True,
    )
    # In a process each: what one leaves in the GPU's memory is not in the next one's peak.
    torch.cuda.empty_cache()
    for name in SIDES:
        if name == "Trainer, checkpointed" and not options.peer:
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--side", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        *profile, last = done.stdout.splitlines()
        found = json.loads(last)
        print(
            *profile,
            f"{name:22}{tokens / found['seconds']:8,.0f} tokens/s, {found['seconds']:.3f} s a step,"
            f" utilisation {flop / found['seconds'] / rate:.0%}, "
            f"peak {found['peak'] / 2**30:.1f} GiB",
            sep="\n",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
