"""Preference tuning of one model, as each worker runs it: DPO by TRL, from the adapter on.

Direct preference optimisation (Rafailov et al. 2023) raises the likelihood of the chosen reply over
that of the rejected one, each measured against the adapter that it starts from.
Knows nothing of Ray, like `train`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from milm_ray.errors import UserError
from milm_ray.finetune import memory
from milm_ray.finetune.train import ADAPTER_DIR, Save, Task
from milm_ray.models.chat_format import encode_dialogue, encode_prompt, fit
from milm_ray.models.messages import round_messages

# The trainer's own state inside a checkpoint.
_TRAINER_DIR = "trainer"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Names of TRL's figures in a row of schema.PREFERENCE_LOG.
_FIGURES = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
    "accuracy": "rewards/accuracies",
}


def pairs_of(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, chat_format: str, cutoff: int
) -> tuple[list[dict[str, list[int]]], dict[str, int]]:
    """Token ids of preference pairs, and counts.

    rows: schema.PREFERENCES. Each pair: prompt_ids, chosen_ids, rejected_ids, in the same chat
    format as everywhere, end token included. A pair over the cutoff loses its oldest rounds; one
    that is too long all the same is left out. Raises UserError when none is left.
    """
    pairs: list[dict[str, list[int]]] = []
    counts = {"pairs": 0, "tokens": 0, "shortened": 0, "too_long": 0}
    for row in rows:
        asked = round_messages(row)
        longest = max((row["chosen"], row["rejected"]), key=len)
        kept, dropped = fit(tokenizer, chat_format, [*asked, _said(longest)], cutoff, training=True)
        prompt = kept[:-1]
        start = len(encode_prompt(tokenizer, chat_format, prompt))
        whole = {
            name: encode_dialogue(tokenizer, chat_format, [*prompt, _said(row[name])])[0]
            for name in ("chosen", "rejected")
        }
        if max(map(len, whole.values())) > cutoff:
            counts["too_long"] += 1
            continue
        pairs.append(
            {
                "prompt_ids": whole["chosen"][:start],
                "chosen_ids": whole["chosen"][start:],
                "rejected_ids": whole["rejected"][start:],
            }
        )
        counts["pairs"] += 1
        counts["tokens"] += sum(map(len, whole.values()))
        counts["shortened"] += dropped > 0
    if not pairs:
        raise UserError(
            f"no preference pair is left of {len(rows)} at a cutoff of {cutoff} tokens",
            "raise finetune.cutoff, or look at the preferences/ table",
        )
    return pairs, counts


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _arguments(task: Task, output: str) -> Any:
    """The trainer's arguments; under ZeRO 3 they hand the weights to DeepSpeed."""
    import torch
    from trl import DPOConfig

    from milm_ray.finetune.engine import deepspeed_config, deepspeed_module

    settings = task.settings
    divided = settings.zero_stage == 3
    gpu = torch.cuda.is_available()
    backend = "nccl" if gpu else "gloo"
    deepspeed = None
    if divided:
        deepspeed_module()
        _announce_deepspeed(backend)
        # The micro-steps are the trainer's here, not optimizer_step's.
        steps = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        deepspeed = {**deepspeed_config(settings), **dict.fromkeys(steps, "auto")}
    return DPOConfig(
        output_dir=output,
        beta=settings.dpo.beta,
        learning_rate=settings.dpo.learning_rate,
        num_train_epochs=settings.dpo.epochs,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_ratio,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        gradient_checkpointing=settings.gradient_checkpointing is not False,
        gradient_checkpointing_kwargs={"use_reentrant": divided},
        max_grad_norm=settings.max_grad_norm,
        weight_decay=settings.weight_decay,
        bf16=settings.precision == "bf16",
        max_length=None,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=settings.save_steps,
        seed=task.seed,
        # Asked to use the CPU, the trainer would look away from DeepSpeed.
        use_cpu=not gpu and not divided,
        deepspeed=deepspeed,
        accelerator_config={"use_configured_state": divided},
        ddp_backend=backend,
        ddp_find_unused_parameters=False,
        report_to=[],
        disable_tqdm=True,
    )


def _announce_deepspeed(backend: str) -> None:
    """Tell accelerate that DeepSpeed divides the work, and between whom: by itself it looks for
    more than one process on GPUs only."""
    from accelerate import PartialState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend=backend)


