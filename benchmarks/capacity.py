"""What a run costs in time and money, from 2,040 dialogues to a million and from 3 GPUs to 64.

    python benchmarks/capacity.py                         # the plan, from what was measured
    python benchmarks/capacity.py --teacher-concurrency 256 --gpu-hour 3.0
    python benchmarks/capacity.py --figure docs/scale.png

`benchmarks/capacity_runs.py` has measured the data stages into docs/scale.json, which is shown
beside the model. docs/scale.md says what follows from it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

RUNS = Path(__file__).parents[1] / "docs" / "scale.json"
MODELS = 3
PAPER = 2_040


@dataclass(frozen=True)
class Cost:
    """What a stage takes on a CPU: to start, and for each thousand dialogues."""

    start_cpu_s: float
    cpu_s: float
    driver_mib: float
    written_mib: float


# Fitted to the runs of benchmarks/capacity_runs.py on two cores (AVX2). The real corpora take
# ingest 2.4 CPU seconds a thousand: their dialogues are longer, most of them in one tar.xz.
DATA = {
    "ingest": Cost(start_cpu_s=6.0, cpu_s=0.45, driver_mib=1.0, written_mib=0.08),
    "transcribe": Cost(start_cpu_s=4.0, cpu_s=20.4, driver_mib=12.0, written_mib=3.0),
    "split": Cost(start_cpu_s=0.0, cpu_s=1.6, driver_mib=5.0, written_mib=17.0),
}
DRIVER_START_MIB = 200.0
# Scoring: `python benchmarks/overlap.py --ray 1000000`, two cores, 95 s for a million pairs.
SCORE_CPU_S_PER_1000_PAIRS = 0.19
# Training: `python benchmarks/gpu_step.py`, an 8B model, LoRA of rank 8, bf16; docs/finetuning.md.
TRAIN_TOKENS_PER_S_PER_GPU = 14_888
TRAINED_ON = "one H200"
TRAIN_TOKENS_PER_DIALOGUE = 1_000
EPOCHS = 3
# The prompt is 1,302 tokens by milm_ray.llm.tokens and a source dialogue as long as a reply;
# a recorded reply has 986 tokens in the mean of 66.
PROMPT_TOKENS = 2_290
REPLY_TOKENS = 986
ROUNDS_PER_DIALOGUE = 9.5


@dataclass(frozen=True)
class Assumed:
    """What depends on providers and is not measured here; every one is an option."""

    teacher_latency_s: float = 25.0  # a thousand tokens at 40 tokens/s
    teacher_concurrency: int = 64
    teacher_tokens_per_minute: float = 2e6
    prompt_price: float = 2.5  # USD per million tokens; gpt-4o in milm_ray/llm/prices.py
    completion_price: float = 10.0
    gpu_hour: float = 4.0  # USD
    cpu_hour: float = 0.05  # USD a core
    cores: int = 32
    parallel_efficiency: float = 0.9  # of training one model on several GPUs
    generate_tokens_per_s: float = 2_500.0  # new tokens per GPU, many rounds at once
    test_dialogues: int = 40  # the paper's, whatever the size of the corpus
    load_s: float = 180.0  # a model from storage onto a GPU, once for training, once for serving
    judged: int = 250


@dataclass(frozen=True)
class Stage:
    name: str
    wall_s: float
    cpu_s: float = 0.0
    gpu_s: float = 0.0
    usd: float = 0.0
    bound_by: str = ""


def plan(dialogues: int, gpus: int, assumed: Assumed) -> list[Stage]:
    """Every stage of the pipeline that takes long, in order."""
    return [
        _data("ingest", dialogues, assumed),
        _asking("curate", assumed.judged, 1_500, 150, assumed),
        _asking("transcribe", dialogues, PROMPT_TOKENS, REPLY_TOKENS, assumed),
        _data("split", dialogues, assumed, cores=1),
        _finetune(dialogues, gpus, assumed),
        _generate(gpus, assumed),
        _score(assumed),
    ]


def cpu_seconds(stage: str, dialogues: float) -> float:
    cost = DATA[stage]
    return cost.start_cpu_s + cost.cpu_s * dialogues / 1000


def driver_mib(dialogues: float) -> float:
    """Memory of the driver of a whole pipeline: what one stage held is not given back."""
    return DRIVER_START_MIB + sum(cost.driver_mib for cost in DATA.values()) * dialogues / 1000


def _data(name: str, dialogues: int, assumed: Assumed, cores: int | None = None) -> Stage:
    cpu = cpu_seconds(name, dialogues)
    used = cores or assumed.cores
    return Stage(name, cpu / used, cpu, usd=cpu / 3600 * assumed.cpu_hour, bound_by="CPU")


def _asking(name: str, calls: int, prompt: int, reply: int, assumed: Assumed) -> Stage:
    """The slowest of: the places in flight, the provider's rate, our own processes."""
    cpu = cpu_seconds("transcribe", calls)
    latency = assumed.teacher_latency_s * reply / REPLY_TOKENS
    times = {
        "concurrency": calls * latency / assumed.teacher_concurrency,
        "tokens/min": calls * (prompt + reply) / assumed.teacher_tokens_per_minute * 60,
        "CPU": cpu / min(assumed.cores, assumed.teacher_concurrency // 256 + 1),
    }
    bound = max(times, key=times.__getitem__)
    tokens = calls * (prompt * assumed.prompt_price + reply * assumed.completion_price) / 1e6
    return Stage(name, times[bound], cpu, usd=tokens, bound_by=bound)


def _finetune(dialogues: int, gpus: int, assumed: Assumed) -> Stage:
    """Three models at once, each on a third of the GPUs; on fewer than three, in turns."""
    per_model = max(1, gpus // MODELS)
    turns = -(-MODELS // min(MODELS, gpus))
    efficiency = assumed.parallel_efficiency if per_model > 1 else 1.0
    tokens = dialogues * TRAIN_TOKENS_PER_DIALOGUE * EPOCHS
    busy = tokens / (TRAIN_TOKENS_PER_S_PER_GPU * per_model * efficiency)
    wall = turns * (busy + assumed.load_s)
    return _on_gpus("finetune", wall, min(gpus, MODELS * per_model), "GPU", assumed)


def _generate(gpus: int, assumed: Assumed) -> Stage:
    """Base and adapter of every model reply to every test round; an engine per model."""
    rounds = assumed.test_dialogues * ROUNDS_PER_DIALOGUE
    new_tokens = 2 * rounds * REPLY_TOKENS / ROUNDS_PER_DIALOGUE / 2
    turns = -(-MODELS // min(MODELS, gpus))
    wall = turns * (new_tokens / assumed.generate_tokens_per_s + assumed.load_s)
    return _on_gpus("generate", wall, min(gpus, MODELS), "start-up", assumed)


def _on_gpus(name: str, wall: float, gpus: int, bound: str, assumed: Assumed) -> Stage:
    used = wall * gpus
    return Stage(name, wall, gpu_s=used, usd=used / 3600 * assumed.gpu_hour, bound_by=bound)


def _score(assumed: Assumed) -> Stage:
    pairs = assumed.test_dialogues * ROUNDS_PER_DIALOGUE * 2 * MODELS
    cpu = 10 + pairs / 1000 * SCORE_CPU_S_PER_1000_PAIRS
    return Stage("score", cpu, cpu, usd=cpu / 3600 * assumed.cpu_hour, bound_by="start-up")


def kept() -> list[dict[str, Any]]:
    """The runs of benchmarks/capacity_runs.py, smallest first."""
    return json.loads(RUNS.read_text(encoding="utf-8")) if RUNS.exists() else []


# --- showing -------------------------------------------------------------------------------------


def show(assumed: Assumed) -> None:
    """The plan as Markdown tables."""
    print("| for 1,000 dialogues | CPU s | start, CPU s | written, MiB | driver, MiB |")
    print("|---|--:|--:|--:|--:|")
    for name, cost in DATA.items():
        print(
            f"| {name} | {cost.cpu_s:.1f} | {cost.start_cpu_s:.0f} | {cost.written_mib:.1f} | "
            f"{cost.driver_mib:.0f} |"
        )
    gpus = (3, 8, 64)
    print("\n| dialogues | teacher | " + " | ".join(f"{n} GPUs" for n in gpus) + " | driver |")
    print("|--:|--:|" + "--:|" * (len(gpus) + 1))
    for dialogues in (PAPER, 20_400, 204_000, 1_000_000):
        cells = []
        for number in gpus:
            stages = plan(dialogues, number, assumed)
            wall, usd = sum(s.wall_s for s in stages), sum(s.usd for s in stages)
            training = next(s.wall_s for s in stages if s.name == "finetune")
            cells.append(f"{hours(wall)} (finetune {hours(training)}), ${usd:,.0f}")
        asked = next(s for s in plan(dialogues, 3, assumed) if s.name == "transcribe")
        print(
            f"| {dialogues:,} | {hours(asked.wall_s)} ({asked.bound_by}), ${asked.usd:,.0f} | "
            + " | ".join(cells)
            + f" | {driver_mib(dialogues) / 1024:.1f} GiB |"
        )


def hours(seconds: float) -> str:
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} d"


def compare(runs: list[dict[str, Any]]) -> None:
    """What was measured, and in brackets what is predicted, as a Markdown table."""
    print("| stage | " + " | ".join(f"{run['dialogues']:,} dialogues" for run in runs) + " |")
    print("|---|" + "--:|" * len(runs))
    for name in DATA:
        cells = [
            f"{run['stages'][name]['cpu_s']:.0f} ({cpu_seconds(name, run['dialogues']):.0f})"
            for run in runs
        ]
        print(f"| {name}, CPU s | " + " | ".join(cells) + " |")
    held = [run["stages"]["split"]["driver_mib"] for run in runs]
    cells = [
        f"{mib:.0f} ({driver_mib(run['dialogues']):.0f})"
        for mib, run in zip(held, runs, strict=True)
    ]
    print("| driver, MiB | " + " | ".join(cells) + " |")
    most = [max(stage["worker_mib"] for stage in run["stages"].values()) for run in runs]
    print("| largest worker, MiB | " + " | ".join(f"{mib:.0f}" for mib in most) + " |\n")


def figure(runs: list[dict[str, Any]], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    sizes = [10 ** (2 + k / 10) for k in range(41)]
    for name, colour in zip(DATA, ("#1b6ca8", "#c0504d", "#6a8f3c"), strict=True):
        left.plot(sizes, [cpu_seconds(name, n) for n in sizes], color=colour, label=name)
        left.plot(
            [run["dialogues"] for run in runs],
            [run["stages"][name]["cpu_s"] for run in runs],
            "o",
            color=colour,
        )
    left.set(xscale="log", yscale="log", xlabel="dialogues", ylabel="CPU seconds")
    left.set_title("Data stages: measured (dots) and predicted")
    left.legend(frameon=False)
    big = [10 ** (3.3 + k / 10) for k in range(28)]
    for name, colour in (("transcribe", "#c0504d"), ("finetune", "#7a5195")):
        for gpus, style in ((3, "-"), (64, "--")):
            wall = [
                next(s.wall_s for s in plan(int(n), gpus, Assumed()) if s.name == name) / 3600
                for n in big
            ]
            if name == "transcribe" and gpus == 64:
                continue
            label = name if name == "transcribe" else f"{name}, {gpus} GPUs"
            right.plot(big, wall, style, color=colour, label=label)
    right.set(xscale="log", yscale="log", xlabel="dialogues", ylabel="hours")
    right.set_title("Wall time, predicted (64 calls in flight)")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    drawing.savefig(target, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figure", type=Path)
    for field in fields(Assumed):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default
        )
    options = parser.parse_args()
    runs = kept()
    assumed = Assumed(**{name: getattr(options, name) for name in asdict(Assumed())})
    compare(runs)
    show(assumed)
    if options.figure:
        figure(runs, options.figure)


if __name__ == "__main__":
    main()
