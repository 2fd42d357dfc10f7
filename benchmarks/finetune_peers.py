"""What benchmarks/finetune.py gives its peers: the same data and settings, and a clock each."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

CORES = 2
DIALOGUES, CUTOFF, SEED = 240, 1024, 7
RATE, ACCUMULATION, RANK, ALPHA, WARMUP = 1e-4, 8, 8, 16, 0.1

# Runs in LLaMA-Factory's environment: its own command, the training loop timed.
LLAMAFACTORY = """
import json, time
from llamafactory.train.tuner import run_exp
from transformers import Trainer

inner = Trainer.train

def train(self, *args, **kwargs):
    wall, cpu = time.perf_counter(), time.process_time()
    result = inner(self, *args, **kwargs)
    found = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    found["losses"] = [float(row["loss"]) for row in self.state.log_history if "loss" in row]
    if self.is_world_process_zero():
        with open(OUT, "w") as file:
            json.dump(found, file)
    return result

Trainer.train = train
run_exp()
"""


class Clock:
    """Wall and CPU seconds from the first call of what it wraps to the end of the last."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._start = self._end = (0.0, 0.0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._end[0]:
            self._start = time.perf_counter(), time.process_time()
        result = self._inner(*args, **kwargs)
        self._end = time.perf_counter(), time.process_time()
        return result

    def figures(self) -> dict[str, float]:
        return {"seconds": self._end[0] - self._start[0], "cpu": self._end[1] - self._start[1]}


def write_peers_data(work: Path, rows: list[Any], samples: list[Any], facts: Any) -> None:
    """LLaMA-Factory's dataset and settings, and TRL's token ids, in our order of the dialogues."""
    from milm_ray.finetune.schedule import Schedule
    from milm_ray.models.messages import dialogue_messages
    from milm_ray.schema import turns_of

    course = Schedule(DIALOGUES, ACCUMULATION, 1.0, SEED, RATE, "cosine", WARMUP)
    order = [index for step in range(course.steps) for index in course.samples_of(step)]
    names = {"user": "human", "assistant": "gpt"}
    conversations = [
        {
            "conversations": [
                {"from": names[m["role"]], "value": m["content"]}
                for m in dialogue_messages(turns_of(rows[i]))
            ]
        }
        for i in order
    ]
    data = work / "llamafactory"
    data.mkdir()
    (data / "data.json").write_text(json.dumps(conversations, ensure_ascii=False))
    info = {"bench": {"file_name": "data.json", "formatting": "sharegpt"}}
    (data / "dataset_info.json").write_text(json.dumps(info))
    ids = [{"input_ids": samples[i].input_ids, "labels": samples[i].labels} for i in order]
    (work / "ids.json").write_text(json.dumps(ids))
    arguments = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": facts["base"],
        "adapter_name_or_path": str(work / "adapter"),
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "template": "llama3",
        "dataset_dir": str(data),
        "dataset": "bench",
        "cutoff_len": CUTOFF,
        "overwrite_cache": True,
        "output_dir": str(work / "llamafactory-out"),
        "disable_gradient_checkpointing": True,
        "disable_shuffling": True,
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": ACCUMULATION,
        "learning_rate": RATE,
        "num_train_epochs": 1.0,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": WARMUP,
        "seed": SEED,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
    }
    (work / "llamafactory.yaml").write_text(json.dumps(arguments))
    several = {"gradient_accumulation_steps": ACCUMULATION // CORES, "ddp_backend": "gloo"}
    (work / "llamafactory-ddp.yaml").write_text(json.dumps({**arguments, **several}))
    for side in ("llamafactory", "llamafactory-ddp"):
        code = LLAMAFACTORY.replace("OUT", repr(str(work / f"{side}.json")))
        (work / f"run_{side}.py").write_text(code)


def trl(work: Path) -> dict[str, Any]:
    """TRL's SFTTrainer on the same ids and labels."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    facts = json.loads((work / "facts.json").read_text())
    torch.set_num_threads(CORES)
    base = AutoModelForCausalLM.from_pretrained(facts["base"], dtype=torch.float32)
    trainer = SFTTrainer(
        model=PeftModel.from_pretrained(base, work / "adapter", is_trainable=True),
        args=SFTConfig(
            output_dir=str(work / "trl-out"),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=ACCUMULATION,
            learning_rate=RATE,
            num_train_epochs=1,
            lr_scheduler_type="cosine",
            warmup_steps=WARMUP,
            max_length=CUTOFF,
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=SEED,
        ),
        train_dataset=Dataset.from_list(json.loads((work / "ids.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(facts["base"]),
    )
    clock = Clock(trainer.train)
    clock()
    losses = [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]
    return {**clock.figures(), "losses": losses}