def _model(task: Task) -> Any:
    """The base with the adapter to go on from."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if task.settings.precision == "bf16" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(task.base, dtype=dtype)
    return PeftModel.from_pretrained(
        base,
        task.adapter,
        is_trainable=True,
        autocast_adapter_dtype=task.settings.zero_stage != 3,
    )


def _one_dtype(model: Any) -> None:
    """Bring the trainer's copy of the adapter, the reference, to the dtype of the weights beside
    it: ZeRO 3 gathers none of another."""
    for name, parameter in model.named_parameters():
        if ".ref." in name:
            parameter.data = parameter.data.to(model.dtype)


def _copy_adapter(written: Path, directory: Path, identity: str) -> None:
    """Copy the adapter of a trainer's checkpoint, its base named by `identity`, not by a path."""
    directory.mkdir(parents=True)
    shutil.copyfile(written / _WEIGHTS, directory / _WEIGHTS)
    config = json.loads((written / _CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = identity
    (directory / _CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


def tune(
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
    """Tune an adapter on preference pairs; returns counts and the log (on every worker).

    rows: schema.PREFERENCES; those of task.model are used. task.adapter: the adapter to start from,
    which is the reference too. The log's rows are schema.PREFERENCE_LOG. Otherwise as train.train.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import DPOTrainer

    from milm_ray.finetune.step import HEAD_ROWS

    # Otherwise accelerate would take as many threads as the machine has cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    settings = task.settings
    tokenizer = AutoTokenizer.from_pretrained(task.base)
    own = [row for row in rows if row["model"] == task.model]
    pairs, counts = pairs_of(own, tokenizer, task.chat_format, settings.cutoff)
    longest = max(
        len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs
    )
    need = memory.estimate(
        json.loads((Path(task.base) / "config.json").read_text(encoding="utf-8")),
        settings,
        workers,
        2 * settings.batch_size * longest,
        HEAD_ROWS,
    )
    memory.check(task.model, need, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def row_of(logged: Mapping[str, Any], step: int) -> dict[str, Any]:
        figures = {name: float(logged[key]) for name, key in _FIGURES.items()}
        return {"model": task.model, "step": step, "epoch": logged["epoch"], **figures}

    class Trainer(DPOTrainer):
        """TRL's trainer on ids that are made already."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    class Listener(TrainerCallback):
        """Passes the trainer's log and checkpoints on."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" not in logs:
                return
            row = row_of(logs, state.global_step)
            if not math.isfinite(row["loss"]):
                raise UserError(
                    f"{task.model}: the loss of preference tuning is {row['loss']} at step "
                    f"{row['step']}",
                    "lower finetune.dpo.learning_rate, or look at the preferences/ table",
                )
            if rank == 0:
                record(row)
                say(
                    f"step {row['step']}/{state.max_steps}  loss {row['loss']:.4f}  "
                    f"rewards {row['chosen_reward']:+.3f} and {row['rejected_reward']:+.3f}  "
                    f"right {row['accuracy']:.0%}"
                )

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            written = Path(args.output_dir, f"checkpoint-{state.global_step}")

            def write(directory: Path) -> None:
                # The reference is made anew from task.adapter; beside it the trainer would not find
                # the weights that it trains.
                left_out = shutil.ignore_patterns("ref")
                place = directory / _TRAINER_DIR
                shutil.copytree(written, place, ignore=left_out, dirs_exist_ok=True)
                if rank == 0:
                    _copy_adapter(written, directory / ADAPTER_DIR, task.identity)

            save(state.global_step, write)

    with tempfile.TemporaryDirectory() as output:
        # Made before the model: while the arguments of a ZeRO 3 run live, weights are divided as
        # they are read.
        arguments = _arguments(task, output)
        model = _model(task)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            callbacks=[Listener()],
        )
        trainer.remove_callback(PrinterCallback)
        if settings.zero_stage == 3:
            _one_dtype(model)
        if rank == 0:
            say(
                f"{counts['pairs']} pairs, {counts['tokens']:,} tokens, over the cutoff: "
                f"{counts['shortened']} shortened, {counts['too_long']} left out; {need.text()}"
            )
        trainer.train(resume_from_checkpoint=str(resume / _TRAINER_DIR) if resume else None)
        state = trainer.state
    log = [row_of(logged, int(logged["step"])) for logged in state.log_history if "loss" in logged]
    return {"counts": {**counts, "steps": state.global_step}, "log": log}
