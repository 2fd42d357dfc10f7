"""One process of a fine-tune without Ray, for tests: python finetune_worker.py SPEC RANK.

SPEC is JSON: model, base, rows, workers, rendezvous, out, perhaps adapter, and runs, each a name,
settings and perhaps resume_from, die_after, or only_load: then rank 0 writes how many weights it
holds. With finetune.method: dpo the rows are preferences.
All processes do every run in turn; rank 0 writes each run's log to out/<name>.json.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path


class Killed(Exception):
    """Stands for the death of the process right after a checkpoint."""


def main(spec_file: str, rank: int) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(rank))
    import torch
    from torch import distributed

    from milm_ray.config import FinetuneSection
    from milm_ray.finetune.dpo import tune
    from milm_ray.finetune.engine import Diverged, lora_model
    from milm_ray.finetune.train import Task, train
    from milm_ray.models import registry

    torch.set_num_threads(1)
    spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    workers, model = spec["workers"], spec["model"]
    distributed.init_process_group(
        "gloo", init_method=f"file://{spec['rendezvous']}", rank=rank, world_size=workers
    )
    out = Path(spec["out"])
    for run in spec["runs"]:
        checkpoints = out / run["name"]

        die_after = run.get("die_after")

        def save(step, write, checkpoints=checkpoints, die_after=die_after):
            # Every worker writes its own directory, which the launcher merges, as Ray Train does.
            own = checkpoints / f"part-{rank}"
            write(own)
            distributed.barrier()
            merged = checkpoints / f"step-{step}"
            if rank == 0:
                for part in range(workers):
                    shutil.copytree(checkpoints / f"part-{part}", merged, dirs_exist_ok=True)
            distributed.barrier()
            shutil.rmtree(own)
            if step == die_after:
                raise Killed

        task = Task(
            model=model,
            base=spec["base"],
            identity=f"tiny-{model}",
            chat_format=model,
            lora_targets=registry.get(model).lora_targets,
            settings=FinetuneSection(**run["settings"]),
            seed=11,
            adapter=spec.get("adapter", ""),
        )
        if run.get("only_load"):
            model_ = lora_model(task.base, task.settings, task.lora_targets, seed=11)
            held = sum(getattr(p, "ds_tensor", p).numel() for p in model_.parameters())
            if rank == 0:
                (out / f"{run['name']}.json").write_text(json.dumps({"weights": held}))
            continue
        resume = out / run["resume_from"] if "resume_from" in run else None
        try:
            outcome = (tune if task.settings.method == "dpo" else train)(
                task,
                spec["rows"],
                rank=rank,
                workers=workers,
                save=save,
                resume=resume,
                say=lambda text: None,
            )
        except Killed:
            continue
        except Diverged as error:
            outcome = {"what": error.what, "names": error.names}
        if rank == 0:
            (out / f"{run['name']}.json").write_text(json.dumps(outcome), encoding="utf-8")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
